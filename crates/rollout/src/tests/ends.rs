//! A worker whose reward service or records fail, and one that is stopped: what is handed in, what goes back.

use std::time::{Duration, Instant};

use unveil_service::CancellationToken;

use super::{answer, stage};
use crate::run;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_reward_service_groups_are_masked() {
    let stage = stage().await;
    stage.fake.with(|s| s.leases = [answer(&[0, 1], 0)].into());
    let mut options = stage.options();
    options.config.reward.deadline_s = 0.3;
    options.reward = "http://127.0.0.1:9".into();
    let report = run(options.clone(), CancellationToken::new()).await.unwrap();
    assert_eq!(report.accepted, 2);
    stage.fake.with(|s| {
        for b in s.submitted.iter().flat_map(|g| &g.breakdowns) {
            assert_eq!(b.total, None);
            assert!(
                b.components.len() == 4
                    && b.components.values().all(|c| c.masked && c.value.is_none() && c.reason.contains("failed"))
            );
        }
    });
    options.reward = "nowhere".into();
    let text = run(options, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(text.contains("reward") && text.contains("nowhere"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_hands_leases_back_and_is_no_error() {
    let stage = stage().await;
    let mut slow = answer(&[0, 1], 0);
    slow.groups.iter_mut().for_each(|g| (g.n, g.max_new_tokens) = (8, 1800));
    stage.fake.with(|s| {
        s.leases = [slow].into();
        s.endless = true;
    });
    let stop = CancellationToken::new();
    let worker = tokio::spawn(run(stage.options(), stop.clone()));
    while stage.fake.with(|s| s.leased == 0) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    stop.cancel();
    let started = Instant::now();
    let report = worker.await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(4) && !report.finished && report.accepted == 0);
    stage.fake.with(|s| {
        s.released.sort();
        assert_eq!(s.released, ["lease-0", "lease-1"]);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_image_names_the_record_and_goes_back() {
    let stage = stage().await;
    let mut broken = answer(&[0], 0);
    broken.groups[0].image = vec![1, 2, 3].into();
    stage.fake.with(|s| s.leases = [broken].into());
    let text = stage.run().await.unwrap_err().to_string();
    assert!(text.contains("r0"), "{text}");
    stage.fake.with(|s| assert_eq!(s.released, ["lease-0"]));
}
