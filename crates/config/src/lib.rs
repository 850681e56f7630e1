//! Typed configuration: defaults < file < environment (`UNVEIL__SECTION__KEY`) < `--set section.key=value`.
//!
//! The only room that reads environment variables. Must not know: tokio, tch.

mod auto;
mod change;
mod identity;
mod load;
mod outside;
mod paths;
pub mod schema;
mod validate;

pub use change::{Change, changes, changes_since, entries};
pub use identity::{Role, TOKEN_LEAST, TlsFiles};
pub use load::{ConfigError, environment, load, load_from};
pub use outside::secret;
pub use schema::Config;
