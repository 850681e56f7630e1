//! What a worker tells of the leases that it has in hand, and how the images of large ones come.

use std::time::{Duration, Instant};

use unveil_proto::v1;
use unveil_service::CancellationToken;

use super::{Fake, answer, stage};
use crate::{fixture, run};

/// Progress of a lease in the last heartbeat.
fn progress(beats: &[v1::HeartbeatRequest], lease: &str) -> Option<u64> {
    beats.last()?.in_hand.iter().find(|h| h.lease == lease).map(|h| h.progress)
}

/// Waits for so many further heartbeats.
async fn more(fake: &Fake, beats: usize) {
    let at = fake.with(|s| s.beats.len()) + beats;
    while fake.with(|s| s.beats.len()) < at {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An engine that stands still: heartbeats go on and tell of no progress. What is lost meanwhile is not submitted afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stuck_engine_is_told_and_lost_groups_are_dropped() {
    let stage = stage().await;
    let mut long = answer(&[0, 1], 0);
    long.groups.iter_mut().for_each(|g| (g.n, g.max_new_tokens) = (4, 400));
    stage.fake.with(|s| {
        s.leases = [long].into();
        s.endless = true;
    });
    let (fake, mut options) = (stage.fake.clone(), stage.options());
    // Other waits are short: an answer that brings nothing is no progress.
    (options.wait, options.config.rollout.lease_s) = (Duration::from_millis(20), 0.15);
    fixture::STUCK.lock().unwrap().insert(stage.model.path().to_owned());
    let script = tokio::spawn(async move {
        let seen = || fake.with(|s| progress(&s.beats, "lease-0"));
        while seen().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        more(&fake, 4).await;
        let stands = seen().expect("it is in hand");
        more(&fake, 5).await;
        assert_eq!(seen(), Some(stands), "it stands still and lives");
        let beat = fake.with(|s| s.beats.last().cloned()).unwrap();
        assert!(beat.session != 0 && beat.done >= 1 && beat.in_hand.len() == 2, "{beat:?}");
        fake.with(|s| s.lost.push("lease-0".into()));
        more(&fake, 2).await;
        assert_eq!((seen(), fake.with(|s| progress(&s.beats, "lease-1"))), (None, Some(stands)));
        fixture::STUCK.lock().unwrap().clear();
        while fake.with(|s| s.submitted.is_empty()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        fake.with(|s| s.endless = false);
    });
    let ended = tokio::time::timeout(Duration::from_secs(120), run(options, CancellationToken::new())).await;
    let report = ended.unwrap().unwrap();
    script.await.unwrap();
    assert_eq!((report.accepted, report.refused), (1, 1));
    stage.fake.with(|s| assert_eq!(s.submitted.iter().map(|g| g.lease.as_str()).collect::<Vec<_>>(), ["lease-1"]));
}

/// While it goes on, every heartbeat tells of more; a group that waits for its scores tells of no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_grows_with_decode_steps() {
    let stage = stage().await;
    let mut long = answer(&[0], 0);
    long.groups.iter_mut().for_each(|g| (g.n, g.max_new_tokens) = (8, 1800));
    long.renew_ms = 60;
    stage.fake.with(|s| {
        s.leases = [long].into();
        s.endless = true;
    });
    let (stop, mut options) = (CancellationToken::new(), stage.options());
    options.config.rollout.lease_s = 0.06;
    let worker = tokio::spawn(run(options, stop.clone()));
    let told = || -> Vec<u64> {
        let beats = stage.fake.with(|s| std::mem::take(&mut s.beats));
        let of = |b: &v1::HeartbeatRequest| b.in_hand.first().map(|h| h.progress);
        beats.iter().filter_map(of).collect()
    };
    let (begun, mut all) = (Instant::now(), Vec::new());
    // What came before, weights among it, is in the first one: what is added meanwhile are decode steps.
    let grown = |all: &[u64]| all.last().zip(all.first()).map_or(0, |(last, first)| last.saturating_sub(*first));
    let on = || begun.elapsed() < Duration::from_secs(60) && stage.fake.with(|s| s.submitted.is_empty());
    while (all.len() < 6 || grown(&all) <= 20) && on() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        all.extend(told());
    }
    stop.cancel();
    worker.await.unwrap().unwrap();
    // A lease without decode steps would count its preparation, scoring and submission alone.
    assert!(all.is_sorted() && grown(&all) > 20, "{all:?}");
    let last = stage.fake.with(|s| s.beats.pop()).unwrap();
    assert!(last.in_hand.is_empty(), "the last one tells that nothing is in hand: {last:?}");
}

/// An image that has no room in a lease comes by a stream, also when that breaks off; a lease that is lost meanwhile is left out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_image_is_fetched() {
    let stage = stage().await;
    let mut large = answer(&[0, 1, 2], 0);
    let image = large.groups[0].image.to_vec();
    for g in &mut large.groups[..2] {
        g.image_bytes = g.image.len() as u64;
        g.image.clear();
    }
    let parts: Vec<Vec<u8>> = image.chunks(1000).map(<[u8]>::to_vec).collect();
    stage.fake.with(|s| {
        s.leases = [large].into();
        let calls = vec![parts[..2].to_vec(), vec![], parts];
        s.images.insert("lease-0".into(), calls.into());
    });
    let report = stage.run().await.unwrap();
    assert_eq!((report.accepted, report.refused), (2, 1), "{report:?}");
    // One that is not what was announced.
    let mut wrong = answer(&[0], 0);
    wrong.groups[0].image_bytes = 7;
    stage.fake.with(|s| {
        s.leases = [wrong].into();
        s.images.insert("lease-0".into(), vec![vec![vec![1; 5]]].into());
    });
    let text = stage.run().await.unwrap_err().to_string();
    assert!(text.contains("7 bytes") && text.contains("sent 5"), "{text}");
}
