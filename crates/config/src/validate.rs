//! Validation of values and their combinations. Reports all problems together, one message each.

mod access;
mod answer;
#[cfg(test)]
mod changed;
mod collect;
mod endpoint;
mod input;
mod learner;
mod listen;
mod message_size;
mod parallel;
pub(crate) mod plaintext;
mod reward;
mod sft;

use unveil_core::Compute;

use crate::schema::{Config, DataKind, Optimizer};

/// Upper bound of `rollout.max_staleness`, far beyond what the ratios of a clipped objective can correct.
const MAX_STALENESS: u64 = 1000;
/// Upper bound of the durations of leases, stalls and waits, in seconds (three years).
const MAX_SECONDS: f64 = 1e8;

/// Returns all problems of a configuration; empty if it is valid.
pub(crate) fn problems(c: &Config) -> Vec<String> {
    let mut out = Vec::new();
    let mut require = |ok: bool, message: String| {
        if !ok {
            out.push(message);
        }
    };
    require(!c.run.dir.is_empty(), "run.dir is empty: name a directory".into());
    require(
        matches!(c.run.resume.as_str(), "auto" | "never") || c.run.resume.parse::<u64>().is_ok(),
        format!("run.resume is `{}`: use auto, never, or a step number", c.run.resume),
    );
    require(
        matches!(c.run.device.as_str(), "auto" | "cpu" | "cuda")
            || c.run.device.strip_prefix("cuda:").is_some_and(|n| n.parse::<u32>().is_ok()),
        format!("run.device is `{}`: use auto, cpu, cuda or cuda:N", c.run.device),
    );
    require(
        c.run.compute != Compute::Tf32 || c.run.device != "cpu",
        "run.compute = \"tf32\" needs a GPU, but run.device is `cpu`: use exact or fast".into(),
    );
    match c.data.kind {
        DataKind::Synth => require(
            c.data.synth.size.is_multiple_of(16) && (48..=448).contains(&c.data.synth.size),
            format!("data.synth.size is {}: use a multiple of 16 from 48 to 448", c.data.synth.size),
        ),
        DataKind::Voc => {
            require(!c.data.root.is_empty(), "data.kind = \"voc\" needs data.root (--set data.root=DIR)".into());
            require(!c.data.class.is_empty(), "data.kind = \"voc\" needs data.class, the class to look for".into());
        }
        DataKind::Jsonl => {
            require(!c.data.root.is_empty(), "data.kind = \"jsonl\" needs data.root (--set data.root=FILE)".into());
        }
    }
    for (name, split) in [("val", &c.data.val_split), ("test", &c.data.test_split)] {
        require(
            *split != c.data.train_split,
            format!("data.{name}_split equals data.train_split (`{split}`): held-out images must not be trained on"),
        );
    }
    let a = &c.data.augment;
    require(
        a.crop_min > 0.0 && a.crop_min <= 1.0,
        format!("data.augment.crop_min is {}: use a fraction above 0 up to 1", a.crop_min),
    );
    require((0.0..1.0).contains(&a.jitter), format!("data.augment.jitter is {}: use 0 up to below 1", a.jitter));
    require(c.rollout.n > 0, "rollout.n is 0: a group has at least one response".into());
    require(
        c.rollout.temperature > 0.0,
        "rollout.temperature must be above 0: a greedy policy cannot be improved".into(),
    );
    let top_p = c.rollout.top_p;
    let min_p = c.rollout.min_p;
    require(top_p > 0.0 && top_p <= 1.0, format!("rollout.top_p is {top_p}: use a number above 0 up to 1"));
    require((0.0..=1.0).contains(&min_p), format!("rollout.min_p is {min_p}: use a number from 0 to 1"));
    require(c.rollout.stop.iter().all(|s| !s.is_empty()), "rollout.stop contains an empty string".into());
    require(
        !c.rollout.keep_cache || c.rollout.max_staleness > 0,
        "rollout.keep_cache has no effect with rollout.max_staleness = 0: weights never change during generation; remove one of them".into(),
    );
    require(
        c.rollout.max_rows >= c.rollout.n,
        format!("rollout.max_rows ({}) must hold one group of rollout.n ({})", c.rollout.max_rows, c.rollout.n),
    );
    require(
        c.rollout.memory_gib >= 0.0 && c.rollout.memory_gib.is_finite(),
        format!("rollout.memory_gib is {}: use 0 (all free memory) or more", c.rollout.memory_gib),
    );
    require(c.rollout.max_new_tokens > 0, "rollout.max_new_tokens is 0".into());
    require(c.rollout.groups_per_lease > 0, "rollout.groups_per_lease is 0".into());
    require(c.rollout.workers > 0, "rollout.workers is 0: stage 2 needs a rollout worker".into());
    let r = &c.rollout;
    for (key, seconds) in [("lease_s", r.lease_s), ("stall_s", r.stall_s), ("patience_s", r.patience_s)] {
        require(
            seconds > 0.0 && seconds <= MAX_SECONDS,
            format!("rollout.{key} is {seconds}: use a number of seconds above 0 up to {MAX_SECONDS}"),
        );
    }
    require(
        r.stall_s > c.reward.deadline_s,
        format!(
            "rollout.stall_s is {}: scoring counts as no progress, so it must be above reward.deadline_s ({})",
            r.stall_s, c.reward.deadline_s
        ),
    );
    require(
        c.checkpoint.max_failures > 0,
        "checkpoint.max_failures is 0: use 1 (stop at the first failed save) or more".into(),
    );
    let broadcast_s = c.rollout.broadcast_s;
    require(
        (1.0..=600.0).contains(&broadcast_s),
        format!("rollout.broadcast_s is {broadcast_s}: use 1 to 600 seconds"),
    );
    let staleness = c.rollout.max_staleness;
    let steps = c.learner.steps;
    require(
        staleness <= MAX_STALENESS,
        format!("rollout.max_staleness is {staleness}: use 0 (strictly on-policy) to {MAX_STALENESS}"),
    );
    require(
        steps == 0 || staleness <= steps,
        format!(
            "rollout.max_staleness is {staleness} and learner.steps {steps}: weights cannot be more updates old than there are"
        ),
    );
    if c.run.deterministic {
        require(
            staleness == 0,
            format!(
                "run.deterministic needs rollout.max_staleness = 0 (now {staleness}): otherwise timing decides which weights generate a token"
            ),
        );
        let groups = c.learner.groups;
        let lease = c.rollout.groups_per_lease;
        require(
            lease > 0 && groups.is_multiple_of(lease),
            format!("run.deterministic needs rollout.groups_per_lease ({lease}) to divide learner.groups ({groups})"),
        );
    }
    for (index, suite) in c.eval.suites.iter().enumerate() {
        require(!c.eval.suites[..index].contains(suite), format!("eval.suites lists `{}` twice", suite.name()));
    }
    access::check(c, &mut out);
    answer::check(c, &mut out);
    input::check(c, &mut out);
    plaintext::check(c, &mut out);
    reward::check(c, &mut out);
    collect::check(c, &mut out);
    learner::check(c, &mut out);
    parallel::check(c, &mut out);
    sft::check(c, &mut out);
    listen::check(c, &mut out);
    message_size::check(c, &mut out);
    check_optimizer("sft", &c.sft.optimizer, &mut out);
    for (i, phase) in c.sft.stage.iter().enumerate() {
        check_optimizer(&format!("sft.stage[{i}]"), &phase.optimizer, &mut out);
    }
    check_optimizer("learner", &c.learner.optimizer, &mut out);
    out
}

fn check_optimizer(stage: &str, o: &Optimizer, out: &mut Vec<String>) {
    if !(o.lr > 0.0 && o.lr.is_finite()) {
        out.push(format!("{stage}.optimizer.lr is {}: use a number above 0", o.lr));
    }
    if !(0.0..=1.0).contains(&o.lr_end) {
        out.push(format!("{stage}.optimizer.lr_end is {}: it is a fraction of lr, 0 to 1", o.lr_end));
    }
    if !(0.0..=1.0).contains(&o.decay) {
        out.push(format!("{stage}.optimizer.decay is {}: it is a fraction of the updates, 0 to 1", o.decay));
    }
    if o.betas.iter().any(|b| !(0.0..1.0).contains(b)) {
        out.push(format!("{stage}.optimizer.betas is {:?}: each 0 up to below 1", o.betas));
    }
    for (i, group) in o.groups.iter().enumerate() {
        if group.parameters.is_empty() || group.parameters.iter().any(String::is_empty) {
            out.push(format!(
                "{stage}.optimizer.groups, entry {i}: parameters must name some, each with a name or prefix"
            ));
        }
        if !(group.lr > 0.0 && group.lr.is_finite()) {
            out.push(format!(
                "{stage}.optimizer.groups, entry {i}: lr is {}: use a number above 0, or freeze the parameters",
                group.lr
            ));
        }
    }
}

/// Returns whether `s` is a positive number of seconds that a clock can represent.
fn is_duration(s: f64) -> bool {
    s > 0.0 && s < 1e6
}
