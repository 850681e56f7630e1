//! Whether a run may go on from a checkpoint with the configuration of now, and what a person is told when it does. A run may go
//! on in another directory and on another machine, so the checkpoint says itself what it was made with.
//!
//! Must not know: tensors, stores.

use unveil_config::Config;

use crate::error::{LearnerError, Result};
use crate::stage::Progress;

/// Tells of newer checkpoints that had to be passed over for the one of `step`, and of keys that have changed since.
pub(crate) fn tell(progress: &mut dyn Progress, step: u64, passed: &[String], changed: &[String]) {
    for warning in passed {
        progress.note(&format!("warning: the checkpoint of {warning}; the run goes on from step {step}"));
    }
    for change in changed {
        progress.note(&format!("the run goes on with {change}"));
    }
}

/// What differs from the configuration `saved` of a checkpoint, and may.
///
/// # Errors
/// A key has changed that may not: all of them are named, with both values.
pub(crate) fn allowed(step: u64, saved: &[(String, String)], config: &Config) -> Result<Vec<String>> {
    let (allowed, refused): (Vec<_>, Vec<_>) =
        unveil_config::changes_since(saved, config).into_iter().partition(|c| c.allowed);
    if refused.is_empty() {
        let told = |key: &str| !matches!(key, "run.resume" | "run.dir");
        return Ok(allowed.iter().filter(|c| told(&c.key)).map(ToString::to_string).collect());
    }
    let difference = refused.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let what = format!(
        "it was made with another configuration: {difference}. Set it back, choose another run.dir or checkpoint.url, or give run.resume = \"never\""
    );
    Err(LearnerError::State { step, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_change_is_told_and_the_rest_is_refused() {
        let before = Config::default();
        let saved = unveil_config::entries(&before);
        let mut now = before.clone();
        (now.run.dir, now.learner.steps) = ("elsewhere".into(), before.learner.steps + 7);
        let told = allowed(3, &saved, &now).unwrap();
        assert_eq!(told, [format!("learner.steps = {}, was {}", now.learner.steps, before.learner.steps)]);
        (now.rollout.n, now.learner.groups) = (before.rollout.n + 1, before.learner.groups + 1);
        let text = allowed(3, &saved, &now).unwrap_err().to_string();
        for part in ["step 3", "rollout.n = ", "learner.groups = ", &format!("was {}", before.rollout.n), "never"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("learner.steps") && !text.contains("run.dir ="), "{text}");
    }
}
