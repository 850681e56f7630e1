//! The soak: a complete run on an object store under a sequence of faults of every kind, and a verdict on what was lost.

mod fault;
mod role_supervisor;
mod tally;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::Value;
use unveil_testkit::{Finished, Lineage, Sandbox, StoreProxy, StoreServer, binary, run_args};

use fault::{Fault, FaultDeck, begin_fault, end_fault};
use role_supervisor::{EventTail, Role, RoleSupervisor};
use tally::GroupTally;

/// Number of records in the training data.
const RECORDS: usize = 8;
/// Groups per update.
const GROUPS_PER_UPDATE: usize = 2;
/// Number of rollout workers.
const WORKERS: usize = 2;
/// Time without an update after the end of a fault that counts as a hang.
const HANG_TIMEOUT: Duration = Duration::from_secs(180);

/// Parameters of a soak.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Seed of all random choices.
    pub seed: u64,
    /// Number of faults.
    pub faults: usize,
    /// Maximum duration of a fault.
    pub max_duration: Duration,
}

/// Result of a soak.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// Whether everything below is as expected.
    pub ok: bool,
    /// Seed of the soak.
    pub seed: u64,
    /// Number of injected faults.
    pub faults: usize,
    /// Updates of the final lineage.
    pub steps: u64,
    /// Groups missing in completed passes.
    pub groups_lost: usize,
    /// Groups trained more than once in a pass.
    pub groups_doubled: usize,
    /// Groups that were set aside and never trained.
    pub groups_dropped: u64,
    /// Groups that entered an update without any reward.
    pub groups_wholly_masked: u64,
    /// Groups whose update was skipped.
    pub groups_skipped: u64,
    /// Whether the accounting in the newest checkpoint agrees.
    pub accounting: bool,
    /// Unreadable objects of checkpoints, except for those that the soak damaged.
    pub unreadable: Vec<String>,
    /// Faults after which the run did not continue.
    pub hangs: Vec<String>,
    /// Processes that panicked.
    pub panics: Vec<String>,
    /// Processes that exited by themselves and were restarted, as under a store that refuses writes.
    pub ended: Vec<String>,
    /// Longest recovery by kind of fault, in seconds to the next update: from the restart of a learner, from the death of a worker or a
    /// reward service, or from the end of any other fault.
    pub worst_recovery_s: BTreeMap<&'static str, f64>,
    /// Wall time in seconds.
    pub wall_s: f64,
}

/// Limits of `worst_recovery_s` in seconds: for a dead worker, and for a learner after its restart.
const RECOVERY_LIMITS_S: [(&str, f64); 2] = [("rollout", 15.0), ("learner", 60.0)];

/// Returns whether every recovery kept its limit. On a busy machine no limit is below `start_s`, the time in seconds from the start of
/// the run to its second update: a restarted process is no faster.
fn within_limits(worst: &BTreeMap<&'static str, f64>, start_s: f64) -> bool {
    RECOVERY_LIMITS_S.iter().all(|(role, limit)| worst.get(role).is_none_or(|s| *s <= limit.max(start_s)))
}

/// Runs a soak and reports its progress through `report`.
///
/// # Panics
/// Panics if the run cannot be prepared.
pub fn soak(plan: Plan, report: &mut dyn FnMut(&str)) -> Verdict {
    let soak_start = Instant::now();
    report(&format!("seed {}", plan.seed));
    let sandbox = Sandbox::new();
    let s3 = StoreServer::start(&sandbox);
    let objects =
        s3.object_dir("run").expect("the soak damages objects and needs its own server: unset UNVEIL_TEST_STORE");
    let store = StoreProxy::start(s3.endpoint());
    let setup = SoakRun { sandbox: &sandbox, s3: &s3, run: sandbox.path("run"), config: sandbox.micro_config() };
    setup.prepare();

    let sets = setup.sets();
    let started = Instant::now();
    let mut roles = RoleSupervisor::start(&sandbox, &s3, &store, setup.config.clone(), sets, WORKERS);
    let mut monitor = UpdateMonitor { events: EventTail::new(&setup.run), worst: BTreeMap::new() };
    let mut deck = FaultDeck::new(ChaCha8Rng::seed_from_u64(plan.seed), WORKERS, plan.max_duration);
    let mut hangs = Vec::new();
    let mut damaged = Vec::new();
    let mut done = 0;
    if monitor.wait_for_updates(&mut roles, started, 2).is_none() {
        hangs.push("there was no update before the first fault".to_owned());
    }
    let start_s = started.elapsed().as_secs_f64();
    report(&format!("two updates within {start_s:.1} s of the start"));
    while done < plan.faults && hangs.is_empty() {
        let fault = deck.draw();
        done += 1;
        let time_s = soak_start.elapsed().as_secs_f64();
        let (recovery, object) = monitor.inject(&fault, &mut roles, &store, &objects);
        damaged.extend(object);
        match recovery {
            Some(recovery) => {
                report(&format!("{time_s:7.1} s  {done:3}  {fault:?}: recovery {recovery:.1} s"));
                // The next fault comes at any time of an update, with or without a pause before.
                monitor.run_for(&mut roles, deck.pause());
            }
            None => {
                report(&format!("{time_s:7.1} s  {done:3}  {fault:?}: no recovery"));
                hangs.push(format!("{fault:?}"));
            }
        }
    }
    let exits = roles.shut_down(Duration::from_secs(60));
    let mut verdict = setup.evaluate(&damaged);
    hangs.extend(exits.stuck);
    verdict.seed = plan.seed;
    verdict.faults = done;
    verdict.hangs = hangs;
    verdict.panics = exits.panics;
    verdict.ended = exits.by_themselves;
    verdict.worst_recovery_s = monitor.worst;
    verdict.wall_s = soak_start.elapsed().as_secs_f64();
    let untrained = verdict.groups_dropped + verdict.groups_wholly_masked + verdict.groups_skipped;
    let exactly_once = verdict.groups_lost == 0 && verdict.groups_doubled == 0 && untrained == 0 && verdict.accounting;
    let healthy = verdict.unreadable.is_empty() && verdict.hangs.is_empty() && verdict.panics.is_empty();
    let in_time = within_limits(&verdict.worst_recovery_s, start_s);
    verdict.ok = exactly_once && healthy && in_time && verdict.faults == plan.faults;
    verdict
}

/// Waits for updates while keeping the roles running.
struct UpdateMonitor {
    events: EventTail,
    worst: BTreeMap<&'static str, f64>,
}

impl UpdateMonitor {
    /// Waits for `more` updates and returns the time of the last one; `None` after the hang timeout, counted from `from`.
    fn wait_for_updates(&mut self, roles: &mut RoleSupervisor<'_>, from: Instant, more: usize) -> Option<Instant> {
        let goal = self.events.updates() + more;
        while from.elapsed() < HANG_TIMEOUT {
            roles.restart_exited();
            if self.events.updates() >= goal {
                return Some(Instant::now());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }

    /// Lets the run continue for a while.
    fn run_for(&mut self, roles: &mut RoleSupervisor<'_>, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            roles.restart_exited();
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Injects a fault, ends it, and waits until training continues. Returns the recovery time in seconds and the damaged object.
    fn inject(
        &mut self,
        fault: &Fault,
        roles: &mut RoleSupervisor<'_>,
        store: &StoreProxy,
        objects: &std::path::Path,
    ) -> (Option<f64>, Option<PathBuf>) {
        let begin = Instant::now();
        let object = begin_fault(fault, roles, store, objects);
        self.run_for(roles, fault.duration());
        end_fault(fault, roles, store);
        let end = Instant::now();
        let from = match fault.killed() {
            Some(Role::Learner) => loop {
                roles.restart_exited();
                if let Some(started) = roles.started(Role::Learner) {
                    break started;
                }
                std::thread::sleep(Duration::from_millis(10));
            },
            Some(_) => begin,
            None => end,
        };
        // An update in progress may complete unaffected, so after the death of a worker the next one counts.
        let more = if matches!(fault.killed(), Some(Role::Rollout(_))) { 2 } else { 1 };
        let mut recovery =
            self.wait_for_updates(roles, end, more).map(|update| update.duration_since(from).as_secs_f64());
        // All roles must be up again before the next fault.
        let all = [Role::Learner, Role::Reward].into_iter().chain((0..WORKERS).map(Role::Rollout));
        for role in all {
            while recovery.is_some() && !roles.is_up(role) {
                roles.restart_exited();
                std::thread::sleep(Duration::from_millis(20));
                if end.elapsed() > HANG_TIMEOUT {
                    recovery = None;
                }
            }
        }
        if let Some(seconds) = recovery {
            let worst = self.worst.entry(fault.kind()).or_default();
            *worst = worst.max(seconds);
        }
        (recovery, object)
    }
}

/// The run of a soak.
struct SoakRun<'a> {
    sandbox: &'a Sandbox,
    s3: &'a StoreServer,
    run: PathBuf,
    config: String,
}

impl SoakRun<'_> {
    fn sets(&self) -> Vec<String> {
        let url = format!("checkpoint.url={}", self.s3.url("run"));
        let sets = ["sft.steps=20", "learner.steps=1000000", "learner.checkpoint_every=2", "checkpoint.keep=3"];
        sets.into_iter().map(str::to_owned).chain([url, "reward.deadline_s=5".to_owned()]).collect()
    }

    fn unveil(&self, args: &[&str]) -> Finished {
        let mut command = self.sandbox.command(&binary("unveil"), args);
        self.sandbox.start(self.s3.configure(&mut command, self.s3.endpoint())).wait(HANG_TIMEOUT)
    }

    /// Creates the data and runs stage 1.
    fn prepare(&self) {
        let sets = self.sets();
        let mut sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        sets.push("learner.steps=0");
        let args = run_args("train", &self.config, &sets);
        self.unveil(&args).ok();
    }

    /// Evaluates the finished run; objects in `damaged` may be unreadable.
    fn evaluate(&self, damaged: &[PathBuf]) -> Verdict {
        let lineage = Lineage::read(&self.run);
        let url = self.s3.url("run");
        let shown = self.unveil(&["checkpoint", "show", &url]);
        let accounting = shown.json().first().map_or(Value::Null, |s| s["accounting"].clone());
        let tally = GroupTally::new(&lineage, &accounting, (RECORDS, GROUPS_PER_UPDATE));
        let damaged_here = |object: &str| damaged.iter().any(|path| path.ends_with(object));
        let checks = self.unveil(&["checkpoint", "verify", &url]);
        let mut unreadable: Vec<String> = checks
            .json()
            .iter()
            .filter(|c| c["ok"] != true && !damaged_here(c["object"].as_str().unwrap_or_default()))
            .map(ToString::to_string)
            .collect();
        if checks.json().is_empty() {
            unreadable.push(format!("no checkpoint can be verified: {}", checks.stderr));
        }
        Verdict {
            ok: false,
            seed: 0,
            faults: 0,
            steps: lineage.steps.len() as u64,
            groups_lost: tally.lost,
            groups_doubled: tally.duplicated,
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
        assert!(within_limits(&worst("rollout", 16.4), 57.0), "the run itself took longer to start");
        assert!(!within_limits(&worst("rollout", 57.5), 57.0));
        assert!(within_limits(&worst("store", 170.0), 8.0), "hangs are detected separately");
    }
}
