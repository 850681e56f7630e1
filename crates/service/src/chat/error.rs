//! What goes wrong between us and a chat endpoint, and whether trying again can help.

use std::time::Duration;

/// A call that brought no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ChatError {
    /// The options cannot work.
    #[error("chat endpoint `{url}`: {what}")]
    Options {
        /// The base URL.
        url: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// Time is up.
    #[error("no answer within {:.1} s; last: {last}", .waited.as_secs_f64())]
    Deadline {
        /// How long.
        waited: Duration,
        /// The last failure.
        last: String,
    },
    /// The budget is spent.
    #[error("the budget of {limit} {what} is spent")]
    Budget {
        /// `requests` or `tokens`.
        what: &'static str,
        /// How many there were.
        limit: u64,
    },
    /// The endpoint refused or failed.
    #[error("the endpoint answered {code}: {body}")]
    Status {
        /// HTTP status.
        code: u16,
        /// The answer's beginning, without the key.
        body: String,
        /// What `Retry-After` said.
        retry_after: Option<Duration>,
    },
    /// The connection broke, or one request took longer than it may.
    #[error("{0}")]
    Transport(String),
    /// The answer is no chat completion.
    #[error("the answer is no chat completion: {0}")]
    Malformed(String),
}

impl ChatError {
    /// The same call may succeed later, with nothing changed by hand.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Deadline { .. } | Self::Transport(_) | Self::Malformed(_) => true,
            Self::Status { code, .. } => *code == 408 || *code == 429 || *code >= 500,
            Self::Options { .. } | Self::Budget { .. } => false,
        }
    }

    /// The endpoint could not be had: it is away, overloaded, too slow, or it does not let us in.
    pub fn is_away(&self) -> bool {
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
    fn kinds() {
        let status = |code| ChatError::Status { code, body: String::new(), retry_after: None };
        for (code, again) in
            [(400, false), (401, false), (404, false), (408, true), (429, true), (500, true), (529, true)]
        {
            assert_eq!(status(code).is_retryable(), again, "{code}");
        }
        assert!(!ChatError::Budget { what: "requests", limit: 1 }.is_retryable());
    }
}
