//! Groups that no worker can generate: which are set aside and named, which are not, and that the run continues.

use proptest::prelude::*;
use unveil_core::GroupId;
use unveil_experience::{Event, Experience, ExperienceSnapshot, GroupOutcome, LeaseCall, ReturnReason, Verdict};

use crate::fixtures::{at, heartbeat, ids, learn, lease, run, settings, submit};

/// Runs until `steps` are trained while every worker that leases `poison` dies and is replaced under a new name. Returns the number of steps
/// and the dead workers.
fn train_with_poison(e: &mut Experience<()>, poison: &str, steps: u64) -> (u64, Vec<String>) {
    let mut step = 0;
    let mut now = 0;
    let mut workers = 0;
    let mut deaths = Vec::new();
    while step < steps {
        let name = format!("w#{workers}");
        assert!(workers < 200, "stuck: {:?}", e.stats());
        let got = lease(e, &name, 4, at(now));
        if got.iter().any(|l| l.group.record == poison) {
            deaths.push(name.clone());
            now += 10;
            workers += 1;
            e.expire(at(now));
            continue;
        }
        for l in got {
            assert_eq!(submit(e, &name, &l, at(now)), Verdict::Accepted);
        }
        learn(e, &mut step, at(now));
    }
    (step, deaths)
}

#[test]
fn records_that_kill_workers_are_set_aside_and_named() {
    let mut e = run(8, 4, 16);
    let (_, deaths) = train_with_poison(&mut e, "r3", 4);
    assert_eq!(deaths.len(), 3, "and not again in the second pass: {deaths:?}");
    assert!(e.is_finished() && lease(&mut e, "w", 4, at(0)).is_empty());
    let account = e.snapshot().accounting();
    // Dropped groups are replaced: four updates of four groups each.
    assert_eq!((account.trained, account.lost, account.twice, account.exactly_once), (16, 0, 0, false));
    assert!(account.dropped >= 2, "once a pass: {account:?}");
    assert!(account.set_aside.iter().all(|d| d.record == "r3" && d.why.contains("w#2")), "{:?}", account.set_aside);
    assert_eq!((e.stats().dropped, e.stats().trained), (account.dropped, 16));
    let dropped: Vec<Event> = e.drain_events().into_iter().filter(|e| matches!(e, Event::Dropped { .. })).collect();
    assert_eq!(dropped.len() as u64, account.dropped);
    assert!(
        matches!(&dropped[0], Event::Dropped { group, why, .. } if group.record == "r3" && why.contains("3 times"))
    );
}

#[test]
fn groups_are_never_set_aside_without_a_limit() {
    let mut e = Experience::<()>::new(settings(4, 0, Some(16)), ids(8)).unwrap();
    for workers in 0..50 {
        let name = format!("w#{workers}");
        assert_eq!(lease(&mut e, &name, 4, at(workers * 10)).len(), 4);
        e.worker_lost(&name, at(workers * 10));
    }
    assert_eq!((e.stats().dropped, e.stats().waiting), (0, 4));
}

#[test]
fn only_the_certain_cause_is_set_aside() {
    let mut e = run(8, 4, 8);
    for worker in ["a", "b"] {
        assert_eq!(lease(&mut e, worker, 4, at(0)).len(), 4);
        e.worker_lost(worker, at(0));
    }
    // Each of the four is suspect now: they are leased one by one, to workers without other groups.
    let first = lease(&mut e, "c", 4, at(0));
    assert_eq!(first.len(), 1);
    assert!(lease(&mut e, "c", 4, at(0)).is_empty(), "nothing in addition to it");
    let second = lease(&mut e, "d", 4, at(0));
    assert_eq!(second.len(), 1);
    e.worker_lost("c", at(0));
    assert_eq!(e.stats().dropped, 1, "it was the only group of the third worker");
    let poison = &first[0].group.record;
    let mut step = 0;
    submit(&mut e, "d", &second[0], at(0));
    for _ in 0..20 {
        for l in lease(&mut e, "e", 4, at(0)) {
            assert_ne!(&l.group.record, poison);
            submit(&mut e, "e", &l, at(0));
        }
        learn(&mut e, &mut step, at(0));
    }
    assert_eq!((step, e.stats().dropped), (2, 1), "{:?}", e.stats());
}

#[test]
fn reappearing_workers_clear_their_groups() {
    let mut e = run(2, 2, 4);
    for round in 0..10 {
        let now = round * 100;
        let got = lease(&mut e, "w", 2, at(now));
        assert_eq!(got.len(), 2, "round {round}: no group is suspect");
        assert_eq!(e.expire(at(now + 20)), 2);
        e.touch_worker("w", at(now + 21));
    }
    assert_eq!(e.stats().dropped, 0);
}

#[test]
fn failed_groups_are_set_aside_but_unscored_ones_are_not() {
    let mut e = run(4, 2, 4);
    let mut lost = String::new();
    for n in 0..3 {
        let got = lease(&mut e, "w", 2, at(0));
        lost.clone_from(&got[0].group.record);
        let leases = [got[0].id.clone()];
        assert_eq!(e.return_leases("w", &leases, ReturnReason::Failed, "its image is broken", at(0)), 1);
        assert_eq!(e.return_leases("w", &leases, ReturnReason::Failed, "its image is broken", at(0)), 0, "once");
        for l in &got[1..] {
            e.release("w", std::slice::from_ref(&l.id), at(0));
        }
        assert_eq!(e.stats().dropped, u64::from(n == 2));
    }
    let events = e.drain_events();
    let why = events.iter().find_map(|e| match e {
        Event::Dropped { group, why, .. } if group.record == lost => Some(why.clone()),
        _ => None,
    });
    assert!(why.is_some_and(|w| w.contains("image is broken")), "{events:?}");
    for _ in 0..50 {
        let got = lease(&mut e, "w", 2, at(0));
        let leases: Vec<String> = got.iter().map(|l| l.id.clone()).collect();
        assert_eq!(e.return_leases("w", &leases, ReturnReason::Unscored, "the reward service is away", at(0)), 2);
    }
    assert_eq!((e.stats().dropped, e.stats().unscored, e.stats().waiting), (1, 100, 2));
    let unscored =
        e.drain_events().into_iter().filter(|e| matches!(e, Event::Unscored { why, .. } if why.contains("away")));
    assert_eq!(unscored.count(), 100);
}

#[test]
fn restored_runs_retry_records_in_the_next_pass() {
    let mut e = run(4, 2, 8);
    let poison = lease(&mut e, "w0", 2, at(0))[0].group.clone();
    e.worker_lost("w0", at(0));
    for worker in ["w1", "w2"] {
        assert_eq!(lease(&mut e, worker, 1, at(0))[0].group, poison);
        e.worker_lost(worker, at(0));
    }
    assert_eq!(e.stats().dropped, 1);
    let saved: ExperienceSnapshot = serde_json::from_str(&serde_json::to_string(&e.snapshot()).unwrap()).unwrap();
    assert_eq!(saved.aside.len(), 1);
    let mut e = Experience::restore(settings(2, 0, Some(8)), ids(4), &saved).unwrap().with_max_losses(3);
    let mut step = 0;
    let mut seen = Vec::new();
    for _ in 0..20 {
        for l in lease(&mut e, "x", 2, at(0)) {
            seen.push(l.group.clone());
            submit(&mut e, "x", &l, at(0));
        }
        learn(&mut e, &mut step, at(0));
    }
    assert!(!seen.contains(&poison), "{seen:?}");
    assert!(seen.iter().any(|g| g.record == poison.record), "the record is tried again in the next pass");
    let account = e.snapshot().accounting();
    assert_eq!((step, account.trained, account.dropped, account.lost, account.twice), (4, 8, 1, 0, 0));
}

#[test]
fn every_record_can_be_set_aside() {
    let mut e = run(2, 1, 4);
    for n in 0..40 {
        let worker = format!("w{n}");
        if e.all_set_aside() {
            break;
        }
        lease(&mut e, &worker, 1, at(0));
        e.worker_lost(&worker, at(0));
    }
    assert!(e.all_set_aside());
    assert!(e.snapshot().accounting().trained == 0 && e.next_batch(at(0)).is_none());
}

#[test]
fn outcomes_of_an_update_are_counted_separately() {
    let mut e = run(6, 3, 6);
    for l in lease(&mut e, "w", 3, at(0)) {
        submit(&mut e, "w", &l, at(0));
    }
    let batch: Vec<GroupId> = e.next_batch(at(0)).unwrap().into_iter().map(|(g, ())| g).collect();
    let outcomes = [GroupOutcome::Trained, GroupOutcome::Masked, GroupOutcome::Skipped];
    let reported: Vec<_> = batch.iter().cloned().zip(outcomes).collect();
    assert!(e.record_outcomes(1, &reported[1..], at(0)).is_err());
    e.record_outcomes(1, &reported, at(0)).unwrap();
    let s = e.stats();
    let a = e.snapshot().accounting();
    assert_eq!((s.trained, s.wholly_masked, s.skipped, s.dropped), (1, 1, 1, 0));
    assert_eq!((a.trained, a.wholly_masked, a.skipped, a.lost, a.exactly_once), (1, 1, 1, 0, false));
    assert_eq!(e.snapshot().trained, 3, "the position advances");
}

#[test]
fn suspect_groups_wait_for_a_worker_without_leases() {
    let mut e = run(8, 2, 4);
    let ask = |worker, call, max| LeaseCall { worker, call, max };
    let first = e.lease(ask("a", 1, 1), at(0), |_| true).remove(0);
    e.worker_lost("a", at(0));
    // The second worker falls silent with it and reappears: it still holds the group.
    let second = e.lease(ask("b", 1, 1), at(0), |_| true).remove(0);
    assert_eq!(second.group, first.group);
    assert_eq!(e.expire(at(10)), 1);
    assert_eq!(e.candidates("c", 2), std::slice::from_ref(&first.group), "alone");
    e.touch_worker("b", at(10));
    assert_ne!(e.candidates("b", 1), std::slice::from_ref(&first.group), "it still holds the group");
    assert!(heartbeat(&mut e, "b", &second.id, 5, at(11)).is_empty());
    assert_eq!(e.leased_by("b"), 1, "it continues");
    assert_eq!(submit(&mut e, "b", &second, at(12)), Verdict::Accepted);
    // A later death does not count against a submitted group.
    e.worker_lost("b", at(13));
    assert_eq!((e.stats().dropped, e.stats().ready), (0, 1));
}

#[test]
fn leases_on_set_aside_groups_are_lost() {
    let mut e = run(8, 2, 4).with_max_losses(1);
    let old = e.lease(LeaseCall { worker: "old", call: 1, max: 1 }, at(0), |_| true).remove(0);
    assert_eq!(e.expire(at(70)), 1, "silent");
    assert_eq!(e.stats().dropped, 1, "one loss is enough");
    assert_eq!(heartbeat(&mut e, "old", &old.id, 3, at(70)), std::slice::from_ref(&old.id), "the lease is lost");
    assert_eq!(submit(&mut e, "old", &old, at(71)), Verdict::Expired);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    /// Some records kill every worker that leases them: all others are trained in order and once, and the run completes.
    #[test]
    fn only_poison_records_are_dropped(
        records in 2..14usize,
        groups_per_step in 1..5usize,
        steps in 1..8u64,
        max_staleness in 0..3u64,
        poisons in prop::collection::btree_set(0..14usize, 0..4),
        max in 1..6usize,
    ) {
        let poisons: Vec<String> = poisons.into_iter().filter(|p| *p < records).map(|p| format!("r{p}")).collect();
        prop_assume!(poisons.len() < records);
        let total = steps * groups_per_step as u64;
        let mut e = Experience::<()>::new(settings(groups_per_step, max_staleness, Some(total)), ids(records)).unwrap();
        e = e.with_max_losses(3);
        let mut step = 0u64;
        let mut workers = 0;
        let mut trained = Vec::new();
        while step < steps {
            prop_assert!(workers < 4000, "stuck: {:?}", e.stats());
            workers += 1;
            let name = format!("w{workers}");
            let got = lease(&mut e, &name, max, at(workers));
            if got.iter().any(|l| poisons.contains(&l.group.record)) {
                e.worker_lost(&name, at(workers));
                continue;
            }
            for l in got {
                prop_assert!(l.min_version <= e.version());
                prop_assert_eq!(submit(&mut e, &name, &l, at(workers)), Verdict::Accepted);
            }
            let s = e.stats();
            prop_assert!(s.waiting + s.leased + s.ready + s.training <= (max_staleness as usize + 1) * groups_per_step);
            while let Some(batch) = e.next_batch(at(workers)) {
                prop_assert_eq!(batch.len(), groups_per_step);
                let groups: Vec<GroupId> = batch.into_iter().map(|(g, ())| g).collect();
                step += 1;
                e.record_trained(step, &groups, at(workers)).unwrap();
                trained.extend(groups);
                if step < steps {
                    e.publish(step).unwrap();
                }
            }
        }
        prop_assert!(e.is_finished());
        prop_assert!(trained.iter().all(|g| !poisons.contains(&g.record)));
        prop_assert!(trained.windows(2).all(|w| (w[0].pass, w[0].position) < (w[1].pass, w[1].position)));
        let account = e.snapshot().accounting();
        prop_assert_eq!((account.trained, account.lost, account.twice), (total, 0, 0));
        prop_assert!(account.set_aside.iter().all(|d| poisons.contains(&d.record)));
    }
}
