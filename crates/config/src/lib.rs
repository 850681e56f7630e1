//! Typed configuration: defaults < file < environment (`UNVEIL__SECTION__KEY`) < `--set section.key=value`.
//!
//! The only room that reads environment variables. Must not know: tokio, tch.

mod auto;
mod change;
mod hint;
mod identity;
mod layer;
mod load;
mod outside;
mod paths;
mod places;
mod rates;
pub mod schema;
mod size;
mod text;
mod validate;
mod words;

pub use change::{Change, changes, changes_since, entries};
pub use identity::{Role, TOKEN_LEAST, TlsFiles};
pub use load::{ConfigError, Loaded, environment, load, load_from, read};
pub use outside::secret;
pub use places::{directory_fault, model_fault};
pub use rates::Stage;
pub use schema::Config;
pub use size::{parameters, shown_count};
