//! Starts background threads and the runtimes of asynchronous code.

use std::thread::JoinHandle;

use tokio::runtime::{Builder, Runtime};

use crate::error::{LearnerError, Result};

/// Starts a runtime with `workers` threads.
///
/// # Errors
/// Returns [`LearnerError::Thread`] if the operating system refuses a thread.
pub(crate) fn start_runtime(workers: usize) -> Result<Runtime> {
    let runtime = Builder::new_multi_thread().worker_threads(workers).enable_all().build();
    runtime.map_err(|source| LearnerError::Thread { name: "runtime", source })
}

/// Runs `work` on a thread called `name`.
///
/// # Errors
/// Returns [`LearnerError::Thread`] if the operating system refuses the thread.
pub(crate) fn spawn<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map_err(|source| LearnerError::Thread { name, source })
}
