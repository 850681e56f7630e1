//! Weight broadcasts in real processes: a complete run with two workers.

use std::time::Duration;

use unveil_testkit::{Lineage, Sandbox, events_of};

const SOON: Duration = Duration::from_secs(120);

#[test]
fn broadcast_runs_train_every_group_once() {
    let s = Sandbox::new();
    let run = s.path("run");
    let sets = ["rollout.weight_sync=broadcast", "rollout.workers=2", "rollout.groups_per_lease=1"];
    s.start_micro("train", &sets).wait(SOON).ok();
    Lineage::read(&run).assert_exactly_once(6, 2, 8);
    let sent = events_of(&run, "broadcast");
    assert!(sent.iter().any(|e| e["workers"] == 2), "no broadcast reached both workers: {sent:?}");
    for e in &events_of(&run, "train") {
        assert!(e["agreement"].as_f64().is_none_or(|a| a <= 1e-5), "{e}");
    }
    assert_eq!(s.processes(), [], "every role ends with the run");
}
