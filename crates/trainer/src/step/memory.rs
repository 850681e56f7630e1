//! Memory needed by an update of stage 2, and what to lower when it does not suffice.

use unveil_core::TrainGroup;

use crate::batch::TrainableGroup;
use crate::memory_estimate::{LargestPass, MemoryInputs};
use crate::memory_plan::MemoryPlan;
use crate::micro_batch::BatchItem;
use crate::policy::DIVISION;

use super::PolicyTrainer;

impl PolicyTrainer {
    /// Estimates the memory that the update of a batch needs on this rank.
    pub fn memory_plan(&self, groups: &[TrainGroup]) -> MemoryPlan {
        let policy = &self.policy;
        let settings = &policy.settings;
        let trainable = self.trainable_groups(groups);
        let all: Vec<usize> = (0..trainable.len()).collect();
        let largest = LargestPass::of(DIVISION, &self.partition(&trainable).micro_batches(&trainable, &all));
        let mut advice = vec![format!(
            "lower learner.token_budget (now {}; the longest group has {})",
            settings.token_budget,
            trainable.iter().map(TrainableGroup::packed_len).max().unwrap_or(0)
        )];
        if !settings.recompute {
            advice.push("set learner.recompute = true".into());
        }
        advice.push("lower rollout.n or rollout.max_new_tokens".into());
        if policy.vlm.adapters().is_none() {
            advice.push("train adapters only (learner.lora.rank)".into());
        }
        let others = policy.critic.as_ref().into_iter().chain(policy.reference.as_ref().map(|r| &r.vlm));
        MemoryInputs {
            models: std::iter::once(&policy.vlm).chain(others).collect(),
            optimizer: &self.optimizer,
            ranks: &self.ranks,
            largest,
            recompute: settings.recompute,
            advice,
        }
        .plan()
    }
}
