//! Combinations that cannot work, and values out of range. One message per fault, all of them at once.

mod access;
mod answer;
mod collect;
mod endpoint;
mod learner;
mod listen;
mod messages;
mod parallel;
pub(crate) mod plain;
mod reward;

use crate::schema::{Config, DataKind, Optimizer};

/// Versions that rollout may lag at most: far more than the ratios of a clipped objective can correct for.
const MOST_STALE: u64 = 1000;
/// Longest time that a lease, a stall or a wait may be given, in seconds (three years).
const MOST_SECONDS: f64 = 1e8;

/// Every fault of a configuration; empty when it can run.
pub(crate) fn faults(c: &Config) -> Vec<String> {
    let mut out = Vec::new();
    let mut need = |ok: bool, what: String| {
        if !ok {
            out.push(what);
        }
    };
    need(!c.run.dir.is_empty(), "run.dir is empty: name a directory".into());
    need(
        matches!(c.run.resume.as_str(), "auto" | "never") || c.run.resume.parse::<u64>().is_ok(),
        format!("run.resume is `{}`: use auto, never, or a step number", c.run.resume),
    );
    need(
        matches!(c.run.device.as_str(), "auto" | "cpu" | "cuda")
            || c.run.device.strip_prefix("cuda:").is_some_and(|n| n.parse::<u32>().is_ok()),
        format!("run.device is `{}`: use auto, cpu, cuda or cuda:N", c.run.device),
    );
    match c.data.kind {
        DataKind::Synth => need(
            c.data.synth.size.is_multiple_of(16) && (48..=448).contains(&c.data.synth.size),
            format!("data.synth.size is {}: use a multiple of 16 from 48 to 448", c.data.synth.size),
        ),
        DataKind::Voc => {
            need(!c.data.root.is_empty(), "data.kind = \"voc\" needs data.root (--set data.root=DIR)".into());
            need(!c.data.class.is_empty(), "data.kind = \"voc\" needs data.class, the class to look for".into());
        }
        DataKind::Jsonl => {
            need(!c.data.root.is_empty(), "data.kind = \"jsonl\" needs data.root (--set data.root=FILE)".into());
        }
    }
    for (name, split) in [("val", &c.data.val_split), ("test", &c.data.test_split)] {
        need(
            *split != c.data.train_split,
            format!("data.{name}_split equals data.train_split (`{split}`): held-out images must not be trained on"),
        );
    }
    let a = &c.data.augment;
    need(
        a.crop_min > 0.0 && a.crop_min <= 1.0,
        format!("data.augment.crop_min is {}: use a fraction above 0 up to 1", a.crop_min),
    );
    need((0.0..1.0).contains(&a.jitter), format!("data.augment.jitter is {}: use 0 up to below 1", a.jitter));
    need(c.sft.batch > 0, "sft.batch is 0".into());
    need(c.rollout.n > 0, "rollout.n is 0: a group has at least one response".into());
    need(c.rollout.temperature > 0.0, "rollout.temperature must be above 0: a greedy policy cannot be improved".into());
    let (top_p, min_p) = (c.rollout.top_p, c.rollout.min_p);
    need(top_p > 0.0 && top_p <= 1.0, format!("rollout.top_p is {top_p}: use a share above 0 up to 1"));
    need((0.0..=1.0).contains(&min_p), format!("rollout.min_p is {min_p}: use a share from 0 to 1"));
    need(c.rollout.stop.iter().all(|s| !s.is_empty()), "rollout.stop holds an empty text".into());
    need(
        c.rollout.max_rows >= c.rollout.n,
        format!("rollout.max_rows ({}) must hold one group of rollout.n ({})", c.rollout.max_rows, c.rollout.n),
    );
    need(
        c.rollout.memory_gib >= 0.0 && c.rollout.memory_gib.is_finite(),
        format!("rollout.memory_gib is {}: use 0 (what is free) or more", c.rollout.memory_gib),
    );
    need(c.rollout.max_new_tokens > 0, "rollout.max_new_tokens is 0".into());
    need(c.rollout.groups_per_lease > 0, "rollout.groups_per_lease is 0".into());
    need(c.rollout.workers > 0, "rollout.workers is 0: stage 2 needs a rollout worker".into());
    let r = &c.rollout;
    for (key, seconds) in [("lease_s", r.lease_s), ("stall_s", r.stall_s), ("patience_s", r.patience_s)] {
        need(
            seconds > 0.0 && seconds <= MOST_SECONDS,
            format!("rollout.{key} is {seconds}: use a number of seconds above 0 up to {MOST_SECONDS}"),
        );
    }
    need(
        r.stall_s > c.reward.deadline_s,
        format!(
            "rollout.stall_s is {}: a group stands still while it is scored, so it must be above reward.deadline_s ({})",
            r.stall_s, c.reward.deadline_s
        ),
    );
    need(c.checkpoint.max_failures > 0, "checkpoint.max_failures is 0: a save that fails is one".into());
    let broadcast_s = c.rollout.broadcast_s;
    need((1.0..=600.0).contains(&broadcast_s), format!("rollout.broadcast_s is {broadcast_s}: use 1 to 600 seconds"));
    let (staleness, steps) = (c.rollout.max_staleness, c.learner.steps);
    need(
        staleness <= MOST_STALE,
        format!("rollout.max_staleness is {staleness}: use 0 (strictly on-policy) to {MOST_STALE}"),
    );
    need(
        steps == 0 || staleness <= steps,
        format!(
            "rollout.max_staleness is {staleness} and learner.steps {steps}: nothing can lag more updates than there are"
        ),
    );
    if c.run.deterministic {
        need(
            staleness == 0,
            format!(
                "run.deterministic needs rollout.max_staleness = 0 (now {staleness}): else it depends on time which weights make a token"
            ),
        );
        let (groups, lease) = (c.learner.groups, c.rollout.groups_per_lease);
        need(
            lease > 0 && groups.is_multiple_of(lease),
            format!("run.deterministic needs rollout.groups_per_lease ({lease}) to divide learner.groups ({groups})"),
        );
    }
    for (at, suite) in c.eval.suites.iter().enumerate() {
        need(!c.eval.suites[..at].contains(suite), format!("eval.suites names `{}` twice", suite.name()));
    }
    access::faults(c, &mut out);
    answer::faults(c, &mut out);
    plain::faults(c, &mut out);
    reward::faults(c, &mut out);
    collect::faults(c, &mut out);
    learner::faults(c, &mut out);
    parallel::faults(c, &mut out);
    listen::faults(c, &mut out);
    messages::faults(c, &mut out);
    optimizer("sft", &c.sft.optimizer, &mut out);
    optimizer("learner", &c.learner.optimizer, &mut out);
    out
}

fn optimizer(stage: &str, o: &Optimizer, out: &mut Vec<String>) {
    if !(o.lr > 0.0 && o.lr.is_finite()) {
        out.push(format!("{stage}.optimizer.lr is {}: use a number above 0", o.lr));
    }
    if !(0.0..=1.0).contains(&o.lr_end) {
        out.push(format!("{stage}.optimizer.lr_end is {}: it is a fraction of lr, 0 to 1", o.lr_end));
    }
    if !(0.0..=1.0).contains(&o.decay) {
        out.push(format!("{stage}.optimizer.decay is {}: it is a share of the steps, 0 to 1", o.decay));
    }
    if o.betas.iter().any(|b| !(0.0..1.0).contains(b)) {
        out.push(format!("{stage}.optimizer.betas is {:?}: each 0 up to below 1", o.betas));
    }
}

/// Durations that the clock can count.
fn seconds(s: f64) -> bool {
    s > 0.0 && s < 1e6
}
