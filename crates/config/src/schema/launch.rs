//! Section `[launch]`: placement of the processes of `unveil train` on one machine.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Placement of the processes of a run on one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Launch {
    /// Allows several processes to share a GPU. If false, `unveil train` needs one GPU for each learner rank and each rollout worker.
    pub share_gpus: bool,
    /// Makes `unveil train` refuse to start a run that by its plan (`unveil plan`) needs more memory than the devices of this machine have.
    pub check_memory: bool,
}

impl Default for Launch {
    fn default() -> Self {
        Self { share_gpus: false, check_memory: true }
    }
}
