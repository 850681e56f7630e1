//! Errors of a client of the experience service.

use unveil_service::ServiceError;

/// Reason why the experience service cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The service is unreachable or refuses permanently.
    #[error("the experience service at {address}: {source}")]
    Service {
        /// Address of the service.
        address: String,
        /// The cause.
        source: Box<ServiceError>,
    },
    /// The service sent an inconsistent message.
    #[error("the experience service at {address} {what}")]
    Protocol {
        /// Address of the service.
        address: String,
        /// Description of the message, continuing the sentence.
        what: String,
    },
    /// Weights arrived damaged several times.
    #[error("weights from {address} are refused: {what}")]
    Weights {
        /// Address of the service.
        address: String,
        /// The problem.
        what: String,
    },
    /// The broadcast thread cannot be spawned.
    #[error("cannot spawn the broadcast thread: {0}")]
    Thread(#[source] std::io::Error),
}

/// Result of the client.
pub(super) type Result<T, E = ClientError> = std::result::Result<T, E>;
