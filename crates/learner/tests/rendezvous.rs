//! A learner whose other ranks do not come: it waits for as long as it may, says who is missing, and is never ready.

mod common;
#[path = "common/stage.rs"]
mod stage;

use std::time::{Duration, Instant};

use serde_json::Value;
use stage::Small;
use unveil_learner::{Ready, Silent, run_rl};
use unveil_service::CancellationToken;

#[test]
fn who_is_missing_is_named_by_the_deadline() {
    let mut small = Small::new(3);
    small.config.learner.steps = 1;
    small.config.learner.parallel.ranks = 3;
    small.config.learner.parallel.join_s = 1.5;
    let (model, out, mut silent) = (small.model(), small.dir.path().join("rl-out"), Silent);
    let mut events: Vec<Value> = vec![];
    let stage = small.stage(&model, &out, &mut events, &mut silent, CancellationToken::new());
    let (mut told, started) = (Vec::new(), Instant::now());
    let error = run_rl(stage, |ready| told.push(ready)).unwrap_err().to_string();
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(1500) && took < Duration::from_secs(20), "{took:?}");
    assert!(matches!(told[..], [Ready::Ranks(_)]), "others may come, and nothing is served: {told:?}");
    assert!(error.contains("ranks 1, 2 of 3 did not come"), "{error}");
}
