//! The plan of a run: memory of its roles, time of a step, and advice.

use serde::Serialize;

use crate::advice::advise;
use crate::error::PlanError;
use crate::roles::{Draft, PlanInput, RolePlan};
use crate::time::peak_rate;

/// Memory and time of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunPlan {
    /// Roles that hold a model.
    pub roles: Vec<RolePlan>,
    /// Seconds of a step: an update of stage 2 with its rollout, or of stage 1 if there is no stage 2.
    pub step_s: f64,
    /// Name of the part that takes the most time.
    pub bound_by: &'static str,
    /// Response tokens that are trained per second.
    pub tokens_per_s: f64,
    /// Useful FLOPs of a step as a share of the peak of all devices in this time.
    pub efficiency: f64,
    /// Ways to fit, or to be faster.
    pub advice: Vec<String>,
}

impl RunPlan {
    /// Returns whether every role fits.
    pub fn fits(&self) -> bool {
        self.roles.iter().all(|r| r.fits)
    }

    /// Describes what does not fit, with advice; `None` if everything fits.
    pub fn problem(&self) -> Option<String> {
        let lacking: Vec<String> = self
            .roles
            .iter()
            .filter(|r| !r.fits)
            .map(|r| format!("{} needs about {:.1} GiB and has {:.1} GiB", r.role, r.total_gib, r.capacity_gib))
            .collect();
        (!lacking.is_empty()).then(|| format!("{}. {}", lacking.join("; "), self.advice.join("; ")))
    }
}

/// Plans a run.
///
/// # Errors
/// Returns [`PlanError::TooFewGpus`] if processes of stage 2 would have to share GPUs and must not, and [`PlanError::NoGpus`] for a node
/// without GPUs.
pub fn plan(input: &PlanInput<'_>) -> Result<RunPlan, PlanError> {
    let draft = Draft::of(input)?;
    let advice = advise(input, &draft.roles, draft.assumed);
    let config = input.config;
    let time = &draft.time;
    let overlaps = config.learner.steps == 0 || config.rollout.max_staleness > 0;
    let step_s = time.step(overlaps).max(f64::MIN_POSITIVE);
    let peak = peak_rate(config, &input.device) * draft.devices as f64;
    Ok(RunPlan {
        step_s,
        bound_by: time.bound_by(),
        tokens_per_s: draft.tokens as f64 / step_s,
        efficiency: time.useful_flops / (step_s * peak),
        advice,
        roles: draft.roles,
    })
}
