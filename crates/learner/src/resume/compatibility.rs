//! Compatibility of a checkpoint with the current configuration. A run may be resumed in another directory or on
//! another machine, so a checkpoint contains the configuration that it was saved with.

use unveil_config::Config;

use crate::error::{LearnerError, Result};
use crate::stage::Progress;

/// Reports newer checkpoints that were skipped in favour of the one of `step`, and configuration keys that have changed
/// since.
pub(crate) fn report_changes(progress: &mut dyn Progress, step: u64, skipped: &[String], changed: &[String]) {
    for warning in skipped {
        progress.note(&format!("warning: {warning}; resuming from step {step}"));
    }
    for change in changed {
        progress.note(&format!("the run continues with {change}"));
    }
}

/// Returns the differences from the configuration `saved` in a checkpoint, all of which are allowed.
///
/// # Errors
/// Returns [`LearnerError::CheckpointState`] with both values of every key that has changed and must not.
pub(crate) fn allowed_changes(step: u64, saved: &[(String, String)], config: &Config) -> Result<Vec<String>> {
    let (allowed, refused): (Vec<_>, Vec<_>) =
        unveil_config::changes_since(saved, config).into_iter().partition(|c| c.allowed);
    if refused.is_empty() {
        let is_reported = |key: &str| !matches!(key, "run.resume" | "run.dir");
        return Ok(allowed.iter().filter(|c| is_reported(&c.key)).map(ToString::to_string).collect());
    }
    let difference = refused.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let what = format!(
        "it was saved with another configuration: {difference}. Restore it, choose another run.dir or checkpoint.url, or set run.resume = \"never\""
    );
    Err(LearnerError::CheckpointState { step, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowed_changes_are_reported_and_others_refused() {
        let before = Config::default();
        let saved = unveil_config::entries(&before);
        let mut now = before.clone();
        now.run.dir = "elsewhere".into();
        now.learner.steps = before.learner.steps + 7;
        let changes = allowed_changes(3, &saved, &now).unwrap();
        assert_eq!(changes, [format!("learner.steps = {}, was {}", now.learner.steps, before.learner.steps)]);
        now.rollout.n = before.rollout.n + 1;
        now.learner.groups = before.learner.groups + 1;
        let text = allowed_changes(3, &saved, &now).unwrap_err().to_string();
        for part in ["step 3", "rollout.n = ", "learner.groups = ", &format!("was {}", before.rollout.n), "never"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("learner.steps") && !text.contains("run.dir ="), "{text}");
    }
}
