//! The local supervisor of roles: prepares data and model, runs stage 1, stage 2 and the evaluations as child processes, and
//! tears everything down together whatever happens. Beside it the submission of runs to clusters.
//!
//! Must not know: tch. It starts programs and reads their files; what they compute is theirs.

mod child;
mod gpus;
mod memory;
mod prepare;
mod restarts;
mod stage2;
pub mod submit;
mod train;

pub use prepare::prepare_data;
pub use train::{Options, train};

use std::path::PathBuf;

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A file or directory cannot be read or written.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another run uses the directory.
    #[error("run directory {0} is in use by another `unveil train`; wait for it, or choose another run.dir")]
    InUse(PathBuf),
    /// The run directory belongs to a different configuration.
    #[error("{dir} holds a run with another configuration: {difference}; choose another run.dir or delete it")]
    OtherConfig {
        /// The directory.
        dir: PathBuf,
        /// What differs and may not.
        difference: String,
    },
    /// The configuration that a run has kept cannot be read.
    #[error(
        "{path} is damaged: {why}. Remove that file alone: the run then goes on with the configuration that is given"
    )]
    DamagedConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The data cannot be used.
    #[error("{0}")]
    Data(String),
    /// A role ended with an error.
    #[error("{role} ended with {status}; its last lines are {place}")]
    Role {
        /// Which role.
        role: String,
        /// How it ended.
        status: String,
        /// Where its messages are.
        place: String,
    },
    /// A role did not announce itself in time.
    #[error("{role} did not come up within {seconds} s; what it said is {place}")]
    NotReady {
        /// Which role.
        role: String,
        /// How long was waited.
        seconds: u64,
        /// Where its messages are.
        place: String,
    },
    /// The GPUs of this machine do not do for the run.
    #[error("{0}")]
    Gpus(String),
    /// Interrupted by a signal.
    #[error("interrupted; run the same command again to resume")]
    Interrupted,
}

pub(crate) fn io<'a>(what: &'static str, path: &'a std::path::Path) -> impl FnOnce(std::io::Error) -> LaunchError + 'a {
    move |source| LaunchError::Io { what, path: path.to_owned(), source }
}
