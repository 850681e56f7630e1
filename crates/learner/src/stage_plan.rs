//! The plan of a stage: its name, its length, and when it evaluates and saves.

/// Differences between the stages that are values; what they do differently is
/// [`StageParts`](crate::stage_loop::StageParts).
#[derive(Debug, Clone, Copy)]
pub(crate) struct StagePlan {
    /// Name in events and in the metadata of checkpoints, `sft` or `rl`.
    pub name: &'static str,
    /// Prefix of the checkpoints below that of the run; empty for none.
    pub prefix: &'static str,
    /// Number of updates.
    pub total: u64,
    /// Updates between evaluations; 0 disables those before the last.
    pub eval_every: u64,
    /// Updates between checkpoints; 0 disables those before the last.
    pub checkpoint_every: u64,
    /// Whether the initial weights are evaluated, unless `eval_every` is 0.
    pub evaluates_start: bool,
    /// Whether the checkpoint with the best score is exported, instead of the last one. The evaluation after the last update then
    /// precedes its save, which depends on the score; otherwise it follows the save, which it thus cannot prevent.
    pub exports_best: bool,
    /// Whether the event of the start contains the term.
    pub logs_term: bool,
    /// Whether checkpoints contain a separate critic.
    pub critic: bool,
}

impl StagePlan {
    /// Returns whether what happens `every` updates is due after update `step`, before the next one.
    pub(crate) fn is_due(&self, every: u64, step: u64) -> bool {
        if step == self.total { self.exports_best } else { every > 0 && step.is_multiple_of(every) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_update_is_due_only_if_the_best_is_exported() {
        for exports_best in [false, true] {
            let plan = StagePlan {
                name: "sft",
                prefix: "",
                total: 6,
                eval_every: 0,
                checkpoint_every: 0,
                evaluates_start: false,
                exports_best,
                logs_term: false,
                critic: false,
            };
            let due = |every: u64| (1..=6).filter(|step| plan.is_due(every, *step)).collect::<Vec<u64>>();
            let last = if exports_best { vec![6] } else { vec![] };
            assert_eq!(due(0), last);
            assert_eq!(due(2), [vec![2, 4], last.clone()].concat());
            assert_eq!(due(4), [vec![4], last].concat());
        }
    }
}
