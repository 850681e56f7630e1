//! Errors of a chat client and whether a retry can help.

use std::time::Duration;

/// Why a call to a chat endpoint failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ChatError {
    /// The options are invalid.
    #[error("chat endpoint `{url}`: {what}")]
    Options {
        /// Base URL of the endpoint.
        url: String,
        /// Description of the problem and its remedy.
        what: String,
    },
    /// The deadline has passed.
    #[error("no answer within {:.1} s; last: {last}", .waited.as_secs_f64())]
    Deadline {
        /// Time spent.
        waited: Duration,
        /// The last error.
        last: String,
    },
    /// The budget is exhausted.
    #[error("the budget of {limit} {what} is spent")]
    Budget {
        /// `requests` or `tokens`.
        what: &'static str,
        /// The configured limit.
        limit: u64,
    },
    /// The endpoint returned an error status.
    #[error("the endpoint answered {code}: {body}")]
    Status {
        /// HTTP status.
        code: u16,
        /// Beginning of the response body, without the key.
        body: String,
        /// Value of `Retry-After`.
        retry_after: Option<Duration>,
    },
    /// The connection failed, or a request exceeded its time limit.
    #[error("{0}")]
    Transport(String),
    /// The response is not a chat completion.
    #[error("the response is not a chat completion: {0}")]
    Malformed(String),
}

impl ChatError {
    /// Returns whether the same call may succeed later without intervention.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Deadline { .. } | Self::Transport(_) | Self::Malformed(_) => true,
            Self::Status { code, .. } => *code == 408 || *code == 429 || *code >= 500,
            Self::Options { .. } | Self::Budget { .. } => false,
        }
    }

    /// Returns whether the endpoint is unavailable: unreachable, overloaded, too slow, or denying access.
    pub fn is_unavailable(&self) -> bool {
        match self {
            Self::Deadline { .. } | Self::Transport(_) => true,
            Self::Status { code, .. } => matches!(code, 401 | 403 | 404 | 408 | 429) || *code >= 500,
            Self::Malformed(_) | Self::Options { .. } | Self::Budget { .. } => false,
        }
    }

    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retryable_statuses() {
        let status = |code| ChatError::Status { code, body: String::new(), retry_after: None };
        for (code, retryable) in
            [(400, false), (401, false), (404, false), (408, true), (429, true), (500, true), (529, true)]
        {
            assert_eq!(status(code).is_retryable(), retryable, "{code}");
        }
        assert!(!ChatError::Budget { what: "requests", limit: 1 }.is_retryable());
    }
}
