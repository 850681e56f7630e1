//! Heartbeats of a worker about its leases, and images fetched separately from leases.

use std::time::{Duration, Instant};

use unveil_proto::v1;
use unveil_service::CancellationToken;

use super::{Fake, answer, set_size, start_run};
use crate::{fixture, run};

/// Returns the progress of a lease in the last heartbeat.
fn progress(beats: &[v1::HeartbeatRequest], lease: &str) -> Option<u64> {
    beats.last()?.in_hand.iter().find(|h| h.lease == lease).map(|h| h.progress)
}

/// Waits for `count` further heartbeats.
async fn wait_for_heartbeats(fake: &Fake, count: usize) {
    let target = fake.with(|s| s.heartbeats.len()) + count;
    while fake.with(|s| s.heartbeats.len()) < target {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// With a stalled engine, heartbeats continue and report no progress. A lease lost in the meantime is not submitted afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_engine_shows_in_heartbeats() {
    let services = start_run().await;
    let mut long = answer(&[0, 1], 0);
    set_size(&mut long, 4, 400);
    services.fake.with(|s| {
        s.leases = [long].into();
        s.endless = true;
    });
    let fake = services.fake.clone();
    let mut options = services.options();
    // Lease calls and heartbeats are frequent, and empty answers are not progress.
    options.wait = Duration::from_millis(20);
    options.config.rollout.lease_s = 0.15;
    fixture::STALLED.lock().unwrap().insert(services.model.path().to_owned());
    let script = tokio::spawn(async move {
        let seen = || fake.with(|s| progress(&s.heartbeats, "lease-0"));
        while seen().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        wait_for_heartbeats(&fake, 4).await;
        let stalled_at = seen().expect("the lease is held");
        wait_for_heartbeats(&fake, 5).await;
        assert_eq!(seen(), Some(stalled_at), "heartbeats report no progress");
        let beat = fake.with(|s| s.heartbeats.last().cloned()).unwrap();
        assert!(beat.session != 0 && beat.done >= 1 && beat.in_hand.len() == 2, "{beat:?}");
        fake.with(|s| s.lost.push("lease-0".into()));
        wait_for_heartbeats(&fake, 2).await;
        assert_eq!((seen(), fake.with(|s| progress(&s.heartbeats, "lease-1"))), (None, Some(stalled_at)));
        fixture::STALLED.lock().unwrap().clear();
        while fake.with(|s| s.submitted.is_empty()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        fake.with(|s| s.endless = false);
    });
    let ended = tokio::time::timeout(Duration::from_secs(120), run(options, CancellationToken::new())).await;
    let report = ended.unwrap().unwrap();
    script.await.unwrap();
    assert_eq!((report.accepted, report.refused), (1, 1));
    services.fake.with(|s| assert_eq!(s.submitted.iter().map(|g| g.lease.as_str()).collect::<Vec<_>>(), ["lease-1"]));
}

/// During generation, heartbeats report growing progress.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_grows_with_decode_steps() {
    let services = start_run().await;
    let mut long = answer(&[0], 0);
    set_size(&mut long, 8, 1800);
    long.renew_ms = 60;
    services.fake.with(|s| {
        s.leases = [long].into();
        s.endless = true;
    });
    let stop = CancellationToken::new();
    let mut options = services.options();
    options.config.rollout.lease_s = 0.06;
    let worker = tokio::spawn(run(options, stop.clone()));
    let reported = || -> Vec<u64> {
        let beats = services.fake.with(|s| std::mem::take(&mut s.heartbeats));
        let first = |b: &v1::HeartbeatRequest| b.in_hand.first().map(|h| h.progress);
        beats.iter().filter_map(first).collect()
    };
    let begun = Instant::now();
    let mut all = Vec::new();
    // Earlier steps, such as received weights, are in the first value; the growth since then comes from decode steps.
    let grown = |all: &[u64]| all.last().zip(all.first()).map_or(0, |(last, first)| last.saturating_sub(*first));
    let on = || begun.elapsed() < Duration::from_secs(60) && services.fake.with(|s| s.submitted.is_empty());
    while (all.len() < 6 || grown(&all) <= 20) && on() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        all.extend(reported());
    }
    stop.cancel();
    worker.await.unwrap().unwrap();
    // Without decode steps, a lease would count only its preparation, scoring and submission.
    assert!(all.is_sorted() && grown(&all) > 20, "{all:?}");
    let last = services.fake.with(|s| s.heartbeats.pop()).unwrap();
    assert!(last.in_hand.is_empty(), "the last heartbeat lists no leases: {last:?}");
}

/// An image that does not fit into a lease is streamed, also after interruptions; a lease lost in the meantime is dropped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_images_are_fetched_by_stream() {
    let services = start_run().await;
    let mut large = answer(&[0, 1, 2], 0);
    let image = large.groups[0].image.to_vec();
    for g in &mut large.groups[..2] {
        g.image_bytes = g.image.len() as u64;
        g.image.clear();
    }
    let parts: Vec<Vec<u8>> = image.chunks(1000).map(<[u8]>::to_vec).collect();
    services.fake.with(|s| {
        s.leases = [large].into();
        let calls = vec![parts[..2].to_vec(), vec![], parts];
        s.images.insert("lease-0".into(), calls.into());
    });
    let report = services.run().await.unwrap();
    assert_eq!((report.accepted, report.refused), (2, 1), "{report:?}");
    // An image with another size than announced.
    let mut wrong = answer(&[0], 0);
    wrong.groups[0].image_bytes = 7;
    services.fake.with(|s| {
        s.leases = [wrong].into();
        s.images.insert("lease-0".into(), vec![vec![vec![1; 5]]].into());
    });
    let text = services.run().await.unwrap_err().to_string();
    assert!(text.contains("7 bytes") && text.contains("sent 5"), "{text}");
}
