//! Errors of writing pages.

use std::path::PathBuf;

/// Error of writing a page.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The directory is not a run directory.
    #[error("{0} is not a run directory: it has no events.jsonl; give the directory named by run.dir")]
    NotARun(PathBuf),
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// A template does not fit its values: a bug in Unveil.
    #[error("cannot render the page: {0:#}")]
    Template(minijinja::Error),
}
