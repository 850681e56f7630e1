//! The best evaluated step, among those whose checkpoint may still be committed.

use std::collections::BTreeMap;

use crate::checkpoint_meta::BestCheckpoint;

/// Scores of evaluations and what became of their checkpoints.
#[derive(Debug, Default)]
pub(super) struct BestTracker {
    best: Option<BestCheckpoint>,
    /// Best evaluated step with a committed checkpoint.
    committed: Option<BestCheckpoint>,
    /// Scores of steps whose saves are pending.
    pending: BTreeMap<u64, f64>,
}

impl BestTracker {
    /// Continues from the best evaluation of a resumed run, if there is one.
    pub(super) fn new(best: Option<BestCheckpoint>) -> Self {
        Self { best, committed: best, pending: BTreeMap::new() }
    }

    /// Returns the best evaluation so far.
    pub(super) fn best(&self) -> Option<BestCheckpoint> {
        self.best
    }

    /// Records the score of an evaluation; returns whether it is the best so far. Scores that are not finite do not count.
    pub(super) fn record_score(&mut self, step: u64, score: f64) -> bool {
        if !score.is_finite() {
            return false;
        }
        self.pending.insert(step, score);
        let is_best = self.best.is_none_or(|b| score > b.score);
        if is_best {
            self.best = Some(BestCheckpoint { step, score });
        }
        is_best
    }

    /// Records that the checkpoint of a step is committed.
    pub(super) fn record_committed(&mut self, step: u64) {
        let score = self.pending.remove(&step);
        if let Some(score) = score.filter(|s| self.committed.is_none_or(|b| *s > b.score)) {
            self.committed = Some(BestCheckpoint { step, score });
        }
        let is_surpassed = |b: BestCheckpoint| self.committed.is_some_and(|committed| committed.score > b.score);
        if self.best.is_some_and(is_surpassed) {
            self.best = self.committed;
        }
    }

    /// Records that the save of a step failed: the best step is again the best one that has a checkpoint.
    pub(super) fn record_failed(&mut self, step: u64) {
        self.pending.remove(&step);
        if self.best.is_some_and(|b| b.step == step) {
            self.best = self.committed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn best_step(tracker: &BestTracker) -> Option<u64> {
        tracker.best().map(|b| b.step)
    }

    #[test]
    fn higher_scores_win_and_non_finite_ones_do_not_count() {
        let mut tracker = BestTracker::new(None);
        for (step, score, is_best) in
            [(1, f64::NAN, false), (2, 0.5, true), (3, 0.5, false), (4, f64::INFINITY, false), (5, 0.6, true)]
        {
            assert_eq!(tracker.record_score(step, score), is_best, "step {step}");
        }
        assert_eq!(best_step(&tracker), Some(5));
    }

    #[test]
    fn a_failed_save_restores_the_best_committed_step() {
        let resumed = BestCheckpoint { step: 3, score: 0.4 };
        let mut tracker = BestTracker::new(Some(resumed));
        assert!(tracker.record_score(4, 0.5) && tracker.record_score(5, 0.9));
        tracker.record_committed(4);
        tracker.record_failed(5);
        assert_eq!(tracker.best(), Some(BestCheckpoint { step: 4, score: 0.5 }));
        // The failure of a step that is not the best changes nothing.
        tracker.record_failed(6);
        assert_eq!(best_step(&tracker), Some(4));
        // Without a committed checkpoint of this process, the resumed one remains.
        let mut tracker = BestTracker::new(Some(resumed));
        assert!(tracker.record_score(4, 0.5));
        tracker.record_failed(4);
        assert_eq!(tracker.best(), Some(resumed));
    }

    #[test]
    fn a_late_commit_surpasses_a_lower_best() {
        let mut tracker = BestTracker::new(None);
        assert!(tracker.record_score(1, 0.5) && tracker.record_score(2, 0.9));
        // Step 2 fails before step 1 is committed: there is no best step until then.
        tracker.record_failed(2);
        assert_eq!(best_step(&tracker), None);
        assert!(tracker.record_score(3, 0.2));
        tracker.record_committed(1);
        assert_eq!(best_step(&tracker), Some(1));
    }
}
