//! The section `[launch]`: how `unveil train` puts its processes on one machine.

use serde::{Deserialize, Serialize};

/// Processes of a run on one machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Launch {
    /// Several processes may have one GPU. Without it `unveil train` wants a GPU for each rank of the learner and each rollout
    /// worker.
    pub share_gpus: bool,
}
