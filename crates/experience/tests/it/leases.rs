//! Leases: late and silent workers, renewal by progress, and lost answers.

use std::time::Duration;

use unveil_experience::{Event, Experience, LeaseCall, Settings, Submission, Verdict, VersionSpan};

use crate::properties::Op;
use crate::simulation::{World, ids, settings};

#[test]
fn late_submission_is_accepted_unless_leased_again() {
    let mut w = World::new(4, 1, 0);
    w.lease(0, 1);
    w.now = Duration::from_secs(40);
    assert_eq!(w.machine.expire(w.now), 1);
    let (l, v) = w.held[0][0].clone();
    assert_eq!(w.send(0, &l, v), Verdict::Accepted);
    assert!(w.learn(1));

    w.held[0].clear();
    w.lease(0, 1);
    w.now = Duration::from_secs(80);
    assert_eq!(w.lease(1, 1), 1, "the lease has expired: another worker gets the group");
    let (l, v) = w.held[0][0].clone();
    assert_eq!(w.send(0, &l, v), Verdict::Expired);
    let (l, v) = w.held[1][0].clone();
    assert_eq!(w.send(1, &l, v), Verdict::Accepted);
    assert_eq!(w.send(1, &l, v), Verdict::Duplicate);
}

/// A worker that is silent for five seconds loses its groups, one that calls does not.
#[test]
fn silent_workers_lose_their_groups() {
    let s = Settings { silence_s: 5.0, ..settings(2, 0) };
    let mut e = Experience::new(s, ids(6)).unwrap();
    let at = |ms: u64| Duration::from_millis(3_600_000 + ms);
    let dead = e.lease(LeaseCall::new("dead", 1), at(0), |_| true).remove(0);
    let alive = e.lease(LeaseCall::new("alive", 1), at(0), |_| true).remove(0);
    for ms in (0..5_000).step_by(1_000) {
        e.touch_worker("alive", at(ms));
        assert_eq!(e.expire(at(ms)), 0);
    }
    assert_eq!((e.expire(at(4_999)), e.expire(at(5_000))), (0, 1), "five seconds after its last call");
    let silent = e.drain_events().into_iter().find(|e| matches!(e, Event::Expired { silent: true, .. }));
    assert!(matches!(silent, Some(Event::Expired { worker, .. }) if worker == "dead"));
    assert_eq!(e.leased_by("alive"), 1);
    // A clock that goes back changes nothing; one that jumps ahead expires the leases of all workers that do not call afterwards.
    e.touch_worker("alive", at(0));
    assert_eq!(e.expire(at(2_000)), 0);
    e.touch_worker("alive", at(1_000_000));
    assert_eq!(e.expire(at(1_000_000)), 1, "the lease itself has expired by then");
    // No other worker has the groups, so both are still accepted, once.
    for (lease, worker) in [(&dead, "dead"), (&alive, "alive")] {
        let s = Submission { worker, lease: &lease.id, group: &lease.group, versions: VersionSpan::at(0) };
        assert_eq!(e.submit(&s, (), at(1_000_000)), Verdict::Accepted);
        assert_eq!(e.submit(&s, (), at(1_000_000)), Verdict::Duplicate);
    }
    assert_eq!(e.next_batch(at(0)).map(|b| b.len()), Some(2));
}

/// Work takes three times as long as a lease, or heartbeats come later than its expiry, and the worker continues regardless.
#[test]
fn work_may_take_longer_than_a_lease() {
    for (every, expired) in [(10, false), (45, true)] {
        let mut w = World::new(10, 2, 0);
        for _ in 0..4 {
            assert_eq!(w.lease(0, 2), 2);
            for _ in 0..90 / every {
                w.now += Duration::from_secs(every);
                w.machine.touch_worker("w0", w.now);
                w.machine.expire(w.now);
                assert_eq!(w.lease(0, 2), 0, "it already has all of them");
                w.heartbeat(0, true);
            }
            for (l, v) in std::mem::take(&mut w.held[0]) {
                assert_eq!(w.send(0, &l, v), Verdict::Accepted);
            }
            assert!(w.learn(1));
        }
        assert_eq!(w.machine.stats().expired > 0, expired, "{:?}", w.machine.stats());
        let renewed = w.machine.drain_events().iter().filter(|e| matches!(e, Event::Renewed { .. })).count();
        assert_eq!(renewed > 0, expired);
    }
}

#[test]
fn stalled_groups_are_lost_despite_heartbeats() {
    let mut w = World::new(10, 2, 0);
    assert_eq!(w.lease(0, 2), 2);
    for _ in 0..5 {
        w.now += Duration::from_secs(10);
        w.heartbeat(0, false);
        assert_eq!(w.lease(1, 2), 0, "the first worker may just be slow");
    }
    w.now += Duration::from_secs(10);
    w.heartbeat(0, false);
    assert_eq!(w.lease(0, 2), 0, "it does not get the groups it still holds");
    assert_eq!(w.lease(1, 2), 2);
    let stalled =
        w.machine.drain_events().into_iter().filter(|e| matches!(e, Event::Expired { stalled: true, .. })).count();
    assert_eq!(stalled, 2);
    w.heartbeat(0, true);
    assert!(w.held[0].is_empty(), "the heartbeat reports them as lost");
    // Without another worker, they are renewed.
    let mut w = World::new(10, 2, 0);
    w.lease(0, 2);
    for progresses in [false, false, false, true] {
        w.now += Duration::from_secs(25);
        w.machine.expire(w.now);
        w.heartbeat(0, progresses);
        assert_eq!(w.machine.leased_by("w0"), if w.now.as_secs() == 75 { 0 } else { 2 });
    }
    assert_eq!((w.lease(1, 2), w.machine.leased_by("w0")), (0, 2));
}

#[test]
fn lost_answers_are_repeated_or_given_up() {
    let mut w = World::new(10, 3, 0);
    w.lose_answer(0, 3);
    let lost = w.calls[0].lost.clone().unwrap();
    assert_eq!(lost.len(), 2, "the groups at even positions");
    w.heartbeat(0, true);
    assert_eq!((w.machine.leased_by("w0"), w.lease(1, 3)), (2, 1), "the call may still be repeated");
    assert_eq!(w.lease(0, 3), 2);
    assert!(w.held[0].iter().map(|(l, _)| &l.id).eq(lost.iter().map(|l| &l.id)));
    w.apply(&Op::Release { worker: 0 });
    w.lose_answer(0, 3);
    w.apply(&Op::GiveUp { worker: 0 });
    assert_eq!(w.machine.leased_by("w0"), 2);
    w.heartbeat(0, true);
    assert_eq!((w.machine.leased_by("w0"), w.lease(1, 3)), (0, 2), "the heartbeat shows that it does not have them");
}
