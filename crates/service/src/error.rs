//! Errors of serving and calling, and whether a retry can help.

use std::error::Error as _;
use std::time::Duration;

use tonic::{Code, Status};

/// Error of serving or calling.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Another process listens on the address.
    #[error(
        "cannot listen on {address}: the port is in use. Stop the process that uses it (see `ss -ltnp`), choose another port, or use port 0 for any free port"
    )]
    AddressInUse {
        /// The listen address.
        address: String,
    },
    /// Listening on the address failed for another reason.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The listen address.
        address: String,
        /// The I/O error.
        source: std::io::Error,
    },
    /// The address is invalid.
    #[error("`{address}` is not an address: {reason}. Write {form}")]
    Address {
        /// The invalid address.
        address: String,
        /// Why it is invalid.
        reason: String,
        /// The required form.
        form: &'static str,
    },
    /// The listener would be unencrypted or open to any caller.
    #[error("refuses to listen on {address}: {why}")]
    Exposed {
        /// The listen address.
        address: String,
        /// Description of the missing setting.
        why: &'static str,
    },
    /// A token would be sent unencrypted.
    #[error(
        "refuses to send the token to {address} without TLS: set tls.dir and write https://, or, where the network itself encrypts, tls.insecure = true"
    )]
    Plain {
        /// Address of the service.
        address: String,
    },
    /// The server stopped with an error.
    #[error("the server at {address} failed: {source}")]
    Server {
        /// The listen address.
        address: String,
        /// The transport error.
        source: tonic::transport::Error,
    },
    /// The server could not be set up.
    #[error("cannot set up the server: {0}")]
    Setup(String),
    /// A secret named in the configuration is missing.
    #[error(transparent)]
    Config(#[from] unveil_config::ConfigError),
    /// There was no success within the deadline.
    #[error("{what}: no success within {:.1} s; last: {last}", .waited.as_secs_f64())]
    Deadline {
        /// The attempted operation.
        what: String,
        /// Time spent.
        waited: Duration,
        /// The last error.
        last: String,
    },
    /// The peer returned an error.
    #[error("{what}: {:?}: {}", .status.code(), .status.message())]
    Call {
        /// The attempted call.
        what: String,
        /// The returned status.
        status: Box<Status>,
    },
}

impl ServiceError {
    /// Returns whether the same call may succeed later without intervention.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Deadline { .. } | Self::Server { .. } => true,
            Self::Call { status, .. } => is_retryable(status),
            Self::AddressInUse { .. } | Self::Listen { .. } | Self::Address { .. } | Self::Setup(_) => false,
            Self::Exposed { .. } | Self::Plain { .. } | Self::Config(_) => false,
        }
    }

    /// Returns whether a retry without intervention cannot help.
    pub fn is_permanent(&self) -> bool {
        !self.is_retryable()
    }
}

/// Returns whether a call with this status may be retried. Transport errors have their cause as `source`.
pub(crate) fn is_retryable(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Aborted => true,
        Code::Unknown | Code::Cancelled | Code::Internal => status.source().is_some(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retryable_statuses() {
        assert!(is_retryable(&Status::unavailable("x")));
        assert!(!is_retryable(&Status::invalid_argument("x")));
        assert!(!is_retryable(&Status::internal("x")));
        let e = ServiceError::AddressInUse { address: "127.0.0.1:80".into() };
        assert!(e.is_permanent() && e.to_string().contains("127.0.0.1:80") && e.to_string().contains("port 0"));
    }
}
