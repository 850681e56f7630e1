//! What can go wrong, in words.

/// A version of NCCL; `2.28.9` is coded as 22809.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub i32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Versions up to 2.8 were coded with one digit less (`NCCL_VERSION` of nccl.h).
        let unit = if self.0 < 10_000 { 1_000 } else { 10_000 };
        write!(f, "{}.{}.{}", self.0 / unit, self.0 % unit / 100, self.0 % 100)
    }
}

/// What can go wrong.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NcclError {
    /// No library.
    #[error("libnccl.so.2 cannot be loaded; install NVIDIA's NCCL, or torch with CUDA, which brings it. Tried: {}", tried.join("; "))]
    NotFound {
        /// Each place and what was wrong with it.
        tried: Vec<String>,
    },
    /// The library lacks a function.
    #[error("NCCL at {path} is not usable: {reason}")]
    Unusable {
        /// The library's file.
        path: String,
        /// What is missing.
        reason: String,
    },
    /// The library is too old, or of another kind.
    #[error("NCCL {found} was found at {path}, but {needed} or a newer 2.x is needed")]
    Version {
        /// The library's file.
        path: String,
        /// What it says of itself.
        found: Version,
        /// The oldest that can be used.
        needed: Version,
    },
    /// NCCL refused or failed.
    #[error("{call}: NCCL says `{text}` (code {code}){detail}")]
    Refused {
        /// What was called.
        call: &'static str,
        /// `ncclResult_t`.
        code: i32,
        /// NCCL's text for the code.
        text: String,
        /// NCCL's last message, after a colon; may be empty.
        detail: String,
    },
    /// The deadline passed.
    #[error("{what} did not end within {seconds:.1} s")]
    Late {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        seconds: f64,
    },
    /// The caller gave it up.
    #[error("{what} was given up")]
    GivenUp {
        /// What was waited for.
        what: &'static str,
    },
    /// The communicator was given up before.
    #[error("{what}: the communicator was aborted before")]
    Aborted {
        /// What was tried.
        what: &'static str,
    },
    /// Whoever watches the stream says that its work failed.
    #[error("{what}: the GPU's work failed: {message}")]
    Stream {
        /// What was waited for.
        what: &'static str,
        /// What the driver said.
        message: String,
    },
    /// Wrong arguments.
    #[error("rank {rank} of {ranks}: a rank must be below the number of ranks, which is at most {}", i32::MAX)]
    Rank {
        /// The rank.
        rank: usize,
        /// The number of ranks.
        ranks: usize,
    },
}

/// Result of this crate.
pub type Result<T, E = NcclError> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_nvidia_writes_them() {
        assert_eq!(Version(22809).to_string(), "2.28.9");
        assert_eq!(Version(21400).to_string(), "2.14.0");
        assert_eq!(Version(2708).to_string(), "2.7.8");
        assert!(Version(22809) > Version(21400));
    }
}
