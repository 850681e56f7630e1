//! The ready line, by which a role reports its port to its supervisor: one JSON object on one line of stdout.

use std::io::Write;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Content of the ready line: a role serves at `address`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Name of the role (`reward`, `learner`, …).
    pub role: String,
    /// Bound `host:port`.
    pub address: SocketAddr,
}

/// Writes the ready line to stdout and flushes it.
pub fn announce(role: &str, address: SocketAddr) -> std::io::Result<()> {
    let line = serde_json::to_string(&Ready { role: role.to_owned(), address })?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// Parses a ready line; returns `None` for any other line.
pub fn parse_ready(line: &str) -> Option<Ready> {
    serde_json::from_str(line.trim()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_other_lines() {
        let line = r#"{"role":"reward","address":"127.0.0.1:4711"}"#;
        let r = parse_ready(line).unwrap();
        assert_eq!((r.role.as_str(), r.address.port()), ("reward", 4711));
        assert_eq!(serde_json::to_string(&r).unwrap(), line);
        assert!(parse_ready("hello").is_none() && parse_ready("{}").is_none());
    }
}
