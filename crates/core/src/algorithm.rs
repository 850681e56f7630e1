//! The algorithms of stage 2.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Advantage estimator: computes advantages from rewards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// GRPO: reward minus the group's mean, divided by its standard deviation if `scale_by_std`; no value head (arXiv 2402.03300).
    Grpo,
    /// PPO: value head and generalised advantage estimation (arXiv 1707.06347, 1506.02438).
    Ppo,
    /// RLOO: reward minus the mean of the other rewards of the group (arXiv 2402.14740).
    Rloo,
    /// REINFORCE++: discounted returns, normalised over the batch, without a baseline per prompt (arXiv 2501.03262).
    ReinforcePlusPlus,
    /// REINFORCE++ with baseline: reward minus the group's mean, normalised over the batch.
    ReinforcePlusPlusBaseline,
}

impl Algorithm {
    /// Returns whether the algorithm compares the responses to one prompt, so that a group needs at least two.
    pub fn compares_responses(self) -> bool {
        matches!(self, Self::Grpo | Self::Rloo | Self::ReinforcePlusPlusBaseline)
    }

    /// Returns whether the algorithm needs a value head and computes value targets.
    pub fn needs_values(self) -> bool {
        self == Self::Ppo
    }

    /// Returns whether advantages are normalised over the batch with `whiten = "auto"`.
    pub fn whitens_by_default(self) -> bool {
        matches!(self, Self::Ppo | Self::ReinforcePlusPlus | Self::ReinforcePlusPlusBaseline)
    }
}
