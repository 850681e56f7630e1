//! Random workers (dying, slow, repeating submissions), clock jumps and learner restarts: each group is trained exactly once and in
//! order, staleness stays bounded, and the run never gets stuck.

use std::time::Duration;

use proptest::prelude::*;
use unveil_experience::{Experience, Verdict};

use crate::simulation::{Ends, Replacing, World};

/// One step of a simulation.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Lease {
        worker: usize,
        max: usize,
    },
    /// Half of the groups are not prepared, and the answer is lost.
    LostAnswer {
        worker: usize,
        max: usize,
    },
    /// The worker does not repeat a call whose answer was lost.
    GiveUp {
        worker: usize,
    },
    Heartbeat {
        worker: usize,
        progresses: bool,
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
        4 => (0..4usize, any::<bool>()).prop_map(|(worker, progresses)| Op::Heartbeat { worker, progresses }),
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

impl World {
    pub(crate) fn apply(&mut self, op: &Op) {
        match *op {
            Op::Lease { worker, max } => {
                self.lease(worker, max);
            }
            Op::LostAnswer { worker, max } => self.lose_answer(worker, max),
            Op::GiveUp { worker } => {
                if self.calls[worker].lost.take().is_some() {
                    self.calls[worker].answered += 1;
                }
            }
            Op::Heartbeat { worker, progresses } => self.heartbeat(worker, progresses),
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
                let before = self.machine.stats();
                let verdict = self.send(worker, &lease, version);
                assert_ne!(verdict, Verdict::Accepted, "a submission counted twice");
                assert_eq!(self.machine.stats().ready, before.ready);
            }
            Op::Steal { thief, victim } => {
                if let (Some((lease, version)), true) = (self.held[victim].first().cloned(), thief != victim) {
                    assert_ne!(self.send(thief, &lease, version), Verdict::Accepted, "a foreign lease was accepted");
                }
            }
            Op::Release { worker } => {
                let leases: Vec<String> = self.held[worker].drain(..).map(|(l, _)| l.id).collect();
                self.machine.release(&format!("w{worker}"), &leases, self.now);
            }
            Op::Die { worker } => self.held[worker].clear(),
            Op::Lost { worker } => {
                self.lost_leases.extend(self.held[worker].iter().map(|(l, _)| l.id.clone()));
                self.machine.worker_lost(&format!("w{worker}"), self.now);
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
                let restored = Experience::restore(self.settings.clone(), self.ids.clone(), &self.saved).unwrap();
                self.machine = self.replacing.apply(restored);
                self.finished.truncate(self.saved.trained as usize);
                self.replaced.retain(|g| self.finished.contains(g));
                self.step = self.trained() as u64 / self.settings.groups_per_step as u64;
                if !keep_weights {
                    self.held.iter_mut().for_each(Vec::clear);
                }
                self.sent.iter_mut().for_each(Vec::clear);
            }
        }
        let s = self.machine.stats();
        let leased: usize = (0..4).map(|w| self.machine.leased_by(&format!("w{w}"))).sum();
        assert_eq!(leased, s.leased, "the lease index disagrees with the slots");
        let bound = (self.settings.max_staleness as usize + 1) * self.settings.groups_per_step;
        assert!(
            s.waiting + s.leased + s.ready + s.training <= bound,
            "more groups in flight than staleness allows: {s:?}"
        );
        assert_eq!(s.trained as usize, self.trained());
        assert!(s.replaced as usize >= self.replaced.len(), "{s:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn trains_exactly_once_with_bounded_staleness(
        records in 1..20usize,
        groups_per_step in 1..7usize,
        max_staleness in 0..3u64,
        limit in prop_oneof![1 => Just(0usize), 2 => 1..9usize],
        flat_percent in prop_oneof![Just(10u64), Just(50), Just(90), Just(100)],
        ops in prop::collection::vec(op(), 0..200),
        ends in prop_oneof![Just(Ends::Forgetful), Just(Ends::Healthy), Just(Ends::Stuck)],
    ) {
        let replacing = Replacing { limit, flat_percent };
        let mut w = World::with_replacement(records, groups_per_step, max_staleness, replacing);
        for op in &ops {
            w.apply(op);
        }
        w.finish(5, ends);
        w.check();
    }
}
