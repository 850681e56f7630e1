//! A simulated run: four workers and a learner on a clock that the test controls.

use std::collections::HashSet;
use std::time::Duration;

use unveil_core::GroupId;
use unveil_experience::{
    Event, Experience, ExperienceSnapshot, Heartbeat, HeldLease, Lease, LeaseCall, Settings, Submission, Verdict,
    VersionSpan,
};

/// Behaviour of the workers at the end of a simulation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Ends {
    /// All have lost their leases, and much time has passed.
    Forgetful,
    /// All continue to work.
    Healthy,
    /// All but the first are alive but make no progress.
    Stuck,
}

/// A payload that records its group and weight version.
#[derive(Debug, Clone)]
pub(crate) struct Payload {
    pub group: GroupId,
    pub oldest: u64,
}

/// A worker's lease calls and progress.
#[derive(Debug, Clone, Default)]
pub(crate) struct Calls {
    pub answered: u64,
    /// Leases granted to the next call, whose answer was lost.
    pub lost: Option<Vec<Lease>>,
    pub progress: u64,
}

pub(crate) struct World {
    pub machine: Experience<Payload>,
    pub settings: Settings,
    pub ids: Vec<String>,
    pub now: Duration,
    pub latest: Duration,
    /// By worker: leases and the version with which they will be generated.
    pub held: Vec<Vec<(Lease, u64)>>,
    /// By worker: submitted leases and their version.
    pub sent: Vec<Vec<(Lease, u64)>>,
    pub calls: [Calls; 4],
    /// Leases of lost processes; new processes of the same name may get their groups again.
    pub lost_leases: HashSet<String>,
    pub trained: Vec<GroupId>,
    pub saved: ExperienceSnapshot,
    pub step: u64,
}

pub(crate) fn settings(groups_per_step: usize, max_staleness: u64) -> Settings {
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

pub(crate) fn ids(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("r{i}")).collect()
}

impl World {
    pub(crate) fn new(records: usize, groups_per_step: usize, max_staleness: u64) -> Self {
        let settings = settings(groups_per_step, max_staleness);
        let ids = ids(records);
        let machine = Experience::new(settings.clone(), ids.clone()).unwrap();
        let saved = machine.snapshot();
        Self {
            machine,
            settings,
            ids,
            now: Duration::ZERO,
            latest: Duration::ZERO,
            held: vec![vec![]; 4],
            sent: vec![vec![]; 4],
            calls: Default::default(),
            lost_leases: HashSet::new(),
            trained: vec![],
            saved,
            step: 0,
        }
    }

    /// Returns the leases that a worker reports.
    pub(crate) fn held_leases(&self, w: usize) -> Vec<HeldLease> {
        let progress = self.calls[w].progress;
        self.held[w].iter().map(|(l, _)| HeldLease { lease: l.id.clone(), progress }).collect()
    }

    pub(crate) fn lease(&mut self, w: usize, max: usize) -> usize {
        let name = format!("w{w}");
        self.machine.expire(self.now);
        let call = self.calls[w].answered + 1;
        let before = self.machine.leases_of_call(&name, call);
        let candidates = self.machine.candidates(&name, max);
        let leased_before = self.machine.leased_by(&name);
        let got = self.machine.lease(LeaseCall { worker: &name, call, max }, self.now, |_| true);
        if let Some(lost) = self.calls[w].lost.take().filter(|_| !before.is_empty()) {
            assert_eq!(got, before, "a repeated call got another lease");
            assert!(got.iter().all(|l| lost.iter().any(|b| (&b.id, &b.group) == (&l.id, &l.group))));
        } else {
            assert_eq!((got.len(), self.machine.leased_by(&name)), (candidates.len(), leased_before + got.len()));
            assert!(got.iter().zip(candidates).all(|(l, g)| l.group == g));
        }
        self.calls[w].answered = call;
        let term = format!("{}-", self.settings.term);
        for l in &got {
            assert!(l.min_version <= self.machine.version(), "a lease must be possible with the published weights");
            let is_valid = |h: &Lease| h.id.starts_with(&term) && !self.lost_leases.contains(&h.id);
            let twice = self.held[w].iter().find(|(h, _)| h.group == l.group && is_valid(h));
            assert!(twice.is_none(), "{l:?} was granted to the worker that holds {twice:?}");
        }
        let version = self.machine.version();
        let n = got.len();
        self.held[w].extend(got.into_iter().map(|l| (l, version)));
        n
    }

    pub(crate) fn lose_answer(&mut self, w: usize, max: usize) {
        let name = format!("w{w}");
        let call = self.calls[w].answered + 1;
        let got =
            self.machine.lease(LeaseCall { worker: &name, call, max }, self.now, |g| g.position.is_multiple_of(2));
        self.calls[w].lost = Some(got);
    }

    /// Sends a heartbeat of a worker, which drops the leases that it has lost.
    pub(crate) fn heartbeat(&mut self, w: usize, progresses: bool) {
        self.calls[w].progress += u64::from(progresses);
        let name = format!("w{w}");
        let held = self.held_leases(w);
        let heartbeat = Heartbeat { worker: &name, answered_calls: self.calls[w].answered, held: &held };
        let lost = self.machine.heartbeat(&heartbeat, self.now);
        for lease in &lost {
            assert!(self.machine.group_of(&name, lease).is_none(), "{lease} is still valid");
        }
        if progresses {
            let renewed = held.iter().filter(|h| !lost.contains(&h.lease)).all(|h| {
                let group = self.machine.group_of(&name, &h.lease);
                group.is_some_and(|g| self.held[w].iter().any(|(l, _)| l.id == h.lease && l.group == g))
            });
            assert!(renewed, "leases with progress that are not lost are valid");
        }
        self.held[w].retain(|(l, _)| !lost.contains(&l.id));
        if self.calls[w].lost.is_none() {
            assert_eq!(
                self.machine.leased_by(&name),
                self.held[w].iter().filter(|(l, _)| self.machine.group_of(&name, &l.id).is_some()).count()
            );
        }
    }

    pub(crate) fn send(&mut self, w: usize, lease: &Lease, oldest: u64) -> Verdict {
        let worker = format!("w{w}");
        let newest = oldest.max(self.machine.version().min(oldest + 1));
        let payload = Payload { group: lease.group.clone(), oldest };
        let s = Submission {
            worker: &worker,
            lease: &lease.id,
            group: &lease.group,
            versions: VersionSpan { oldest, newest },
        };
        self.machine.submit(&s, payload, self.now)
    }

    pub(crate) fn learn(&mut self, jump: u64) -> bool {
        let Some(batch) = self.machine.next_batch(self.now) else {
            return false;
        };
        assert_eq!(batch.len(), self.settings.groups_per_step);
        for (group, payload) in &batch {
            assert_eq!(*group, payload.group);
            assert!(payload.oldest + self.settings.max_staleness >= self.machine.version(), "too stale for training");
        }
        assert!(self.machine.next_batch(self.now).is_none(), "one batch at a time");
        let groups: Vec<GroupId> = batch.into_iter().map(|(g, _)| g).collect();
        assert!(self.machine.record_trained(self.step, &groups[1..], self.now).is_err());
        self.machine.record_trained(self.step, &groups, self.now).unwrap();
        self.trained.extend(groups);
        self.step += 1;
        let version = self.machine.version() + jump;
        self.machine.publish(version).unwrap();
        if self.step.is_multiple_of(3) {
            self.saved = serde_json::from_str(&serde_json::to_string(&self.machine.snapshot()).unwrap()).unwrap();
        }
        true
    }

    /// Checks that from any state the learner completes `steps` more steps with healthy workers, or with one healthy worker and others that
    /// send heartbeats without progress.
    pub(crate) fn finish(&mut self, steps: usize, ends: Ends) {
        if ends == Ends::Forgetful {
            self.held.iter_mut().for_each(Vec::clear);
            self.now += Duration::from_secs(1_000_000_000);
        }
        self.now = self.now.max(self.latest);
        let goal = self.trained.len() + steps * self.settings.groups_per_step;
        let mut rounds = 0;
        while self.trained.len() < goal {
            rounds += 1;
            assert!(rounds < 100 + 20 * goal, "stuck: {:?}", self.machine.stats());
            self.now += Duration::from_secs(10);
            for w in 0..4 {
                let works = w == 0 || ends != Ends::Stuck;
                self.heartbeat(w, works);
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

    /// Checks the trained lineage: positions in order, each record once per pass.
    pub(crate) fn check(&mut self) {
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
        let account = self.machine.snapshot().accounting();
        assert!(account.exactly_once && account.trained == self.trained.len() as u64, "{account:?}");
        for e in self.machine.drain_events() {
            let line = serde_json::to_string(&e).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), e);
        }
        assert!(self.machine.drain_events().is_empty());
    }
}
