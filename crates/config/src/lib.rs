//! Typed configuration in layers, later ones override: defaults, files and their bases, environment (`UNVEIL__SECTION__KEY`), `--set
//! section.key=value`.
//!
//! The only crate that reads environment variables. Must not depend on tokio and tch.
//!
//! # Examples
//! Later layers override earlier ones:
//! ```
//! use unveil_config::load_from;
//!
//! let environment = [("UNVEIL__RUN__SEED".to_owned(), "1".to_owned()), ("UNVEIL__RUN__DIR".to_owned(), "runs/a".to_owned())];
//! let sets = ["run.seed=7".to_owned(), "learner.steps=40".to_owned()];
//! let config = load_from(None, environment.into_iter(), &sets)?;
//! assert_eq!((config.run.seed, config.run.dir.as_str()), (7, "runs/a"));
//! assert_eq!(config.learner.steps, 40);
//! # Ok::<(), unveil_config::ConfigError>(())
//! ```

mod base;
mod box_form;
mod change;
mod error;
mod explain;
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
pub use paths::SFT_PREFIXES;
pub use reference::{json_schema, reference_page};
pub use schema::Config;
pub use size::{count_parameters, format_count};
