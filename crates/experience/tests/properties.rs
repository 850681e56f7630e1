//! Random workers (dying, slow, repeating themselves), clock jumps and learner restarts: each group is trained exactly
//! once and in order, staleness stays bounded, nothing gets stuck.

use std::collections::HashSet;
use std::time::Duration;

use proptest::prelude::*;
use unveil_core::GroupId;
use unveil_experience::{
    Ask, Event, Experience, Heartbeat, InHand, Lease, Settings, Snapshot, Submission, Verdict, VersionSpan,
};

#[derive(Debug, Clone)]
enum Op {
    Lease {
        worker: usize,
        max: usize,
    },
    /// Half of the groups are not prepared, and the answer is lost on the way.
    LostAnswer {
        worker: usize,
        max: usize,
    },
    /// The worker does not repeat a call that brought no answer.
    GiveUp {
        worker: usize,
    },
    Beat {
        worker: usize,
        moves: bool,
    },
    Submit {
        worker: usize,
        pick: usize,
        lag: u64,
    },
    Again {
        worker: usize,
        pick: usize,
    },
    Steal {
        thief: usize,
        victim: usize,
    },
    Release {
        worker: usize,
    },
    Die {
        worker: usize,
    },
    Lost {
        worker: usize,
    },
    Clock {
        ms: u64,
    },
    ClockBack,
    Learn {
        jump: u64,
    },
    Restart {
        keep_weights: bool,
    },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..4usize, 1..9usize).prop_map(|(worker, max)| Op::Lease { worker, max }),
        2 => (0..4usize, 1..9usize).prop_map(|(worker, max)| Op::LostAnswer { worker, max }),
        1 => (0..4usize).prop_map(|worker| Op::GiveUp { worker }),
        4 => (0..4usize, any::<bool>()).prop_map(|(worker, moves)| Op::Beat { worker, moves }),
        12 => (0..4usize, any::<usize>(), 0..3u64).prop_map(|(worker, pick, lag)| Op::Submit { worker, pick, lag }),
        2 => (0..4usize, any::<usize>()).prop_map(|(worker, pick)| Op::Again { worker, pick }),
        1 => (0..4usize, 0..4usize).prop_map(|(thief, victim)| Op::Steal { thief, victim }),
        1 => (0..4usize).prop_map(|worker| Op::Release { worker }),
        1 => (0..4usize).prop_map(|worker| Op::Die { worker }),
        1 => (0..4usize).prop_map(|worker| Op::Lost { worker }),
        4 => prop_oneof![0..5_000u64, 50_000..10_000_000u64].prop_map(|ms| Op::Clock { ms }),
        1 => Just(Op::ClockBack),
        6 => prop_oneof![4 => Just(1), 1 => 1..4u64].prop_map(|jump| Op::Learn { jump }),
        1 => any::<bool>().prop_map(|keep_weights| Op::Restart { keep_weights }),
    ]
}

/// What the workers do at the end.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ends {
    /// They have lost all that they had, and much time has passed.
    Forgetful,
    /// They go on.
    Healthy,
    /// All but the first live, and stand still.
    Stuck,
}

/// A payload that remembers how it was made.
#[derive(Debug, Clone)]
struct Made {
    group: GroupId,
    oldest: u64,
}

/// A worker's calls for groups, and how far its work is.
#[derive(Debug, Clone, Default)]
struct Calls {
    done: u64,
    /// The call after these was answered with this, and the answer was lost.
    lost: Option<Vec<Lease>>,
    progress: u64,
}

struct World {
    e: Experience<Made>,
    settings: Settings,
    ids: Vec<String>,
    now: Duration,
    latest: Duration,
    held: Vec<Vec<(Lease, u64)>>, // per worker: lease and the version it will be generated with
    sent: Vec<Vec<(Lease, u64)>>,
    calls: [Calls; 4],
    /// Leases of processes that are gone; others of their names may get the groups again.
    gone: HashSet<String>,
    trained: Vec<GroupId>,
    saved: Snapshot,
    step: u64,
}

fn settings(groups_per_step: usize, max_staleness: u64) -> Settings {
    Settings {
        groups_per_step,
        max_staleness,
        lease_s: 30.0,
        stall_s: 60.0,
        silence_s: 30.0,
        seed: 11,
        term: 1,
        total_groups: None,
    }
}

fn ids(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("r{i}")).collect()
}

impl World {
    fn new(records: usize, groups_per_step: usize, max_staleness: u64) -> Self {
        let (settings, ids) = (settings(groups_per_step, max_staleness), ids(records));
        let e = Experience::new(settings.clone(), ids.clone()).unwrap();
        let saved = e.snapshot();
        let (held, sent) = (vec![vec![]; 4], vec![vec![]; 4]);
        let (calls, gone, latest) = Default::default();
        Self { e, settings, ids, now: Duration::ZERO, latest, held, sent, calls, gone, trained: vec![], saved, step: 0 }
    }

    /// What a worker has in hand of this learner.
    fn in_hand(&self, w: usize) -> Vec<InHand> {
        let progress = self.calls[w].progress;
        self.held[w].iter().map(|(l, _)| InHand { lease: l.id.clone(), progress }).collect()
    }

    fn lease(&mut self, w: usize, max: usize) -> usize {
        let name = format!("w{w}");
        self.e.expire(self.now);
        let call = self.calls[w].done + 1;
        let before = self.e.answered(&name, call);
        let (could, had) = (self.e.candidates(&name, max), self.e.leased_by(&name));
        let got = self.e.lease(Ask { worker: &name, call, max }, self.now, |_| true);
        if let Some(lost) = self.calls[w].lost.take().filter(|_| !before.is_empty()) {
            assert_eq!(got, before, "a repeated call brought another lease");
            assert!(got.iter().all(|l| lost.iter().any(|b| (&b.id, &b.group) == (&l.id, &l.group))));
        } else {
            assert_eq!((got.len(), self.e.leased_by(&name)), (could.len(), had + got.len()));
            assert!(got.iter().zip(could).all(|(l, g)| l.group == g));
        }
        self.calls[w].done = call;
        let term = format!("{}-", self.settings.term);
        for l in &got {
            assert!(l.min_version <= self.e.version(), "a lease must be doable with the published weights");
            let live = |h: &Lease| h.id.starts_with(&term) && !self.gone.contains(&h.id);
            let twice = self.held[w].iter().find(|(h, _)| h.group == l.group && live(h));
            assert!(twice.is_none(), "{l:?} went to the worker that has {twice:?} in hand");
        }
        let version = self.e.version();
        let n = got.len();
        self.held[w].extend(got.into_iter().map(|l| (l, version)));
        n
    }

    fn lose_answer(&mut self, w: usize, max: usize) {
        let (name, call) = (format!("w{w}"), self.calls[w].done + 1);
        let got = self.e.lease(Ask { worker: &name, call, max }, self.now, |g| g.position.is_multiple_of(2));
        self.calls[w].lost = Some(got);
    }

    /// The worker tells what it has in hand, and lets go of what is lost.
    fn beat(&mut self, w: usize, moves: bool) {
        self.calls[w].progress += u64::from(moves);
        let (name, in_hand, done) = (format!("w{w}"), self.in_hand(w), self.calls[w].done);
        let lost = self.e.heartbeat(&Heartbeat { worker: &name, done, in_hand: &in_hand }, self.now);
        for lease in &lost {
            assert!(self.e.group_of(&name, lease).is_none(), "{lease} holds");
        }
        if moves {
            let renewed = in_hand.iter().filter(|h| !lost.contains(&h.lease)).all(|h| {
                let group = self.e.group_of(&name, &h.lease);
                group.is_some_and(|g| self.held[w].iter().any(|(l, _)| l.id == h.lease && l.group == g))
            });
            assert!(renewed, "what moves and is not lost holds again");
        }
        self.held[w].retain(|(l, _)| !lost.contains(&l.id));
        if self.calls[w].lost.is_none() {
            assert_eq!(
                self.e.leased_by(&name),
                self.held[w].iter().filter(|(l, _)| self.e.group_of(&name, &l.id).is_some()).count()
            );
        }
    }

    fn send(&mut self, w: usize, lease: &Lease, oldest: u64) -> Verdict {
        let worker = format!("w{w}");
        let newest = oldest.max(self.e.version().min(oldest + 1));
        let made = Made { group: lease.group.clone(), oldest };
        let s = Submission {
            worker: &worker,
            lease: &lease.id,
            group: &lease.group,
            versions: VersionSpan { oldest, newest },
        };
        self.e.submit(&s, made, self.now)
    }

    fn learn(&mut self, jump: u64) -> bool {
        let Some(batch) = self.e.next_batch(self.now) else {
            return false;
        };
        assert_eq!(batch.len(), self.settings.groups_per_step);
        for (group, made) in &batch {
            assert_eq!(*group, made.group);
            assert!(made.oldest + self.settings.max_staleness >= self.e.version(), "too stale at training");
        }
        assert!(self.e.next_batch(self.now).is_none(), "one batch at a time");
        let groups: Vec<GroupId> = batch.into_iter().map(|(g, _)| g).collect();
        assert!(self.e.trained(self.step, &groups[1..], self.now).is_err());
        self.e.trained(self.step, &groups, self.now).unwrap();
        self.trained.extend(groups);
        self.step += 1;
        let version = self.e.version() + jump;
        self.e.published(version).unwrap();
        if self.step.is_multiple_of(3) {
            self.saved = serde_json::from_str(&serde_json::to_string(&self.e.snapshot()).unwrap()).unwrap();
        }
        true
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Lease { worker, max } => {
                self.lease(worker, max);
            }
            Op::LostAnswer { worker, max } => self.lose_answer(worker, max),
            Op::GiveUp { worker } => {
                if self.calls[worker].lost.take().is_some() {
                    self.calls[worker].done += 1;
                }
            }
            Op::Beat { worker, moves } => self.beat(worker, moves),
            Op::Submit { worker, pick, lag } => {
                if self.held[worker].is_empty() {
                    return;
                }
                let i = pick % self.held[worker].len();
                let (lease, version) = self.held[worker].remove(i);
                self.send(worker, &lease, version.saturating_sub(lag));
                self.sent[worker].push((lease, version));
            }
            Op::Again { worker, pick } => {
                if self.sent[worker].is_empty() {
                    return;
                }
                let i = pick % self.sent[worker].len();
                let (lease, version) = self.sent[worker][i].clone();
                let before = self.e.stats();
                let verdict = self.send(worker, &lease, version);
                assert_ne!(verdict, Verdict::Accepted, "a submission counted twice");
                assert_eq!(self.e.stats().ready, before.ready);
            }
            Op::Steal { thief, victim } => {
                if let (Some((lease, version)), true) = (self.held[victim].first().cloned(), thief != victim) {
                    assert_ne!(self.send(thief, &lease, version), Verdict::Accepted, "a foreign lease was taken");
                }
            }
            Op::Release { worker } => {
                let leases: Vec<String> = self.held[worker].drain(..).map(|(l, _)| l.id).collect();
                self.e.release(&format!("w{worker}"), &leases, self.now);
            }
            Op::Die { worker } => self.held[worker].clear(),
            Op::Lost { worker } => {
                self.gone.extend(self.held[worker].iter().map(|(l, _)| l.id.clone()));
                self.e.worker_lost(&format!("w{worker}"), self.now);
            }
            Op::Clock { ms } => {
                self.now += Duration::from_millis(ms);
                self.latest = self.latest.max(self.now);
            }
            Op::ClockBack => self.now /= 2,
            Op::Learn { jump } => {
                self.learn(jump);
            }
            Op::Restart { keep_weights } => {
                self.settings.term += 1;
                self.e = Experience::restore(self.settings.clone(), self.ids.clone(), &self.saved).unwrap();
                self.trained.truncate(self.saved.trained as usize);
                self.step = self.trained.len() as u64 / self.settings.groups_per_step as u64;
                if !keep_weights {
                    self.held.iter_mut().for_each(Vec::clear);
                }
                self.sent.iter_mut().for_each(Vec::clear);
            }
        }
        let s = self.e.stats();
        let leased: usize = (0..4).map(|w| self.e.leased_by(&format!("w{w}"))).sum();
        assert_eq!(leased, s.leased, "the index by worker");
        let bound = (self.settings.max_staleness as usize + 1) * self.settings.groups_per_step;
        assert!(s.waiting + s.leased + s.ready + s.training <= bound, "more is out than staleness allows: {s:?}");
        assert_eq!(s.trained as usize, self.trained.len());
    }

    /// From whatever state: with healthy workers, or one healthy one beside others that stand still under a live heartbeat, a
    /// learner gets through `steps` more steps.
    fn finish(&mut self, steps: usize, ends: Ends) {
        if ends == Ends::Forgetful {
            self.held.iter_mut().for_each(Vec::clear);
            self.now += Duration::from_secs(1_000_000_000);
        }
        self.now = self.now.max(self.latest);
        let goal = self.trained.len() + steps * self.settings.groups_per_step;
        let mut rounds = 0;
        while self.trained.len() < goal {
            rounds += 1;
            assert!(rounds < 100 + 20 * goal, "stuck: {:?}", self.e.stats());
            self.now += Duration::from_secs(10);
            for w in 0..4 {
                let works = w == 0 || ends != Ends::Stuck;
                self.beat(w, works);
                if works {
                    self.lease(w, 3);
                    for (lease, version) in std::mem::take(&mut self.held[w]) {
                        self.send(w, &lease, version);
                    }
                }
            }
            self.learn(1);
        }
    }

    /// The lineage that was trained: positions in order, each record once per pass.
    fn check(&mut self) {
        let n = self.ids.len() as u64;
        for (i, g) in self.trained.iter().enumerate() {
            assert_eq!((g.pass, g.position), (i as u64 / n, i as u64 % n));
        }
        for pass in self.trained.chunks_exact(self.ids.len()) {
            let mut records: Vec<&str> = pass.iter().map(|g| g.record.as_str()).collect();
            records.sort_unstable();
            records.dedup();
            assert_eq!(records.len(), self.ids.len(), "a record was trained twice in a pass");
        }
        let account = self.e.snapshot().accounting();
        assert!(account.exactly_once && account.trained == self.trained.len() as u64, "{account:?}");
        for e in self.e.drain_events() {
            let line = serde_json::to_string(&e).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), e);
        }
        assert!(self.e.drain_events().is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn exactly_once_bounded_and_never_stuck(
        records in 1..20usize,
        groups_per_step in 1..7usize,
        max_staleness in 0..3u64,
        ops in prop::collection::vec(op(), 0..200),
        ends in prop_oneof![Just(Ends::Forgetful), Just(Ends::Healthy), Just(Ends::Stuck)],
    ) {
        let mut w = World::new(records, groups_per_step, max_staleness);
        for op in &ops {
            w.apply(op);
        }
        w.finish(5, ends);
        w.check();
    }
}

#[test]
fn on_policy_hands_out_nothing_until_published() {
    let mut w = World::new(10, 4, 0);
    assert_eq!(w.lease(0, 100), 4);
    assert_eq!(w.lease(1, 100), 0);
    for (l, v) in std::mem::take(&mut w.held[0]) {
        assert_eq!(w.send(0, &l, v), Verdict::Accepted);
    }
    let batch = w.e.next_batch(w.now).unwrap();
    assert_eq!(w.lease(0, 100), 0);
    let groups: Vec<_> = batch.into_iter().map(|(g, _)| g).collect();
    w.e.trained(0, &groups, w.now).unwrap();
    assert_eq!(w.lease(0, 100), 0, "the old weights must not start the next batch");
    w.e.published(1).unwrap();
    assert_eq!(w.lease(0, 100), 4);
    assert!(w.e.published(0).is_err());
}

#[test]
fn a_slow_worker_is_taken_late_unless_another_has_the_group() {
    let mut w = World::new(4, 1, 0);
    w.lease(0, 1);
    w.now = Duration::from_secs(40);
    assert_eq!(w.e.expire(w.now), 1);
    let (l, v) = w.held[0][0].clone();
    assert_eq!(w.send(0, &l, v), Verdict::Accepted);
    assert!(w.learn(1));

    w.held[0].clear();
    w.lease(0, 1);
    w.now = Duration::from_secs(80);
    assert_eq!(w.lease(1, 1), 1, "the lease has run out: another worker gets the group");
    let (l, v) = w.held[0][0].clone();
    assert_eq!(w.send(0, &l, v), Verdict::Expired);
    let (l, v) = w.held[1][0].clone();
    assert_eq!(w.send(1, &l, v), Verdict::Accepted);
    assert_eq!(w.send(1, &l, v), Verdict::Duplicate);
}

/// The clock is the test's: a worker that says nothing for five seconds has lost its groups, one that does has not.
#[test]
fn a_silent_worker_loses_its_groups_and_one_that_lives_does_not() {
    let s = Settings { silence_s: 5.0, ..settings(2, 0) };
    let mut e = Experience::new(s, ids(6)).unwrap();
    let at = |ms: u64| Duration::from_millis(3_600_000 + ms);
    let (dead, alive) = (
        e.lease(Ask::new("dead", 1), at(0), |_| true).remove(0),
        e.lease(Ask::new("alive", 1), at(0), |_| true).remove(0),
    );
    for ms in (0..5_000).step_by(1_000) {
        e.hear("alive", at(ms));
        assert_eq!(e.expire(at(ms)), 0);
    }
    assert_eq!((e.expire(at(4_999)), e.expire(at(5_000))), (0, 1), "five seconds after its last word");
    let silent = e.drain_events().into_iter().find(|e| matches!(e, Event::Expired { silent: true, .. }));
    assert!(matches!(silent, Some(Event::Expired { worker, .. }) if worker == "dead"));
    assert_eq!(e.leased_by("alive"), 1);
    // A clock that goes back changes nothing, one that leaps takes the lease of everybody who is not heard after it.
    e.hear("alive", at(0));
    assert_eq!(e.expire(at(2_000)), 0);
    e.hear("alive", at(1_000_000));
    assert_eq!(e.expire(at(1_000_000)), 1, "the lease itself has run out by then");
    // Nobody took the groups meanwhile: both still count, once.
    for (lease, worker) in [(&dead, "dead"), (&alive, "alive")] {
        let s = Submission { worker, lease: &lease.id, group: &lease.group, versions: VersionSpan::at(0) };
        assert_eq!(e.submit(&s, (), at(1_000_000)), Verdict::Accepted);
        assert_eq!(e.submit(&s, (), at(1_000_000)), Verdict::Duplicate);
    }
    assert_eq!(e.next_batch(at(0)).map(|b| b.len()), Some(2));
}

#[test]
fn stale_and_unknown_weights_are_refused_and_the_group_returns_first() {
    let mut w = World::new(10, 2, 0);
    w.e.published(5).unwrap();
    w.lease(0, 2);
    let held = w.held[0].clone();
    assert_eq!(held[0].0.min_version, 5);
    assert_eq!(w.send(0, &held[0].0, 4), Verdict::Stale);
    let again = w.e.lease(Ask::new("w1", 5), w.now, |_| true);
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].group, held[0].0.group);
    let s = Submission { worker: "w0", lease: &held[1].0.id, group: &held[1].0.group, versions: VersionSpan::at(6) };
    let made = Made { group: held[1].0.group.clone(), oldest: 6 };
    assert_eq!(w.e.submit(&s, made, w.now), Verdict::Stale, "weights of a lineage that was left");
}

#[test]
fn overlap_leases_the_next_batch_while_one_trains() {
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

/// A worker that is much slower than the others, on a clock of its own: what it holds is never trained too old, and where its
/// lease runs out another worker makes the group with weights that are new enough.
#[test]
fn a_slow_worker_cannot_break_the_bound() {
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
            // Late, or under a lease that another one has by now: never counted twice.
            let before = w.e.stats();
            for (l, v) in std::mem::take(&mut w.held[3]) {
                w.send(3, &l, v);
            }
            assert!(w.e.stats().ready <= before.ready + 1);
            w.lease(3, 1);
        }
    }
    let s = w.e.stats();
    assert!(s.trained >= 40 && s.expired > 0 && s.duplicates + s.refused > 0, "{s:?}");
    w.check();
}

#[test]
fn what_grew_too_old_is_dropped_leased_first_and_counted() {
    let mut w = World::new(10, 2, 1);
    assert_eq!(w.lease(0, 100), 4);
    for (l, v) in std::mem::take(&mut w.held[0]) {
        assert_eq!(w.send(0, &l, v), Verdict::Accepted);
    }
    assert!(w.learn(3), "versions 1 and 2 were left out");
    assert!(!w.learn(1), "version 0 lags three behind");
    assert_eq!((w.e.stats().stale, w.e.stats().waiting), (2, 2));
    assert_eq!(w.lease(1, 2), 2);
    let positions: Vec<u64> = w.held[1].iter().map(|(l, _)| l.group.position).collect();
    assert_eq!((positions, w.held[1][0].0.min_version), (vec![2, 3], 2));
    let stale = w.e.drain_events().into_iter().filter(|e| matches!(e, Event::Stale { oldest: 0, version: 3, .. }));
    assert_eq!(stale.count(), 2);
}

#[test]
fn the_end_of_the_run_is_a_smaller_batch_and_then_nothing() {
    let s = Settings { total_groups: Some(5), ..settings(3, 0) };
    let mut e = Experience::new(s, ids(4)).unwrap();
    let mut sizes = vec![];
    for step in 0..4 {
        for l in e.lease(Ask::new("w", 10), Duration::ZERO, |_| true) {
            let versions = VersionSpan::at(e.version());
            let s = Submission { worker: "w", lease: &l.id, group: &l.group, versions };
            assert_eq!(e.submit(&s, (), Duration::ZERO), Verdict::Accepted);
        }
        let Some(batch) = e.next_batch(Duration::ZERO) else {
            break;
        };
        let groups: Vec<_> = batch.into_iter().map(|(g, ())| g).collect();
        sizes.push(groups.len());
        e.trained(step, &groups, Duration::ZERO).unwrap();
        e.published(step + 1).unwrap();
    }
    assert_eq!(sizes, [3, 2]);
    assert!(e.finished());
    assert!(e.lease(Ask::new("w", 10), Duration::ZERO, |_| true).is_empty());
}

#[test]
fn another_data_set_or_seed_is_refused_by_name() {
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

/// Work takes three times as long as a lease lasts, or heartbeats come later than that: the worker goes on all the same.
#[test]
fn a_worker_three_times_slower_than_a_lease_trains() {
    for (every, expired) in [(10, false), (45, true)] {
        let mut w = World::new(10, 2, 0);
        for _ in 0..4 {
            assert_eq!(w.lease(0, 2), 2);
            for _ in 0..90 / every {
                w.now += Duration::from_secs(every);
                w.e.hear("w0", w.now);
                w.e.expire(w.now);
                assert_eq!(w.lease(0, 2), 0, "it has all of them in hand");
                w.beat(0, true);
            }
            for (l, v) in std::mem::take(&mut w.held[0]) {
                assert_eq!(w.send(0, &l, v), Verdict::Accepted);
            }
            assert!(w.learn(1));
        }
        assert_eq!(w.e.stats().expired > 0, expired, "{:?}", w.e.stats());
        let renewed = w.e.drain_events().iter().filter(|e| matches!(e, Event::Renewed { .. })).count();
        assert_eq!(renewed > 0, expired);
    }
}

#[test]
fn a_worker_that_stands_still_under_a_live_heartbeat_loses_its_groups() {
    let mut w = World::new(10, 2, 0);
    assert_eq!(w.lease(0, 2), 2);
    for _ in 0..5 {
        w.now += Duration::from_secs(10);
        w.beat(0, false);
        assert_eq!(w.lease(1, 2), 0, "it may be slow");
    }
    w.now += Duration::from_secs(10);
    w.beat(0, false);
    assert_eq!(w.lease(0, 2), 0, "it does not get what it has in hand");
    assert_eq!(w.lease(1, 2), 2);
    let stalled = w.e.drain_events().into_iter().filter(|e| matches!(e, Event::Expired { stalled: true, .. })).count();
    assert_eq!(stalled, 2);
    w.beat(0, true);
    assert!(w.held[0].is_empty(), "it hears that they are lost");
    // Had nobody taken them, they would be its again.
    let mut w = World::new(10, 2, 0);
    w.lease(0, 2);
    for moves in [false, false, false, true] {
        w.now += Duration::from_secs(25);
        w.e.expire(w.now);
        w.beat(0, moves);
        assert_eq!(w.e.leased_by("w0"), if w.now.as_secs() == 75 { 0 } else { 2 });
    }
    assert_eq!((w.lease(1, 2), w.e.leased_by("w0")), (0, 2));
}

#[test]
fn a_lost_answer_is_repeated_or_given_up() {
    let mut w = World::new(10, 3, 0);
    w.lose_answer(0, 3);
    let lost = w.calls[0].lost.clone().unwrap();
    assert_eq!(lost.len(), 2, "those at even places");
    w.beat(0, true);
    assert_eq!((w.e.leased_by("w0"), w.lease(1, 3)), (2, 1), "the call may be repeated yet");
    assert_eq!(w.lease(0, 3), 2);
    assert!(w.held[0].iter().map(|(l, _)| &l.id).eq(lost.iter().map(|l| &l.id)));
    w.apply(&Op::Release { worker: 0 });
    w.lose_answer(0, 3);
    w.apply(&Op::GiveUp { worker: 0 });
    assert_eq!(w.e.leased_by("w0"), 2);
    w.beat(0, true);
    assert_eq!((w.e.leased_by("w0"), w.lease(1, 3)), (0, 2), "the heartbeat tells that it does not have them");
}
