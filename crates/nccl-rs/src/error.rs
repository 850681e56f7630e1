//! Error and version types.

/// A version of NCCL, encoded as NCCL does: 22809 is `2.28.9`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub i32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Versions up to 2.8 were encoded with one digit less (`NCCL_VERSION` of nccl.h).
        let unit = if self.0 < 10_000 { 1_000 } else { 10_000 };
        write!(f, "{}.{}.{}", self.0 / unit, self.0 % unit / 100, self.0 % 100)
    }
}

/// Errors of this crate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NcclError {
    /// The library was not found.
    #[error("libnccl.so.2 cannot be loaded; install NVIDIA's NCCL, or torch with CUDA, which contains it. Tried: {}", tried.join("; "))]
    NotFound {
        /// The error of each place that was searched.
        tried: Vec<String>,
    },
    /// A required function is missing from the library.
    #[error("NCCL at {path} is not usable: {reason}")]
    Unusable {
        /// The library's file.
        path: String,
        /// The loader's error.
        reason: String,
    },
    /// The library is too old, or has another major version.
    #[error("NCCL {found} was found at {path}, but {needed} or a newer 2.x is needed")]
    Version {
        /// The library's file.
        path: String,
        /// The version that the library reports.
        found: Version,
        /// The oldest supported version.
        needed: Version,
    },
    /// NCCL returned an error.
    #[error("{call}: NCCL reports `{text}` (code {code}){detail}")]
    Failed {
        /// The function that was called.
        call: &'static str,
        /// The returned `ncclResult_t`.
        code: i32,
        /// NCCL's text for the code.
        text: String,
        /// NCCL's last message, after a colon; may be empty.
        detail: String,
    },
    /// The deadline passed.
    #[error("{call} did not complete within {seconds:.1} s")]
    Timeout {
        /// The call that was waited for.
        call: &'static str,
        /// Seconds waited.
        seconds: f64,
    },
    /// The caller's closure cancelled the wait.
    #[error("{call} was cancelled")]
    Cancelled {
        /// The call that was waited for.
        call: &'static str,
    },
    /// The communicator has been aborted.
    #[error("{call}: the communicator has been aborted")]
    Aborted {
        /// The call that was attempted.
        call: &'static str,
    },
    /// Work on the stream failed.
    #[error("{call}: work on the GPU failed: {message}")]
    Stream {
        /// The call that was waited for.
        call: &'static str,
        /// The driver's error.
        message: String,
    },
    /// The rank is out of range.
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
    fn versions_display_as_nvidia_writes_them() {
        assert_eq!(Version(22809).to_string(), "2.28.9");
        assert_eq!(Version(21400).to_string(), "2.14.0");
        assert_eq!(Version(2708).to_string(), "2.7.8");
        assert!(Version(22809) > Version(21400));
    }
}
