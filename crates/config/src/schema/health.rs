//! Section `[health]`: health endpoint for probes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// gRPC health endpoint of a process, for probes of Kubernetes, containers and load balancers. It is always plaintext HTTP/2, independent
/// of `[tls]`, and reports only whether the process is alive and ready.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Health {
    /// Listen address `host:port`; processes on one machine need different ports. Empty: no endpoint.
    pub listen: String,
}
