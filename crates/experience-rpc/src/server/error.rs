//! Errors of the experience server, which end the run.

/// Reason why a record could not be prepared; displayed as it is.
pub type RecordFailure = Box<dyn std::error::Error + Send + Sync>;

/// Errors of the experience server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// libtorch rejected an operation.
    #[error("tensor library: {0}")]
    Torch(#[from] tch::TchError),
    /// Another member of a broadcast group has failed or timed out.
    #[error("ranks: {0}")]
    Broadcast(#[from] unveil_collective::CollectiveError),
    /// The accounting of groups failed.
    #[error("experience: {0}")]
    Experience(#[from] unveil_experience::ExperienceError),
    /// The service could not be started.
    #[error(transparent)]
    Service(#[from] unveil_service::ServiceError),
    /// The broadcast thread could not be spawned.
    #[error("a thread for broadcasts: {0}")]
    Thread(#[source] std::io::Error),
    /// A record could not be prepared.
    #[error(transparent)]
    Record(RecordFailure),
    /// A record or tensors cannot be sent to workers.
    #[error("{0}")]
    Unsendable(String),
    /// All training records have been set aside.
    #[error(
        "all {records} training records were set aside, the last one because it was {why}. The cause is probably in the workers rather than in the records"
    )]
    AllRecordsDropped {
        /// Number of training records.
        records: u64,
        /// Why the last one was set aside.
        why: String,
    },
    /// A background thread ended without reporting an error.
    #[error("{0} ended unexpectedly")]
    ThreadEnded(&'static str),
}

/// Result of the server.
pub(super) type Result<T, E = ServerError> = std::result::Result<T, E>;
