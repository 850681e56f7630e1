//! Rollout in parallel with training in real processes: a worker that is paused, and one that joins later.

use std::time::{Duration, Instant};

use unveil_testkit::{Lineage, MetricsPage, Sandbox, events_of, run_args};

const SOON: Duration = Duration::from_secs(120);

#[test]
fn staleness_stays_bounded_while_a_worker_is_paused() {
    let s = Sandbox::new();
    let run = s.path("run");
    let sets = [
        "rollout.max_staleness=2",
        "rollout.workers=2",
        "rollout.groups_per_lease=1",
        "rollout.lease_s=3",
        "rollout.temperature=4",
        "rollout.max_new_tokens=96",
        "learner.steps=12",
    ];
    let mut train = s.start_micro("train", &sets);
    train.until("an update", SOON, || (events_of(&run, "train").len() >= 2).then_some(()));
    let worker = s.find_role("rollout").expect("a rollout worker runs");
    worker.pause();
    std::thread::sleep(Duration::from_secs(5));
    worker.resume();
    train.wait(SOON).ok();
    Lineage::read(&run).assert_exactly_once(12, 2, 8);
    let updates = events_of(&run, "train");
    let lags: Vec<u64> = updates.iter().map(|e| e["staleness"].as_u64().expect("staleness")).collect();
    assert!(lags.iter().all(|lag| *lag <= 2), "{lags:?}");
    assert!(lags.iter().any(|lag| *lag > 0), "rollout never ran while the learner trained: {lags:?}");
    for e in &updates {
        assert!(e["agreement"].as_f64().is_none_or(|a| a <= 1e-5), "{e}");
    }
    assert_eq!(s.processes(), [], "every role ends with the run");
}

/// Prints the time from the start of the worker to its first lease, which is mostly loading.
#[test]
fn added_workers_take_leases_and_may_die() {
    let s = Sandbox::new();
    let run = s.path("run");
    let sets = ["learner.steps=24", "learner.groups=4", "rollout.groups_per_lease=1", "rollout.lease_s=3"];
    let mut train = s.start_micro("train", &sets);
    train.until("an update", SOON, || (!events_of(&run, "train").is_empty()).then_some(()));
    let first = s.find_role("rollout").expect("a rollout worker runs");
    let address = |key: &str| first.args.iter().find(|a| a.starts_with(key)).expect("the address of a service").clone();
    let learner = address("learner.address=");
    let reward = address("reward.address=");
    let config = s.micro_config();
    let sets = [&learner, &reward, "rollout.groups_per_lease=1", "rollout.metrics_listen=127.0.0.1:0"];
    let mut args = run_args("rollout", &config, &sets);
    args.extend(["--worker", "added#1"]);
    let start = Instant::now();
    let mut added = s.spawn(&args);
    let page = loop {
        let log = added.stderr();
        let logged = log.lines().find_map(|l| l.split_once("metrics at /metrics address=")?.1.parse().ok());
        if let Some(address) = logged {
            break address;
        }
        assert!(added.is_running() && start.elapsed() < SOON, "{log}");
        std::thread::sleep(Duration::from_millis(5));
    };
    let leased = || MetricsPage::get(page).expect_value("unveil_rollout_leases_total") > 0.0;
    added.until("a lease", SOON, || leased().then_some(()));
    eprintln!("a worker took a lease {:.2} s after its start", start.elapsed().as_secs_f64());
    let before = events_of(&run, "train").len();
    added.kill();
    train.wait(SOON).ok();
    assert!(before < 24, "the run continued while the worker was there");
    Lineage::read(&run).assert_exactly_once(24, 4, 8);
    assert_eq!(s.processes(), [], "every role ends with the run");
}
