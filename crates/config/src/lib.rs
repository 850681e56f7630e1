//! Typed configuration in layers, later ones override: defaults, file, environment (`UNVEIL__SECTION__KEY`), `--set section.key=value`.
//!
//! The only crate that reads environment variables. Must not depend on tokio and tch.

mod box_form;
mod change;
mod error;
mod external;
mod hint;
mod identity;
mod layer;
mod learning_rates;
mod load;
mod path_checks;
mod paths;
mod reference;
pub mod schema;
mod size;
mod to_toml;
mod type_errors;
mod validate;

pub use change::{Change, changes, changes_since, entries};
pub use error::ConfigError;
pub use external::read_secret;
pub use identity::{MIN_TOKEN_CHARS, Role, TlsFiles};
pub use learning_rates::TrainingStage;
pub use load::{Loaded, environment, load, load_from, parse};
pub use path_checks::{directory_problem, model_dir_problem};
pub use reference::{json_schema, reference_page};
pub use schema::Config;
pub use size::{count_parameters, format_count};
