//! Findings: problems of records, as checks report them.

use serde::Serialize;

/// Severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Suspicious; training continues.
    Warning,
    /// The record cannot be used.
    Error,
}

/// A problem of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Id of the record; empty if it has none.
    pub id: String,
    /// `file:line`.
    pub file: String,
    /// Description of the problem.
    pub what: String,
    /// Severity of the problem.
    pub severity: Severity,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: record \"{}\": {}", self.file, self.id, self.what)
    }
}
