//! Section `[telemetry]`: logs and traces. The metrics pages of the roles are configured in their own sections.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Logs and traces of every role.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Telemetry {
    /// Format of log lines on stderr: `human` or `json`.
    pub log: LogFormat,
    /// OpenTelemetry collector for traces by OTLP over gRPC: `http://host:4317`, or `https://` with the system's certificate authorities.
    /// Empty: no traces.
    pub otlp_endpoint: String,
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Readable text: role, time, level, message.
    #[default]
    Human,
    /// One JSON object per line, each with `role` and `run`.
    Json,
}
