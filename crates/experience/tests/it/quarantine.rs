//! Workers whose submissions are rejected.

use unveil_experience::{Event, Experience, LeaseCall, Verdict};

use crate::fixtures::{at, heartbeat, learn, lease, run, submit};

#[test]
fn three_rejections_in_a_row_quarantine_a_worker() {
    let mut e = run(8, 2, 4);
    let reject = |e: &mut Experience<()>, worker: &str| {
        let l = lease(e, worker, 1, at(0)).remove(0);
        e.reject(worker, &l.id, &l.group, "a log-probability is NaN", at(0))
    };
    assert_eq!((reject(&mut e, "bad"), reject(&mut e, "bad")), (None, None));
    // An accepted submission in between resets the count.
    let l = lease(&mut e, "bad", 1, at(0)).remove(0);
    assert_eq!(submit(&mut e, "bad", &l, at(0)), Verdict::Accepted);
    assert_eq!((reject(&mut e, "bad"), reject(&mut e, "bad")), (None, None));
    let held = lease(&mut e, "bad", 1, at(0)).remove(0);
    let why = e.reject("bad", &held.id, &held.group, "a log-probability is NaN", at(0)).unwrap();
    assert!(why.contains("3 submissions in a row") && why.contains("NaN"), "{why}");
    assert_eq!(e.quarantine_reason("bad"), Some(why.as_str()));
    assert!(lease(&mut e, "bad", 1, at(0)).is_empty() && e.leased_by("bad") == 0);
    assert_eq!(e.stats().dropped, 0, "a single worker cannot set a group aside");
    let mut step = 0;
    for l in lease(&mut e, "good", 2, at(0)) {
        assert_eq!(submit(&mut e, "good", &l, at(0)), Verdict::Accepted);
    }
    assert_eq!(learn(&mut e, &mut step, at(0)), Some(2));
    let events = e.drain_events();
    assert_eq!(events.iter().filter(|e| matches!(e, Event::Rejected { worker, .. } if worker == "bad")).count(), 5);
    assert!(events.iter().any(|e| matches!(e, Event::Quarantined { worker, .. } if worker == "bad")));
    // A restarted process of the same name starts without rejections.
    e.worker_lost("bad", at(0));
    assert_eq!(e.quarantine_reason("bad"), None);
}

#[test]
fn rejections_by_three_workers_set_a_group_aside() {
    let mut e = run(4, 1, 4);
    for worker in ["a", "b", "c"] {
        let l = lease(&mut e, worker, 1, at(0)).remove(0);
        assert_eq!(e.reject(worker, &l.id, &l.group, "NaN", at(0)), None);
        assert_eq!(e.reject(worker, &l.id, &l.group, "NaN", at(0)), None, "its lease is no longer valid");
    }
    assert_eq!(e.stats().dropped, 1);
}

#[test]
fn heartbeats_of_quarantined_workers_renew_nothing() {
    let mut e = run(8, 2, 4);
    let ask = |call, max| LeaseCall { worker: "bad", call, max };
    let kept = e.lease(ask(1, 1), at(0), |_| true).remove(0);
    // Its lease expires without progress; it could still submit the group.
    assert!(
        heartbeat(&mut e, "bad", &kept.id, 0, at(25)).is_empty()
            && heartbeat(&mut e, "bad", &kept.id, 0, at(50)).is_empty()
    );
    for s in [55, 60, 65] {
        e.touch_worker("bad", at(s));
    }
    assert_eq!(e.expire(at(65)), 1);
    for call in 2..5 {
        let l = e.lease(ask(call, 1), at(65), |_| true).remove(0);
        assert_ne!(l.group, kept.group, "not the group it still holds");
        e.reject("bad", &l.id, &l.group, "NaN", at(65));
    }
    assert!(e.quarantine_reason("bad").is_some() && e.leased_by("bad") == 0);
    assert_eq!(heartbeat(&mut e, "bad", &kept.id, 9, at(66)), std::slice::from_ref(&kept.id));
    assert_eq!(e.leased_by("bad"), 0);
    assert!(e.candidates("bad", 4).is_empty() && e.lease(ask(5, 4), at(66), |_| true).is_empty());
    assert_eq!(submit(&mut e, "bad", &kept, at(66)), Verdict::Expired);
    assert_eq!(lease(&mut e, "good", 4, at(66)).len(), 2);
}
