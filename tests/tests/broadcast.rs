//! Weights by broadcast in real processes: a whole run of two workers.

use std::time::Duration;

use unveil_testkit::{Lineage, Sandbox, events_of};

const SOON: Duration = Duration::from_secs(120);

#[test]
fn a_run_whose_weights_are_broadcast_trains_every_group_once() {
    let s = Sandbox::new();
    let (config, run) = (s.micro_config(), s.path("run"));
    let config = config.to_string_lossy();
    let sets = ["rollout.weight_sync=broadcast", "rollout.workers=2", "rollout.groups_per_lease=1"];
    let mut args = vec!["train", "--config", &config];
    args.extend(sets.iter().flat_map(|set| ["--set", *set]));
    s.spawn(&args).wait(SOON).ok();
    Lineage::read(&run).is_exactly_once(6, 2, 8);
    let sent = events_of(&run, "broadcast");
    assert!(sent.iter().any(|e| e["workers"] == 2), "no broadcast reached both workers: {sent:?}");
    for e in &events_of(&run, "train") {
        assert!(e["agreement"].as_f64().is_none_or(|a| a <= 1e-5), "{e}");
    }
    assert_eq!(s.processes(), [], "every role ends with the run");
}
