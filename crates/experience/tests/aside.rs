//! Groups that nobody can make and workers whose work cannot be used: what is set aside and named, what is not, and that the run
//! goes on.

use std::time::Duration;

use proptest::prelude::*;
use unveil_core::GroupId;
use unveil_experience::{
    Ask, Event, Experience, Fate, Heartbeat, InHand, Lease, Return, Settings, Snapshot, Submission, Verdict,
    VersionSpan,
};

fn settings(groups_per_step: usize, max_staleness: u64, total_groups: Option<u64>) -> Settings {
    Settings {
        groups_per_step,
        max_staleness,
        lease_s: 30.0,
        stall_s: 60.0,
        silence_s: 8.0,
        seed: 11,
        term: 1,
        total_groups,
    }
}

fn ids(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("r{i}")).collect()
}

fn run(records: usize, groups_per_step: usize, total: u64) -> Experience<()> {
    Experience::new(settings(groups_per_step, 0, Some(total)), ids(records)).unwrap().set_aside_after(3)
}

fn at(s: u64) -> Duration {
    Duration::from_secs(s)
}

/// A call without a number, with everything prepared.
fn lease(e: &mut Experience<()>, worker: &str, most: usize, now: Duration) -> Vec<Lease> {
    e.lease(Ask::new(worker, most), now, |_| true)
}

fn send(e: &mut Experience<()>, worker: &str, l: &Lease, now: Duration) -> Verdict {
    let versions = VersionSpan::at(e.version());
    e.submit(&Submission { worker, lease: &l.id, group: &l.group, versions }, (), now)
}

/// Trains the next batch, as whole as it is.
fn learn(e: &mut Experience<()>, step: &mut u64, now: Duration) -> Option<usize> {
    let batch = e.next_batch(now)?;
    let groups: Vec<GroupId> = batch.into_iter().map(|(g, ())| g).collect();
    *step += 1;
    e.trained(*step, &groups, now).unwrap();
    e.published(*step).unwrap();
    Some(groups.len())
}

/// Every worker that has `poison` in hand dies of it; each is started again under a new name.
fn with_a_poison(e: &mut Experience<()>, poison: &str, steps: u64) -> (u64, Vec<String>) {
    let (mut step, mut now, mut born, mut deaths) = (0, 0, 0, Vec::new());
    while step < steps {
        let name = format!("w#{born}");
        assert!(born < 200, "stuck: {:?}", e.stats());
        let got = lease(e, &name, 4, at(now));
        if got.iter().any(|l| l.group.record == poison) {
            deaths.push(name.clone());
            now += 10;
            born += 1;
            e.expire(at(now));
            continue;
        }
        for l in got {
            assert_eq!(send(e, &name, &l, at(now)), Verdict::Accepted);
        }
        learn(e, &mut step, at(now));
    }
    (step, deaths)
}

#[test]
fn a_record_that_kills_workers_is_set_aside_and_named_and_the_run_goes_on() {
    let mut e = run(8, 4, 16);
    let (_, deaths) = with_a_poison(&mut e, "r3", 4);
    assert_eq!(deaths.len(), 3, "and not again in the second pass: {deaths:?}");
    assert!(e.finished() && lease(&mut e, "w", 4, at(0)).is_empty());
    let account = e.snapshot().accounting();
    // What is dropped is made up for: four updates of four groups each.
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
fn without_a_limit_it_comes_again_for_ever() {
    let mut e = Experience::<()>::new(settings(4, 0, Some(16)), ids(8)).unwrap();
    for born in 0..50 {
        let name = format!("w#{born}");
        assert_eq!(lease(&mut e, &name, 4, at(born * 10)).len(), 4);
        e.worker_lost(&name, at(born * 10));
    }
    assert_eq!((e.stats().dropped, e.stats().waiting), (0, 4));
}

#[test]
fn what_only_lay_beside_it_is_not_blamed() {
    let mut e = run(8, 4, 8);
    for worker in ["a", "b"] {
        assert_eq!(lease(&mut e, worker, 4, at(0)).len(), 4);
        e.worker_lost(worker, at(0));
    }
    // Each of the four is under suspicion now: they go out one by one, to workers that have nothing else.
    let first = lease(&mut e, "c", 4, at(0));
    assert_eq!(first.len(), 1);
    assert!(lease(&mut e, "c", 4, at(0)).is_empty(), "nothing beside it");
    let second = lease(&mut e, "d", 4, at(0));
    assert_eq!(second.len(), 1);
    e.worker_lost("c", at(0));
    assert_eq!(e.stats().dropped, 1, "it was alone in the hands of the third");
    let poison = &first[0].group.record;
    let mut step = 0;
    send(&mut e, "d", &second[0], at(0));
    for _ in 0..20 {
        for l in lease(&mut e, "e", 4, at(0)) {
            assert_ne!(&l.group.record, poison);
            send(&mut e, "e", &l, at(0));
        }
        learn(&mut e, &mut step, at(0));
    }
    assert_eq!((step, e.stats().dropped), (2, 1), "{:?}", e.stats());
}

#[test]
fn a_worker_that_was_only_cut_off_speaks_its_groups_free() {
    let mut e = run(2, 2, 4);
    for round in 0..10 {
        let now = round * 100;
        let got = lease(&mut e, "w", 2, at(now));
        assert_eq!(got.len(), 2, "round {round}: no suspicion is left");
        assert_eq!(e.expire(at(now + 20)), 2);
        e.hear("w", at(now + 21));
    }
    assert_eq!(e.stats().dropped, 0);
}

#[test]
fn a_group_that_its_worker_cannot_make_is_set_aside_too_and_one_without_a_reward_never_is() {
    let mut e = run(4, 2, 4);
    let mut lost = String::new();
    for n in 0..3 {
        let got = lease(&mut e, "w", 2, at(0));
        lost.clone_from(&got[0].group.record);
        let leases = [got[0].id.clone()];
        assert_eq!(e.give_back_for("w", &leases, Return::Failed, "its image is broken", at(0)), 1);
        assert_eq!(e.give_back_for("w", &leases, Return::Failed, "its image is broken", at(0)), 0, "once");
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
        assert_eq!(e.give_back_for("w", &leases, Return::Unscored, "the reward service is away", at(0)), 2);
    }
    assert_eq!((e.stats().dropped, e.stats().unscored, e.stats().waiting), (1, 100, 2));
    let said =
        e.drain_events().into_iter().filter(|e| matches!(e, Event::Unscored { why, .. } if why.contains("away")));
    assert_eq!(said.count(), 100);
}

#[test]
fn a_worker_whose_work_cannot_be_used_is_quarantined_and_the_others_go_on() {
    let mut e = run(8, 2, 4);
    let reject = |e: &mut Experience<()>, worker: &str| {
        let l = lease(e, worker, 1, at(0)).remove(0);
        e.rejected(worker, &l.id, &l.group, "a log-probability is NaN", at(0))
    };
    assert_eq!((reject(&mut e, "bad"), reject(&mut e, "bad")), (None, None));
    // Good work in between sets the count back.
    let l = lease(&mut e, "bad", 1, at(0)).remove(0);
    assert_eq!(send(&mut e, "bad", &l, at(0)), Verdict::Accepted);
    assert_eq!((reject(&mut e, "bad"), reject(&mut e, "bad")), (None, None));
    let held = lease(&mut e, "bad", 1, at(0)).remove(0);
    let why = e.rejected("bad", &held.id, &held.group, "a log-probability is NaN", at(0)).unwrap();
    assert!(why.contains("3 submissions in a row") && why.contains("NaN"), "{why}");
    assert_eq!(e.quarantined("bad"), Some(why.as_str()));
    assert!(lease(&mut e, "bad", 1, at(0)).is_empty() && e.leased_by("bad") == 0);
    assert_eq!(e.stats().dropped, 0, "one worker alone makes no group bad");
    let mut step = 0;
    for l in lease(&mut e, "good", 2, at(0)) {
        assert_eq!(send(&mut e, "good", &l, at(0)), Verdict::Accepted);
    }
    assert_eq!(learn(&mut e, &mut step, at(0)), Some(2));
    let told = e.drain_events();
    assert_eq!(told.iter().filter(|e| matches!(e, Event::Rejected { worker, .. } if worker == "bad")).count(), 5);
    assert!(told.iter().any(|e| matches!(e, Event::Quarantined { worker, .. } if worker == "bad")));
    // A process of its name that was started again begins anew.
    e.worker_lost("bad", at(0));
    assert_eq!(e.quarantined("bad"), None);
}

#[test]
fn three_workers_that_cannot_make_the_same_group_make_it_bad() {
    let mut e = run(4, 1, 4);
    for worker in ["a", "b", "c"] {
        let l = lease(&mut e, worker, 1, at(0)).remove(0);
        assert_eq!(e.rejected(worker, &l.id, &l.group, "NaN", at(0)), None);
        assert_eq!(e.rejected(worker, &l.id, &l.group, "NaN", at(0)), None, "its lease holds no more");
    }
    assert_eq!(e.stats().dropped, 1);
}

#[test]
fn a_restart_keeps_what_is_set_aside_and_gives_records_another_chance_in_the_next_pass() {
    let mut e = run(4, 2, 8);
    let poison = lease(&mut e, "w0", 2, at(0))[0].group.clone();
    e.worker_lost("w0", at(0));
    for worker in ["w1", "w2"] {
        assert_eq!(lease(&mut e, worker, 1, at(0))[0].group, poison);
        e.worker_lost(worker, at(0));
    }
    assert_eq!(e.stats().dropped, 1);
    let saved: Snapshot = serde_json::from_str(&serde_json::to_string(&e.snapshot()).unwrap()).unwrap();
    assert_eq!(saved.aside.len(), 1);
    let mut e = Experience::restore(settings(2, 0, Some(8)), ids(4), &saved).unwrap().set_aside_after(3);
    let (mut step, mut seen) = (0, Vec::new());
    for _ in 0..20 {
        for l in lease(&mut e, "x", 2, at(0)) {
            seen.push(l.group.clone());
            send(&mut e, "x", &l, at(0));
        }
        learn(&mut e, &mut step, at(0));
    }
    assert!(!seen.contains(&poison), "{seen:?}");
    assert!(seen.iter().any(|g| g.record == poison.record), "in the next pass it is tried again");
    let account = e.snapshot().accounting();
    assert_eq!((step, account.trained, account.dropped, account.lost, account.twice), (4, 8, 1, 0, 0));
}

#[test]
fn where_every_record_is_set_aside_nothing_is_left() {
    let mut e = run(2, 1, 4);
    for n in 0..40 {
        let worker = format!("w{n}");
        if e.barren() {
            break;
        }
        lease(&mut e, &worker, 1, at(0));
        e.worker_lost(&worker, at(0));
    }
    assert!(e.barren());
    assert!(e.snapshot().accounting().trained == 0 && e.next_batch(at(0)).is_none());
}

#[test]
fn what_an_update_did_not_train_is_told_apart() {
    let mut e = run(6, 3, 6);
    for l in lease(&mut e, "w", 3, at(0)) {
        send(&mut e, "w", &l, at(0));
    }
    let batch: Vec<GroupId> = e.next_batch(at(0)).unwrap().into_iter().map(|(g, ())| g).collect();
    let fates = [Fate::Trained, Fate::Masked, Fate::Skipped];
    let told: Vec<_> = batch.iter().cloned().zip(fates).collect();
    assert!(e.settled(1, &told[1..], at(0)).is_err());
    e.settled(1, &told, at(0)).unwrap();
    let (s, a) = (e.stats(), e.snapshot().accounting());
    assert_eq!((s.trained, s.wholly_masked, s.skipped, s.dropped), (1, 1, 1, 0));
    assert_eq!((a.trained, a.wholly_masked, a.skipped, a.lost, a.exactly_once), (1, 1, 1, 0, false));
    assert_eq!(e.snapshot().trained, 3, "the position goes on");
}

/// A worker beats for one lease.
fn beat(e: &mut Experience<()>, worker: &str, lease: &str, progress: u64, now: Duration) -> Vec<String> {
    let in_hand = [InHand { lease: lease.to_owned(), progress }];
    e.heartbeat(&Heartbeat { worker, done: 0, in_hand: &in_hand }, now)
}

#[test]
fn a_heartbeat_renews_nothing_for_a_worker_that_is_quarantined() {
    let mut e = run(8, 2, 4);
    let ask = |call, max| Ask { worker: "bad", call, max };
    let kept = e.lease(ask(1, 1), at(0), |_| true).remove(0);
    // Its lease runs out while it stands still; it may still bring the group in.
    assert!(beat(&mut e, "bad", &kept.id, 0, at(25)).is_empty() && beat(&mut e, "bad", &kept.id, 0, at(50)).is_empty());
    for s in [55, 60, 65] {
        e.hear("bad", at(s));
    }
    assert_eq!(e.expire(at(65)), 1);
    for call in 2..5 {
        let l = e.lease(ask(call, 1), at(65), |_| true).remove(0);
        assert_ne!(l.group, kept.group, "not what it still has in hand");
        e.rejected("bad", &l.id, &l.group, "NaN", at(65));
    }
    assert!(e.quarantined("bad").is_some() && e.leased_by("bad") == 0);
    assert_eq!(beat(&mut e, "bad", &kept.id, 9, at(66)), std::slice::from_ref(&kept.id));
    assert_eq!(e.leased_by("bad"), 0);
    assert!(e.candidates("bad", 4).is_empty() && e.lease(ask(5, 4), at(66), |_| true).is_empty());
    assert_eq!(send(&mut e, "bad", &kept, at(66)), Verdict::Expired);
    assert_eq!(lease(&mut e, "good", 4, at(66)).len(), 2);
}

#[test]
fn a_group_under_suspicion_waits_for_a_worker_without_anything_in_hand() {
    let mut e = run(8, 2, 4);
    let ask = |worker, call, max| Ask { worker, call, max };
    let first = e.lease(ask("a", 1, 1), at(0), |_| true).remove(0);
    e.worker_lost("a", at(0));
    // The second worker falls silent with it, and is heard again: it still has the group in hand.
    let second = e.lease(ask("b", 1, 1), at(0), |_| true).remove(0);
    assert_eq!(second.group, first.group);
    assert_eq!(e.expire(at(10)), 1);
    assert_eq!(e.candidates("c", 2), std::slice::from_ref(&first.group), "alone");
    e.hear("b", at(10));
    assert_ne!(e.candidates("b", 1), std::slice::from_ref(&first.group), "it has it in hand");
    assert!(beat(&mut e, "b", &second.id, 5, at(11)).is_empty());
    assert_eq!(e.leased_by("b"), 1, "it goes on");
    assert_eq!(send(&mut e, "b", &second, at(12)), Verdict::Accepted);
    // A third that dies is not to blame for a group that is in.
    e.worker_lost("b", at(13));
    assert_eq!((e.stats().dropped, e.stats().ready), (0, 1));
}

#[test]
fn what_is_set_aside_is_lost_to_who_still_works_on_it() {
    let mut e = run(8, 2, 4).set_aside_after(1);
    let old = e.lease(Ask { worker: "old", call: 1, max: 1 }, at(0), |_| true).remove(0);
    assert_eq!(e.expire(at(70)), 1, "silent");
    assert_eq!(e.stats().dropped, 1, "one loss is enough");
    assert_eq!(beat(&mut e, "old", &old.id, 3, at(70)), std::slice::from_ref(&old.id), "what is set aside is lost");
    assert_eq!(send(&mut e, "old", &old, at(71)), Verdict::Expired);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    /// Some records kill each worker that holds them: all others are trained, in order and once, and the run comes to its end.
    #[test]
    fn only_poisons_are_dropped(
        records in 2..14usize,
        groups_per_step in 1..5usize,
        steps in 1..8u64,
        max_staleness in 0..3u64,
        poisons in prop::collection::btree_set(0..14usize, 0..4),
        most in 1..6usize,
    ) {
        let poisons: Vec<String> = poisons.into_iter().filter(|p| *p < records).map(|p| format!("r{p}")).collect();
        prop_assume!(poisons.len() < records);
        let total = steps * groups_per_step as u64;
        let mut e = Experience::<()>::new(settings(groups_per_step, max_staleness, Some(total)), ids(records)).unwrap();
        e = e.set_aside_after(3);
        let (mut step, mut born, mut trained) = (0u64, 0, Vec::new());
        while step < steps {
            prop_assert!(born < 4000, "stuck: {:?}", e.stats());
            born += 1;
            let name = format!("w{born}");
            let got = lease(&mut e, &name, most, at(born));
            if got.iter().any(|l| poisons.contains(&l.group.record)) {
                e.worker_lost(&name, at(born));
                continue;
            }
            for l in got {
                prop_assert!(l.min_version <= e.version());
                prop_assert_eq!(send(&mut e, &name, &l, at(born)), Verdict::Accepted);
            }
            let s = e.stats();
            prop_assert!(s.waiting + s.leased + s.ready + s.training <= (max_staleness as usize + 1) * groups_per_step);
            while let Some(batch) = e.next_batch(at(born)) {
                prop_assert_eq!(batch.len(), groups_per_step);
                let groups: Vec<GroupId> = batch.into_iter().map(|(g, ())| g).collect();
                step += 1;
                e.trained(step, &groups, at(born)).unwrap();
                trained.extend(groups);
                if step < steps {
                    e.published(step).unwrap();
                }
            }
        }
        prop_assert!(e.finished());
        prop_assert!(trained.iter().all(|g| !poisons.contains(&g.record)));
        prop_assert!(trained.windows(2).all(|w| (w[0].pass, w[0].position) < (w[1].pass, w[1].position)));
        let account = e.snapshot().accounting();
        prop_assert_eq!((account.trained, account.lost, account.twice), (total, 0, 0));
        prop_assert!(account.set_aside.iter().all(|d| poisons.contains(&d.record)));
    }
}
