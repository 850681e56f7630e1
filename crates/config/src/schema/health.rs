//! The section `[health]`: where a role tells whoever started it how it is.

use serde::{Deserialize, Serialize};

/// gRPC health of this process, for probes of Kubernetes, of containers and of load balancers. It is plain HTTP/2 whatever the
/// other listeners speak, and says nothing but whether the process is alive and whether it is ready.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Health {
    /// Listen address, `host:port`; empty = none. Processes on one machine need different ports.
    pub listen: String,
}
