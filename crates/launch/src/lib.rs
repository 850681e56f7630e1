//! The local supervisor: prepares data and model, runs stage 1, stage 2 and the evaluations as child processes, and ends them all together
//! in every case. Also the submission of runs to clusters.
//!
//! It starts programs and reads their files, but computes nothing itself. Must not depend on: tch.

mod gpus;
mod memory;
mod placement;
mod prepare;
mod restart_backoff;
mod role_process;
mod stage1;
mod stage2;
pub mod submit;
mod train;

pub use placement::{MachineMemory, PlacedProcess, placement};
pub use prepare::prepare_data;
pub use train::{TrainOptions, train};

use std::path::PathBuf;

/// Errors that end a run early.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A file or directory cannot be read or written.
    #[error("{what} {path}: {source}")]
    Io {
        /// The failed operation.
        what: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// Another run uses the directory.
    #[error("run directory {0} is in use by another `unveil train`; wait for it, or choose another run.dir")]
    InUse(PathBuf),
    /// The run directory belongs to a different configuration.
    #[error("{dir} contains a run with another configuration: {difference}; choose another run.dir or delete it")]
    OtherConfig {
        /// The run directory.
        dir: PathBuf,
        /// The differences that are not allowed.
        difference: String,
    },
    /// The saved configuration of a run cannot be read.
    #[error("{path} is damaged: {why}. Remove only that file: the run then continues with the given configuration")]
    DamagedConfig {
        /// Path of the file.
        path: PathBuf,
        /// Description of the problem.
        why: String,
    },
    /// The data cannot be created or used.
    #[error(transparent)]
    Prepare(#[from] unveil_datasets::prepare::PrepareError),
    /// Data, configuration or results cannot be used.
    #[error("{0}")]
    Data(String),
    /// A role ended with an error.
    #[error("{role} ended with {status}; its last messages are {place}")]
    Role {
        /// Name of the role.
        role: String,
        /// Its exit status.
        status: String,
        /// Where its messages can be read.
        place: String,
    },
    /// A role was not ready in time.
    #[error("{role} was not ready within {seconds} s; its messages are {place}")]
    NotReady {
        /// Name of the role.
        role: String,
        /// The timeout in seconds.
        seconds: u64,
        /// Where its messages can be read.
        place: String,
    },
    /// The GPUs of this machine do not suffice for the run.
    #[error("{0}")]
    Gpus(String),
    /// Interrupted by a signal.
    #[error("interrupted; run the same command again to resume")]
    Interrupted,
}

pub(crate) fn io<'a>(what: &'static str, path: &'a std::path::Path) -> impl FnOnce(std::io::Error) -> LaunchError + 'a {
    move |source| LaunchError::Io { what, path: path.to_owned(), source }
}
