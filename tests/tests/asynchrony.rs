//! Rollout beside training in real processes: two workers, one of them stopped for a while.

use std::time::Duration;

use unveil_testkit::{Lineage, Sandbox, events_of};

const SOON: Duration = Duration::from_secs(120);

#[test]
fn staleness_stays_bounded_while_a_worker_stands_still() {
    let s = Sandbox::new();
    let (config, run) = (s.micro_config(), s.path("run"));
    let config = config.to_string_lossy();
    let sets = [
        "rollout.max_staleness=2",
        "rollout.workers=2",
        "rollout.groups_per_lease=1",
        "rollout.lease_s=3",
        "rollout.temperature=4",
        "rollout.max_new_tokens=96",
        "learner.steps=12",
    ];
    let mut args = vec!["train", "--config", &config];
    args.extend(sets.iter().flat_map(|set| ["--set", *set]));
    let mut train = s.spawn(&args);
    train.until("an update", SOON, || (events_of(&run, "train").len() >= 2).then_some(()));
    let worker = s.role("rollout").expect("a rollout worker runs");
    worker.pause();
    std::thread::sleep(Duration::from_secs(5));
    worker.go_on();
    train.wait(SOON).ok();
    Lineage::read(&run).is_exactly_once(12, 2, 8);
    let updates = events_of(&run, "train");
    let lags: Vec<u64> = updates.iter().map(|e| e["staleness"].as_u64().expect("staleness")).collect();
    assert!(lags.iter().all(|lag| *lag <= 2), "{lags:?}");
    assert!(lags.iter().any(|lag| *lag > 0), "rollout never went on while the learner trained: {lags:?}");
    for e in &updates {
        assert!(e["agreement"].as_f64().is_none_or(|a| a <= 1e-5), "{e}");
    }
    assert_eq!(s.processes(), [], "every role ends with the run");
}
