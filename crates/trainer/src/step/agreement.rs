//! The agreement of rollout and learner, and the passes that the learner's log-probabilities before an update come from.

use unveil_config::schema::{KlPlacement, RatioBase};

use crate::batch::TrainableGroup;
use crate::error::{Result, TrainerError};
use crate::update_report::{Agreement, UpdateReport, measure_agreement};

use super::PolicyTrainer;

impl PolicyTrainer {
    /// Returns whether the log-probabilities before the update enter neither advantages nor ratios, and the update has a single pass over
    /// each token: that pass then yields them, and they are compared with those of the rollout before the optimizer step.
    pub(super) fn training_passes_yield_logprobs(&self) -> bool {
        let s = &self.policy.settings;
        let single_pass = s.inner_epochs == 1 && s.minibatches <= 1;
        let without_penalty = s.objective.kl_coef == 0.0 || s.kl_in == KlPlacement::Loss;
        single_pass && s.ratio_to == RatioBase::Rollout && without_penalty && self.policy.value_head.is_none()
    }

    /// Compares the log-probabilities of the rollout with those before the update, flat over `groups`, and reports the agreement.
    ///
    /// # Errors
    /// Returns [`TrainerError::Agreement`] if they differ by more than the limit.
    pub(super) fn compare_with_rollout(
        &self,
        groups: &[&TrainableGroup<'_>],
        logprobs: &[f64],
        report: &mut UpdateReport,
    ) -> Result<()> {
        let agreement = measure_agreement(groups, logprobs, self.step);
        self.check_agreement(&agreement)?;
        report.set_agreement(&agreement);
        Ok(())
    }

    fn check_agreement(&self, agreement: &Agreement) -> Result<()> {
        let limit = self.policy.settings.agreement_limit;
        // Workers are checked one by one, so that the others cannot hide one that drifts.
        let mut above: Vec<(&String, f64)> =
            agreement.workers.iter().map(|(name, mean)| (name, *mean)).filter(|(_, mean)| *mean > limit).collect();
        above.sort_by(|a, b| b.1.total_cmp(&a.1));
        let Some(mean) = agreement.mean.filter(|mean| *mean > limit).or(above.first().map(|(_, mean)| *mean)) else {
            return Ok(());
        };
        let named: Vec<String> = above.iter().map(|(name, mean)| format!("worker `{name}` ({mean:.2e})")).collect();
        let workers = named.join(", ");
        Err(TrainerError::Agreement { step: self.step + 1, mean, limit, workers, worst: agreement.worst.join(", ") })
    }
}
