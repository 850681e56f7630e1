//! The soak: a whole run on an object store, faults of every kind one after another, and a verdict on what was lost.

mod crew;
mod fault;
mod tally;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::Value;
use unveil_testkit::{Finished, Lineage, Sandbox, StoreProxy, StoreServer, binary};

use crew::{Crew, Role, Tail};
use fault::{Deck, Fault, heal, inflict};
use tally::Tally;

/// Records of the training data, and groups of an update.
const RECORDS: usize = 8;
const GROUPS: usize = 2;
/// Rollout workers.
const WORKERS: usize = 2;
/// No update for so long after a fault is over is a hang.
const HANG: Duration = Duration::from_secs(180);

/// What a soak does.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Seed of everything random.
    pub seed: u64,
    /// How many faults.
    pub faults: usize,
    /// No fault lasts longer.
    pub longest: Duration,
}

/// What it found.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// Everything below is as it should be.
    pub ok: bool,
    /// Seed of the soak.
    pub seed: u64,
    /// Faults that were done.
    pub faults: usize,
    /// Updates of the final lineage.
    pub steps: u64,
    /// Groups missing in passes that are over.
    pub groups_lost: usize,
    /// Groups that a pass trained more than once.
    pub groups_doubled: usize,
    /// Groups that were set aside and never trained.
    pub groups_dropped: u64,
    /// Groups that entered an update without any reward: trained as nothing.
    pub groups_wholly_masked: u64,
    /// Groups whose update was skipped.
    pub groups_skipped: u64,
    /// Whether the newest checkpoint's own accounting says the same.
    pub accounting: bool,
    /// Objects of checkpoints that cannot be read, beyond those that the soak damaged.
    pub unreadable: Vec<String>,
    /// Faults after which nothing went on.
    pub hangs: Vec<String>,
    /// Processes that panicked.
    pub panics: Vec<String>,
    /// Processes that ended by themselves and were started again, as under a store that refuses writes.
    pub ended: Vec<String>,
    /// Longest recovery by what failed, in seconds: from the start of the new process of a learner, from the death of a worker or
    /// a reward service, from the end of any other fault, to the next update.
    pub worst_recovery_s: BTreeMap<&'static str, f64>,
    /// Wall time in seconds.
    pub wall_s: f64,
}

/// Limits of `worst_recovery_s`: a dead worker costs at most 15 s, a dead learner is back within 60 s of its restart.
const LIMITS: [(&str, f64); 2] = [("rollout", 15.0), ("learner", 60.0)];

/// Whether every recovery kept its limit. On a machine that is busy with other things no recovery is held to less than `start_s`, the
/// seconds that the whole run took from its start to its second update: what has died starts and trains no faster than that.
fn within_limits(worst: &BTreeMap<&'static str, f64>, start_s: f64) -> bool {
    LIMITS.iter().all(|(role, limit)| worst.get(role).is_none_or(|s| *s <= limit.max(start_s)))
}

/// Runs a soak and says each fault through `tell`.
///
/// # Panics
/// The run cannot be prepared at all.
pub fn soak(plan: Plan, tell: &mut dyn FnMut(&str)) -> Verdict {
    let begun = Instant::now();
    tell(&format!("seed {}", plan.seed));
    let sandbox = Sandbox::new();
    let s3 = StoreServer::start(&sandbox);
    let place = s3.folder("run").expect("the soak damages objects in a server of its own: unset UNVEIL_TEST_STORE");
    let store = StoreProxy::start(s3.endpoint());
    let ground = Ground { sandbox: &sandbox, s3: &s3, run: sandbox.path("run"), config: sandbox.micro_config() };
    ground.prepare();

    let sets = ground.sets();
    let started = Instant::now();
    let mut crew = Crew::start(&sandbox, &s3, &store, ground.config.clone(), sets, WORKERS);
    let mut watch = Watch { tail: Tail::of(&ground.run), worst: BTreeMap::new() };
    let mut deck = Deck::new(ChaCha8Rng::seed_from_u64(plan.seed), WORKERS, plan.longest);
    let (mut hangs, mut damaged, mut done) = (Vec::new(), Vec::new(), 0);
    if watch.until_update(&mut crew, started, 2).is_none() {
        hangs.push("nothing was trained before the first fault".to_owned());
    }
    let start_s = started.elapsed().as_secs_f64();
    tell(&format!("two updates within {start_s:.1} s of the start"));
    while done < plan.faults && hangs.is_empty() {
        let fault = deck.draw();
        done += 1;
        let at = begun.elapsed().as_secs_f64();
        let (found, object) = watch.suffer(&fault, &mut crew, &store, &place);
        damaged.extend(object);
        match found {
            Some(recovery) => {
                tell(&format!("{at:7.1} s  {done:3}  {fault:?}: recovery {recovery:.1} s"));
                // The next fault may come at any time of an update, and after some calm or none.
                watch.calm(&mut crew, deck.calm());
            }
            None => {
                tell(&format!("{at:7.1} s  {done:3}  {fault:?}: nothing goes on"));
                hangs.push(format!("{fault:?}"));
            }
        }
    }
    let ends = crew.end(Duration::from_secs(60));
    let mut verdict = ground.judge(&damaged);
    hangs.extend(ends.stuck);
    (verdict.seed, verdict.faults, verdict.hangs) = (plan.seed, done, hangs);
    (verdict.panics, verdict.ended, verdict.worst_recovery_s) = (ends.panics, ends.by_themselves, watch.worst);
    verdict.wall_s = begun.elapsed().as_secs_f64();
    let untrained = verdict.groups_dropped + verdict.groups_wholly_masked + verdict.groups_skipped;
    let whole = verdict.groups_lost == 0 && verdict.groups_doubled == 0 && untrained == 0 && verdict.accounting;
    let alive = verdict.unreadable.is_empty() && verdict.hangs.is_empty() && verdict.panics.is_empty();
    let soon = within_limits(&verdict.worst_recovery_s, start_s);
    verdict.ok = whole && alive && soon && verdict.faults == plan.faults;
    verdict
}

/// Looks for updates while the crew is tended.
struct Watch {
    tail: Tail,
    worst: BTreeMap<&'static str, f64>,
}

impl Watch {
    /// Waits for so many more updates; returns when the last of them was seen, or none where that takes too long.
    fn until_update(&mut self, crew: &mut Crew<'_>, from: Instant, more: usize) -> Option<Instant> {
        let goal = self.tail.updates() + more;
        while from.elapsed() < HANG {
            crew.tend();
            if self.tail.updates() >= goal {
                return Some(Instant::now());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }

    /// Lets the run go on for a while.
    fn calm(&mut self, crew: &mut Crew<'_>, time: Duration) {
        let begun = Instant::now();
        while begun.elapsed() < time {
            crew.tend();
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Does a fault to its end and waits until training goes on. Returns the seconds of recovery and the object that was damaged.
    fn suffer(
        &mut self,
        fault: &Fault,
        crew: &mut Crew<'_>,
        store: &StoreProxy,
        place: &std::path::Path,
    ) -> (Option<f64>, Option<PathBuf>) {
        let begun = Instant::now();
        let object = inflict(fault, crew, store, place);
        self.calm(crew, fault.time());
        heal(fault, crew, store);
        let over = Instant::now();
        let from = match fault.killed() {
            Some(Role::Learner) => loop {
                crew.tend();
                if let Some(started) = crew.started(Role::Learner) {
                    break started;
                }
                std::thread::sleep(Duration::from_millis(10));
            },
            Some(_) => begun,
            None => over,
        };
        // An update that was under way may end as if nothing had happened: the one after it counts where a worker died.
        let more = if matches!(fault.killed(), Some(Role::Rollout(_))) { 2 } else { 1 };
        let mut recovery = self.until_update(crew, over, more).map(|at| at.duration_since(from).as_secs_f64());
        // What the fault ended has to be back, too, before the next one.
        let all = [Role::Learner, Role::Reward].into_iter().chain((0..WORKERS).map(Role::Rollout));
        for role in all {
            while recovery.is_some() && !crew.is_up(role) {
                crew.tend();
                std::thread::sleep(Duration::from_millis(20));
                if over.elapsed() > HANG {
                    recovery = None;
                }
            }
        }
        if let Some(seconds) = recovery {
            let worst = self.worst.entry(fault.group()).or_default();
            *worst = worst.max(seconds);
        }
        (recovery, object)
    }
}

/// Where the soak takes place.
struct Ground<'a> {
    sandbox: &'a Sandbox,
    s3: &'a StoreServer,
    run: PathBuf,
    config: PathBuf,
}

impl Ground<'_> {
    fn sets(&self) -> Vec<String> {
        let url = format!("checkpoint.url={}", self.s3.url("run"));
        let sets = ["sft.steps=20", "learner.steps=1000000", "learner.checkpoint_every=2", "checkpoint.keep=3"];
        sets.into_iter().map(str::to_owned).chain([url, "reward.deadline_s=5".to_owned()]).collect()
    }

    fn unveil(&self, args: &[&str]) -> Finished {
        let mut command = self.sandbox.command(&binary("unveil"), args);
        self.sandbox.start(self.s3.tell(&mut command, self.s3.endpoint())).wait(HANG)
    }

    /// Data and stage 1.
    fn prepare(&self) {
        let (config, sets) = (self.config.to_string_lossy(), self.sets());
        let mut args = vec!["train", "--config", &config];
        args.extend(sets.iter().flat_map(|set| ["--set", set.as_str()]));
        args.extend(["--set", "learner.steps=0"]);
        self.unveil(&args).ok();
    }

    fn judge(&self, damaged: &[PathBuf]) -> Verdict {
        let lineage = Lineage::read(&self.run);
        let url = self.s3.url("run");
        let shown = self.unveil(&["checkpoint", "show", &url]);
        let account = shown.json().first().map_or(Value::Null, |s| s["accounting"].clone());
        let tally = Tally::of(&lineage, &account, (RECORDS, GROUPS));
        let ours = |object: &str| damaged.iter().any(|path| path.ends_with(object));
        let checks = self.unveil(&["checkpoint", "verify", &url]);
        let mut unreadable: Vec<String> = checks
            .json()
            .iter()
            .filter(|c| c["ok"] != true && !ours(c["object"].as_str().unwrap_or_default()))
            .map(ToString::to_string)
            .collect();
        if checks.json().is_empty() {
            unreadable.push(format!("no checkpoint can be looked at: {}", checks.stderr));
        }
        Verdict {
            ok: false,
            seed: 0,
            faults: 0,
            steps: lineage.steps.len() as u64,
            groups_lost: tally.lost,
            groups_doubled: tally.doubled,
            groups_dropped: tally.dropped,
            groups_wholly_masked: tally.wholly_masked,
            groups_skipped: tally.skipped,
            accounting: tally.agrees,
            unreadable,
            hangs: Vec::new(),
            panics: Vec::new(),
            ended: Vec::new(),
            worst_recovery_s: BTreeMap::new(),
            wall_s: 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::within_limits;

    #[test]
    fn recovery_limits_follow_a_slow_start() {
        let worst = |role, s| [(role, s)].into();
        assert!(within_limits(&worst("rollout", 14.9), 8.0) && within_limits(&worst("learner", 59.0), 8.0));
        assert!(!within_limits(&worst("rollout", 16.4), 8.0) && !within_limits(&worst("learner", 60.5), 8.0));
        assert!(within_limits(&worst("rollout", 16.4), 57.0), "the whole run took longer to start");
        assert!(!within_limits(&worst("rollout", 57.5), 57.0));
        assert!(within_limits(&worst("store", 170.0), 8.0), "a hang is found elsewhere");
    }
}
