//! A learner that restarts at an older version than its workers hold: in any state, a worker continues from the learner's version.

use std::time::Duration;

use unveil_service::CancellationToken;

use super::fake::FakeState;
use super::{Damage, Fake, TestRun, answer, set_size, start_run, weights};
use crate::{WorkerReport, run};

/// Runs a worker with a learner in the state that `prepare` sets, concurrently with `script`, at whose end the run finishes.
async fn run_with_script<S>(
    prepare: impl FnOnce(&mut FakeState),
    script: impl FnOnce(Fake) -> S,
) -> (TestRun, WorkerReport)
where
    S: Future<Output = ()> + Send + 'static,
{
    let services = start_run().await;
    services.fake.with(|s| {
        prepare(s);
        s.endless = true;
    });
    let mut options = services.options();
    options.wait = Duration::from_millis(100);
    let fake = services.fake.clone();
    let played = script(fake.clone());
    let script = tokio::spawn(async move {
        played.await;
        fake.with(|s| s.endless = false);
    });
    let ended = tokio::time::timeout(Duration::from_secs(120), run(options, CancellationToken::new())).await.unwrap();
    let report = ended.expect("a worker with a newer version continues");
    script.await.unwrap();
    (services, report)
}

async fn until(fake: &Fake, condition: impl Fn(&mut FakeState) -> bool) {
    while !fake.with(|s| condition(s)) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Offers one lease after another until a group is submitted: groups leased before the worker notices the other learner are released.
/// `before` acts before each lease.
async fn lease_until_submitted(fake: &Fake, before: impl Fn(&mut FakeState)) {
    for k in 0.. {
        fake.with(|s| {
            before(s);
            s.leases.push_back(answer(&[k % 20], 8));
        });
        until(fake, |s| s.leases.is_empty() || !s.submitted.is_empty()).await;
        if fake.with(|s| !s.submitted.is_empty()) {
            break;
        }
    }
}

/// Waits until the worker has released the lease of the earlier learner, and lets it submit another group.
async fn release_then_submit(fake: &Fake) {
    until(fake, |s| s.released == ["lease-0"]).await;
    fake.with(|s| s.leases.push_back(answer(&[1], 8)));
    until(fake, |s| !s.submitted.is_empty()).await;
}

/// Checks that the only submitted group is `lease`, sampled by `version`.
fn assert_only(services: &TestRun, lease: &str, version: u64) {
    services.fake.with(|s| {
        let leases: Vec<&str> = s.submitted.iter().map(|g| g.lease.as_str()).collect();
        assert_eq!(leases, [lease]);
        let versions: Vec<u64> = s.submitted[0].responses.iter().flat_map(|r| r.versions.clone()).collect();
        assert!(versions.iter().all(|v| *v == version), "{versions:?}");
    });
}

/// The worker holds a lease that requires version 9, and the learner restarts at version 8 before it has sent version 9.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restart_while_waiting_for_the_version_of_a_lease() {
    let (services, report) = run_with_script(
        |s| {
            s.weights.0 = 8;
            s.leases = [answer(&[0], 9)].into();
        },
        |fake| async move {
            release_then_submit(&fake).await;
        },
    )
    .await;
    assert_eq!((report.accepted, report.finished), (1, true));
    assert_only(&services, "lease-1", 8);
}

/// The worker is two versions behind: the weights that arrive are newer than its own and older than the required ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restart_while_fetching_a_lost_version() {
    let (services, _) = run_with_script(
        |s| {
            s.weights.0 = 7;
            s.leases = [answer(&[0], 9)].into();
        },
        |fake| async move {
            until(&fake, |s| s.leased == 1).await;
            fake.with(|s| s.weights = (8, weights(2)));
            release_then_submit(&fake).await;
        },
    )
    .await;
    assert_only(&services, "lease-1", 8);
}

/// The learner repeatedly fails in the middle of a stream, and restarts at an older version.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restart_while_receiving_weights() {
    let (services, _) = run_with_script(
        |s| {
            s.weights.0 = 9;
            s.damage = [Some(Damage::Broken(4)); 6].into();
            s.leases = [answer(&[0], 8)].into();
        },
        |fake| async move {
            until(&fake, |s| s.weights_calls.len() == 3).await;
            fake.with(|s| s.weights = (8, weights(2)));
            until(&fake, |s| !s.submitted.is_empty()).await;
        },
    )
    .await;
    assert_only(&services, "lease-0", 8);
    assert_eq!(services.fake.with(|s| s.weights_calls.len()), 7);
}

/// The learner rejects the worker's weights more often in a row than damaged weights may be rejected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restart_noticed_at_a_lease_call() {
    let (services, report) = run_with_script(
        |s| {
            s.weights.0 = 9;
            s.foreign.0 = 5;
        },
        |fake| async move {
            until(&fake, |s| s.foreign.0 == 0).await;
            fake.with(|s| s.weights = (8, weights(2)));
            lease_until_submitted(&fake, |_| {}).await;
        },
    )
    .await;
    assert!(report.weights >= 6, "all tensors are fetched each time: {report:?}");
    assert!(services.fake.with(|s| s.weights_calls.iter().filter(|have| have.is_none()).count() >= 6));
}

/// Groups of the earlier learner are generated when the older weights arrive: they are not submitted, whether or not they required the
/// newer weights.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restart_during_generation() {
    for required in [9, 8] {
        restart_during_generation_of(required).await;
    }
}

async fn restart_during_generation_of(required: u64) {
    let mut long = answer(&[0], required);
    set_size(&mut long, 8, 600);
    let (services, _) = run_with_script(
        |s| {
            s.weights.0 = 9;
            s.leases = [long].into();
        },
        |fake| async move {
            until(&fake, |s| s.leased == 1).await;
            tokio::time::sleep(Duration::from_millis(40)).await;
            fake.with(|s| {
                assert!(s.submitted.is_empty(), "it is still generating");
                s.weights = (8, weights(2));
            });
            release_then_submit(&fake).await;
        },
    )
    .await;
    assert_only(&services, "lease-1", 8);
}

/// The restarted learner refuses a group of the earlier one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restart_noticed_at_submission() {
    let (_, report) = run_with_script(
        |s| {
            s.weights.0 = 9;
            s.foreign.1 = 4;
        },
        |fake| async move {
            lease_until_submitted(&fake, |s| {
                if s.foreign.1 == 0 {
                    s.weights = (8, weights(2));
                }
            })
            .await;
        },
    )
    .await;
    assert!(report.accepted >= 1 && report.refused >= 4, "{report:?}");
}
