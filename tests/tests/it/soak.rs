//! A soak of ten faults over all roles of a run on an S3 server. `UNVEIL_SEED` chooses other faults; `make chaos` injects more.

use std::time::Duration;

use unveil_tests::chaos::{Plan, soak};

#[test]
fn ten_faults_lose_nothing() {
    let seed = std::env::var("UNVEIL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let plan = Plan { seed, faults: 10, max_duration: Duration::from_secs(4) };
    let verdict = soak(plan, &mut |line| println!("{line}"));
    assert!(verdict.ok, "{verdict:#?}");
}
