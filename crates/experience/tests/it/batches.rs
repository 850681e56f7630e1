//! Batches: staleness, publication, the end of a run, and restored snapshots.

use std::time::Duration;

use unveil_experience::{Event, Experience, LeaseCall, Settings, Submission, Verdict, VersionSpan};

use crate::simulation::{Payload, World, ids, settings};

#[test]
fn on_policy_leases_wait_for_publication() {
    let mut w = World::new(10, 4, 0);
    assert_eq!(w.lease(0, 100), 4);
    assert_eq!(w.lease(1, 100), 0);
    for (l, v) in std::mem::take(&mut w.held[0]) {
        assert_eq!(w.send(0, &l, v), Verdict::Accepted);
    }
    let batch = w.machine.next_batch(w.now).unwrap();
    assert_eq!(w.lease(0, 100), 0);
    let groups: Vec<_> = batch.into_iter().map(|(g, _)| g).collect();
    w.machine.record_trained(0, &groups, w.now).unwrap();
    assert_eq!(w.lease(0, 100), 0, "the old weights must not start the next batch");
    w.machine.publish(1).unwrap();
    assert_eq!(w.lease(0, 100), 4);
    assert!(w.machine.publish(0).is_err());
}

#[test]
fn stale_or_unknown_weights_return_the_group() {
    let mut w = World::new(10, 2, 0);
    w.machine.publish(5).unwrap();
    w.lease(0, 2);
    let held = w.held[0].clone();
    assert_eq!(held[0].0.min_version, 5);
    assert_eq!(w.send(0, &held[0].0, 4), Verdict::Stale);
    let again = w.machine.lease(LeaseCall::new("w1", 5), w.now, |_| true);
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].group, held[0].0.group);
    let s = Submission { worker: "w0", lease: &held[1].0.id, group: &held[1].0.group, versions: VersionSpan::at(6) };
    let payload = Payload { group: held[1].0.group.clone(), oldest: 6, flat: false };
    assert_eq!(w.machine.submit(&s, payload, w.now), Verdict::Stale, "weights of an abandoned lineage");
}

#[test]
fn next_batch_is_leased_during_training() {
    let mut w = World::new(10, 2, 1);
    assert_eq!(w.lease(0, 100), 4);
    let mins: Vec<u64> = w.held[0].iter().map(|(l, _)| l.min_version).collect();
    assert_eq!(mins, [0, 0, 0, 0]);
    for (l, v) in std::mem::take(&mut w.held[0]) {
        assert_eq!(w.send(0, &l, v), Verdict::Accepted);
    }
    assert!(w.learn(1));
    assert_eq!(w.lease(0, 100), 2);
    assert_eq!(w.held[0][0].0.min_version, 1);
    assert!(w.learn(1), "one version behind is allowed");
}

/// Groups of a worker that is much slower than the others are never trained when too stale; after its lease expires another worker
/// generates the group with newer weights.
#[test]
fn slow_workers_cannot_exceed_the_staleness_bound() {
    let mut w = World::new(12, 2, 2);
    assert_eq!(w.lease(3, 1), 1, "group 0 goes to the slow one");
    for round in 0..40u64 {
        w.now += Duration::from_secs(9);
        w.lease(0, 100);
        for (l, v) in std::mem::take(&mut w.held[0]) {
            w.send(0, &l, v);
        }
        while w.learn(1) {}
        if round % 7 == 6 {
            // Late, or under a lease that another worker has by now: never counted twice.
            let before = w.machine.stats();
            for (l, v) in std::mem::take(&mut w.held[3]) {
                w.send(3, &l, v);
            }
            assert!(w.machine.stats().ready <= before.ready + 1);
            w.lease(3, 1);
        }
    }
    let s = w.machine.stats();
    assert!(s.trained >= 40 && s.expired > 0 && s.duplicates + s.refused > 0, "{s:?}");
    w.check();
}

#[test]
fn stale_groups_are_counted_and_leased_again_first() {
    let mut w = World::new(10, 2, 1);
    assert_eq!(w.lease(0, 100), 4);
    for (l, v) in std::mem::take(&mut w.held[0]) {
        assert_eq!(w.send(0, &l, v), Verdict::Accepted);
    }
    assert!(w.learn(3), "versions 1 and 2 are skipped");
    assert!(!w.learn(1), "version 0 lags three behind");
    assert_eq!((w.machine.stats().stale, w.machine.stats().waiting), (2, 2));
    assert_eq!(w.lease(1, 2), 2);
    let positions: Vec<u64> = w.held[1].iter().map(|(l, _)| l.group.position).collect();
    assert_eq!((positions, w.held[1][0].0.min_version), (vec![2, 3], 2));
    let stale =
        w.machine.drain_events().into_iter().filter(|e| matches!(e, Event::Stale { oldest: 0, version: 3, .. }));
    assert_eq!(stale.count(), 2);
}

#[test]
fn last_batch_of_a_run_may_be_smaller() {
    let s = Settings { total_groups: Some(5), ..settings(3, 0) };
    let mut e = Experience::new(s, ids(4)).unwrap();
    let mut sizes = vec![];
    for step in 0..4 {
        for l in e.lease(LeaseCall::new("w", 10), Duration::ZERO, |_| true) {
            let versions = VersionSpan::at(e.version());
            let s = Submission { worker: "w", lease: &l.id, group: &l.group, versions };
            assert_eq!(e.submit(&s, (), Duration::ZERO), Verdict::Accepted);
        }
        let Some(batch) = e.next_batch(Duration::ZERO) else {
            break;
        };
        let groups: Vec<_> = batch.into_iter().map(|(g, ())| g).collect();
        sizes.push(groups.len());
        e.record_trained(step, &groups, Duration::ZERO).unwrap();
        e.publish(step + 1).unwrap();
    }
    assert_eq!(sizes, [3, 2]);
    assert!(e.is_finished());
    assert!(e.lease(LeaseCall::new("w", 10), Duration::ZERO, |_| true).is_empty());
}

#[test]
fn other_data_sets_or_seeds_are_refused() {
    let e = Experience::<()>::new(settings(2, 0), ids(6)).unwrap();
    let snap = e.snapshot();
    let error = |s: Settings, i| Experience::<()>::restore(s, i, &snap).unwrap_err().to_string();
    assert!(error(settings(2, 0), ids(7)).contains("6 records, now 7"));
    let mut swapped = ids(6);
    swapped.swap(0, 1);
    assert!(error(settings(2, 0), swapped).contains("data set"));
    assert!(error(Settings { seed: 12, ..settings(2, 0) }, ids(6)).contains("seed (11, now 12)"));
    assert!(Experience::<()>::restore(settings(5, 2), ids(6), &snap).is_ok(), "the batch size may change");
    assert!(Experience::<()>::new(settings(2, 0), vec!["a".into(), "a".into()]).is_err());
    assert!(Experience::<()>::new(settings(2, 0), vec![]).is_err());
    assert!(Experience::<()>::new(settings(0, 0), ids(2)).is_err());
}
