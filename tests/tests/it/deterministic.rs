//! `run.deterministic`: a repeated run is the same bit for bit, whichever worker generates which group.

use std::time::Duration;

use serde_json::Value;
use unveil_testkit::{Lineage, Sandbox, events_of};

const SOON: Duration = Duration::from_secs(180);

/// Returns the reported updates, without times and worker names.
fn updates(s: &Sandbox) -> Vec<Value> {
    let mut all = events_of(&s.path("run"), "train");
    for event in &mut all {
        let fields = event.as_object_mut().expect("an object");
        fields.retain(|key, _| !key.ends_with("_ms") && !matches!(key.as_str(), "time" | "agreement_by_worker"));
    }
    all
}

fn weights(s: &Sandbox) -> Vec<u8> {
    std::fs::read(s.path("run/model/model.safetensors")).expect("the final model")
}

#[test]
fn deterministic_runs_repeat_bit_for_bit() {
    let run = |sets: &[&str]| {
        let s = Sandbox::new();
        let always =
            ["run.deterministic=true", "sft.steps=20", "rollout.max_staleness=0", "rollout.groups_per_lease=1"];
        s.start_micro("train", &[&always[..], sets].concat()).wait(SOON).ok();
        Lineage::read(&s.path("run")).assert_exactly_once(6, 2, 8);
        s
    };
    for sets in
        [&["rollout.workers=1"][..], &["rollout.workers=2", "learner.parallel.ranks=2", "learner.parallel.zero=3"]]
    {
        let one = run(sets);
        let two = run(sets);
        assert!(updates(&one).iter().all(|e| e["loss"]["loss"].is_f64()));
        assert_eq!(updates(&one), updates(&two), "{sets:?}");
        assert!(weights(&one) == weights(&two), "{sets:?}: the weights differ");
    }
}
