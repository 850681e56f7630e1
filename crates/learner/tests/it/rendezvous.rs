//! A learner whose other ranks do not join: it waits until the deadline, names the missing ranks, and is never ready.

use std::time::{Duration, Instant};

use crate::common::small_run::SmallRun;
use serde_json::Value;
use unveil_learner::{Ready, SilentProgress, run_rl};
use unveil_service::CancellationToken;

#[test]
fn missing_ranks_are_named_at_the_deadline() {
    let mut small = SmallRun::new(3);
    small.config.learner.steps = 1;
    small.config.learner.parallel.ranks = 3;
    small.config.learner.parallel.join_s = 1.5;
    let model = small.model();
    let out = small.dir.path().join("rl-out");
    let mut silent = SilentProgress;
    let mut events: Vec<Value> = vec![];
    let stage = small.stage(&model, &out, &mut events, &mut silent, CancellationToken::new());
    let mut milestones = Vec::new();
    let started = Instant::now();
    let error = run_rl(stage, |ready| milestones.push(ready)).unwrap_err().to_string();
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(1500) && took < Duration::from_secs(20), "{took:?}");
    assert!(matches!(milestones[..], [Ready::Ranks(_)]), "others may join, and nothing is served: {milestones:?}");
    assert!(error.contains("ranks 1, 2 of 3 did not join"), "{error}");
}
