//! The section `[telemetry]`: what a process tells about its work, besides the pages of metrics that each role has.

use serde::{Deserialize, Serialize};

/// Logs and traces of every role.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Telemetry {
    /// Form of the log lines on stderr.
    pub log: LogForm,
    /// OpenTelemetry collector that takes traces by OTLP over gRPC (`http://host:4317`, or `https://` with the system's authorities);
    /// empty = none are made.
    pub otlp_endpoint: String,
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogForm {
    /// For people: role, time, level, message.
    #[default]
    Human,
    /// One JSON object a line, with `role` and `run` in each.
    Json,
}
