//! Errors of loading a configuration.

/// Error of a configuration; each message names the key and what to do.
///
/// # Examples
/// ```
/// use unveil_config::{ConfigError, load_from};
///
/// let load = |set: &str| load_from(None, std::iter::empty(), &[set.to_owned()]).unwrap_err();
///
/// let error = load("learner.clip_hihg=0.3");
/// assert!(matches!(error, ConfigError::Keys(_)));
/// assert!(error.to_string().contains("did you mean `learner.clip_high`"));
///
/// assert_eq!(load("run.seed").to_string(), "`--set run.seed`: write it as section.key=value");
/// ```
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Path of the file.
        path: String,
        /// Cause.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{path} is not valid TOML: {message}")]
    Syntax {
        /// Path of the file.
        path: String,
        /// Line, column and expected syntax.
        message: String,
    },
    /// Unknown keys and values of the wrong type, one message each.
    #[error("{}", list_problems("the configuration cannot be read", .0))]
    Keys(Vec<String>),
    /// A `--set` that is not `section.key=value`.
    #[error("`--set {0}`: write it as section.key=value")]
    Set(String),
    /// Invalid values and combinations, one message each.
    #[error("the configuration is invalid:\n  {}", .0.join("\n  "))]
    Invalid(Vec<String>),
}

/// Formats one problem alone, several as a list below `title`.
fn list_problems(title: &str, problems: &[String]) -> String {
    match problems {
        [one] => one.clone(),
        all => format!("{title}:\n  {}", all.join("\n  ")),
    }
}
