//! Rollout beside training in real processes: two workers, one of them stopped for a while; one that comes later.

use std::time::{Duration, Instant};

use unveil_testkit::{Lineage, MetricsPage, Sandbox, events_of};

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

/// Prints how long the worker took from its start to its first lease, of which most is loading.
#[test]
fn a_worker_that_is_added_takes_leases_and_its_death_costs_nothing_else() {
    let s = Sandbox::new();
    let (config, run) = (s.micro_config(), s.path("run"));
    let config = config.to_string_lossy();
    let sets = ["learner.steps=24", "learner.groups=4", "rollout.groups_per_lease=1", "rollout.lease_s=3"];
    let mut args = vec!["train", "--config", &config];
    args.extend(sets.iter().flat_map(|set| ["--set", *set]));
    let mut train = s.spawn(&args);
    train.until("an update", SOON, || (!events_of(&run, "train").is_empty()).then_some(()));
    let first = s.role("rollout").expect("a rollout worker runs");
    let address = |key: &str| first.args.iter().find(|a| a.starts_with(key)).expect("the address of a service").clone();
    let (learner, reward) = (address("learner.address="), address("reward.address="));
    let mut args = vec!["rollout", "--worker", "added#1", "--config", &config];
    let sets = [&learner, &reward, "rollout.groups_per_lease=1", "rollout.metrics_listen=127.0.0.1:0"];
    args.extend(sets.iter().flat_map(|set| ["--set", *set]));
    let start = Instant::now();
    let mut added = s.spawn(&args);
    let page = loop {
        let said = added.stderr();
        let told = said.lines().find_map(|l| l.split_once("metrics at /metrics address=")?.1.parse().ok());
        if let Some(address) = told {
            break address;
        }
        assert!(added.is_running() && start.elapsed() < SOON, "{said}");
        std::thread::sleep(Duration::from_millis(5));
    };
    let leased = || MetricsPage::get(page).of("unveil_rollout_leases_total") > 0.0;
    added.until("a lease", SOON, || leased().then_some(()));
    eprintln!("a worker took a lease {:.2} s after its start", start.elapsed().as_secs_f64());
    let before = events_of(&run, "train").len();
    added.kill();
    train.wait(SOON).ok();
    assert!(before < 24, "the run went on while the worker was there");
    Lineage::read(&run).is_exactly_once(24, 4, 8);
    assert_eq!(s.processes(), [], "every role ends with the run");
}
