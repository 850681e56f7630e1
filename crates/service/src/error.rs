//! What goes wrong between roles, and whether trying again can help.

use std::error::Error as _;
use std::time::Duration;

use tonic::{Code, Status};

/// A failure of serving or calling.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Another process listens there.
    #[error(
        "cannot listen on {address}: the port is in use. Stop the process that holds it (`ss -ltnp` shows it), choose another port, or use port 0 for any free one"
    )]
    AddressInUse {
        /// The listen address.
        address: String,
    },
    /// The address cannot be listened on for another reason.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The listen address.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Not an address.
    #[error("`{address}` is not an address: {reason}. Write {form}")]
    Address {
        /// What was given.
        address: String,
        /// Why it is not.
        reason: String,
        /// The form that is needed.
        form: &'static str,
    },
    /// Others could listen in, or anybody could call.
    #[error("refuses to listen on {address}: {why}")]
    Exposed {
        /// The listen address.
        address: String,
        /// What is missing, and how to get it.
        why: &'static str,
    },
    /// A token would travel in the clear.
    #[error(
        "refuses to send the token to {address} without TLS: set tls.dir and write https://, or, where the network itself encrypts, tls.insecure = true"
    )]
    Plain {
        /// The address.
        address: String,
    },
    /// The server ended with an error.
    #[error("the server at {address} failed: {source}")]
    Server {
        /// Where it listened.
        address: String,
        /// Why.
        source: tonic::transport::Error,
    },
    /// The server could not be set up.
    #[error("cannot set up the server: {0}")]
    Setup(String),
    /// A secret that the configuration names is not there.
    #[error(transparent)]
    Config(#[from] unveil_config::ConfigError),
    /// Nobody answered in time.
    #[error("{what}: no success within {:.1} s; last: {last}", .waited.as_secs_f64())]
    Deadline {
        /// What was tried.
        what: String,
        /// How long.
        waited: Duration,
        /// The last failure.
        last: String,
    },
    /// The peer answered with an error.
    #[error("{what}: {:?}: {}", .status.code(), .status.message())]
    Call {
        /// What was called.
        what: String,
        /// The answer.
        status: Box<Status>,
    },
}

impl ServiceError {
    /// The same call may succeed later, with nothing changed by hand.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Deadline { .. } | Self::Server { .. } => true,
            Self::Call { status, .. } => retryable(status),
            Self::AddressInUse { .. } | Self::Listen { .. } | Self::Address { .. } | Self::Setup(_) => false,
            Self::Exposed { .. } | Self::Plain { .. } | Self::Config(_) => false,
        }
    }

    /// Trying again without a change cannot help.
    pub fn is_permanent(&self) -> bool {
        !self.is_retryable()
    }
}

/// Whether a call that ended so may be repeated. Broken transports carry their cause as `source`.
pub(crate) fn retryable(status: &Status) -> bool {
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
    fn kinds() {
        assert!(retryable(&Status::unavailable("x")));
        assert!(!retryable(&Status::invalid_argument("x")));
        assert!(!retryable(&Status::internal("x")));
        let e = ServiceError::AddressInUse { address: "127.0.0.1:80".into() };
        assert!(e.is_permanent() && e.to_string().contains("127.0.0.1:80") && e.to_string().contains("port 0"));
    }
}
