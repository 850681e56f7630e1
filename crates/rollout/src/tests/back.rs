//! A learner that comes back at an older version than its workers have: whatever a worker is at, it starts over from what that
//! learner has, and never ends.

use std::time::Duration;

use unveil_service::CancellationToken;

use super::{Damage, Fake, Stage, answer, stage, weights};
use crate::{WorkerReport, run};

/// Runs a worker beside `script`, which ends the run.
async fn beside(stage: &Stage, script: impl Future<Output = ()> + Send + 'static) -> WorkerReport {
    stage.fake.with(|s| s.endless = true);
    let mut options = stage.options();
    options.wait = Duration::from_millis(100);
    let fake = stage.fake.clone();
    let script = tokio::spawn(async move {
        script.await;
        fake.with(|s| s.endless = false);
    });
    let ended = tokio::time::timeout(Duration::from_secs(120), run(options, CancellationToken::new())).await.unwrap();
    let report = ended.expect("a worker that knows a newer version does not end");
    script.await.unwrap();
    report
}

async fn until(fake: &Fake, what: impl Fn(&mut super::fake::State) -> bool) {
    while !fake.with(|s| what(s)) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Gives one lease after another until a group is submitted: what is leased before the worker hears of the other learner is handed
/// back. `before` acts before each lease.
async fn lease_until_one_counts(fake: &Fake, before: impl Fn(&mut super::fake::State)) {
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

/// The only group that counts is `lease`, made by `version`.
fn only(stage: &Stage, lease: &str, version: u64) {
    stage.fake.with(|s| {
        let leases: Vec<&str> = s.submitted.iter().map(|g| g.lease.as_str()).collect();
        assert_eq!(leases, [lease]);
        let versions: Vec<u64> = s.submitted[0].responses.iter().flat_map(|r| r.versions.clone()).collect();
        assert!(versions.iter().all(|v| *v == version), "{versions:?}");
    });
}

/// The worker has a lease that asks for version 9, and the learner is back with version 8 before it has sent version 9.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_weights_of_a_lease_are_waited_for() {
    let stage = stage().await;
    stage.fake.with(|s| {
        s.weights.0 = 8;
        s.leases = [answer(&[0], 9)].into();
    });
    let fake = stage.fake.clone();
    let report = beside(&stage, async move {
        until(&fake, |s| s.released == ["lease-0"]).await;
        fake.with(|s| s.leases.push_back(answer(&[1], 8)));
        until(&fake, |s| !s.submitted.is_empty()).await;
    })
    .await;
    assert_eq!((report.accepted, report.finished), (1, true));
    only(&stage, "lease-1", 8);
}

/// The same, with a worker that is two versions behind: what comes is newer than what it has, and older than what was asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_it_fetches_a_version_that_is_gone() {
    let stage = stage().await;
    stage.fake.with(|s| {
        s.weights.0 = 7;
        s.leases = [answer(&[0], 9)].into();
    });
    let fake = stage.fake.clone();
    beside(&stage, async move {
        until(&fake, |s| s.leased == 1).await;
        fake.with(|s| s.weights = (8, weights(2)));
        until(&fake, |s| s.released == ["lease-0"]).await;
        fake.with(|s| s.leases.push_back(answer(&[1], 8)));
        until(&fake, |s| !s.submitted.is_empty()).await;
    })
    .await;
    only(&stage, "lease-1", 8);
}

/// A learner that dies again and again in the middle of a stream, and comes back older.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_weights_arrive() {
    let stage = stage().await;
    stage.fake.with(|s| {
        s.weights.0 = 9;
        s.damage = [Some(Damage::Broken(4)); 6].into();
        s.leases = [answer(&[0], 8)].into();
    });
    let fake = stage.fake.clone();
    beside(&stage, async move {
        until(&fake, |s| s.weights_calls.len() == 3).await;
        fake.with(|s| s.weights = (8, weights(2)));
        until(&fake, |s| !s.submitted.is_empty()).await;
    })
    .await;
    only(&stage, "lease-0", 8);
    assert_eq!(stage.fake.with(|s| s.weights_calls.len()), 7);
}

/// The learner refuses what the worker has, more often in a row than damaged weights may be refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_it_asks_for_a_lease() {
    let stage = stage().await;
    stage.fake.with(|s| {
        s.weights.0 = 9;
        s.foreign.0 = 5;
    });
    let fake = stage.fake.clone();
    let report = beside(&stage, async move {
        until(&fake, |s| s.foreign.0 == 0).await;
        fake.with(|s| s.weights = (8, weights(2)));
        lease_until_one_counts(&fake, |_| {}).await;
    })
    .await;
    assert!(report.weights >= 6, "each time they are fetched whole: {report:?}");
    assert!(stage.fake.with(|s| s.weights_calls.iter().filter(|have| have.is_none()).count() >= 6));
}

/// Groups of the learner that is gone are under way when the older weights come: they are not submitted, whether they asked for the
/// newer weights or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_it_generates() {
    for asked in [9, 8] {
        it_generates(asked).await;
    }
}

async fn it_generates(asked: u64) {
    let stage = stage().await;
    let mut long = answer(&[0], asked);
    long.groups.iter_mut().for_each(|g| (g.n, g.max_new_tokens) = (8, 600));
    stage.fake.with(|s| {
        s.weights.0 = 9;
        s.leases = [long].into();
    });
    let fake = stage.fake.clone();
    beside(&stage, async move {
        until(&fake, |s| s.leased == 1).await;
        tokio::time::sleep(Duration::from_millis(40)).await;
        fake.with(|s| {
            assert!(s.submitted.is_empty(), "it generates yet");
            s.weights = (8, weights(2));
        });
        until(&fake, |s| s.released == ["lease-0"]).await;
        fake.with(|s| s.leases.push_back(answer(&[1], 8)));
        until(&fake, |s| !s.submitted.is_empty()).await;
    })
    .await;
    only(&stage, "lease-1", 8);
}

/// The learner that is back refuses a group that was made for the one before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_it_submits() {
    let stage = stage().await;
    stage.fake.with(|s| {
        s.weights.0 = 9;
        s.foreign.1 = 4;
    });
    let fake = stage.fake.clone();
    let report = beside(&stage, async move {
        lease_until_one_counts(&fake, |s| {
            if s.foreign.1 == 0 {
                s.weights = (8, weights(2));
            }
        })
        .await;
    })
    .await;
    assert!(report.accepted >= 1 && report.refused >= 4, "{report:?}");
}
