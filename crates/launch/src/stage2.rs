//! Stage 2 as three kinds of processes: reward service, learner, rollout workers. Restarts what may be restarted, ends all together.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::LaunchError;
use crate::child::Role;
use crate::restarts::{Restarts, too_often};

const READY: Duration = Duration::from_secs(60);

/// What stage 2 starts.
pub(crate) struct Stage2<'a> {
    pub unveil: &'a Path,
    pub unveil_reward: &'a Path,
    pub config: &'a Path,
    pub logs: &'a Path,
    pub workers: usize,
    /// Ranks of the learner.
    pub ranks: usize,
    /// Addresses that the configuration names; empty = start the role here.
    pub reward_address: &'a str,
    /// How services that are started here are spoken to: `http` or `https`.
    pub scheme: &'static str,
}

struct Worker {
    number: usize,
    incarnation: u32,
    role: Option<Role>,
    restarts: Restarts,
    /// It has ended for good, or its restart is not due yet.
    ended: bool,
}

impl Stage2<'_> {
    /// Runs until the learner has ended; every process is gone when this returns.
    pub fn run(&self, stop: &dyn Fn() -> bool, note: &dyn Fn(&str)) -> Result<(), LaunchError> {
        let going = || if stop() { Err(LaunchError::Interrupted) } else { Ok(()) };
        let mut reward = None;
        let mut reward_address = self.reward_address.to_owned();
        if reward_address.is_empty() {
            let mut role = self.reward(None)?;
            let bound = role.address(READY, &mut || going())?;
            reward_address = format!("{}://{bound}", self.scheme);
            reward = Some((role, bound, Restarts::default(), false));
        }
        let mut learner = self.role("learner", self.unveil, &["learner"], &[], true)?;
        let mut ranks: Vec<Role> = Vec::new();
        if self.ranks > 1 {
            let meet = learner.address(READY * 5, &mut || going())?;
            for rank in 1..self.ranks {
                let sets = [format!("learner.parallel.rank={rank}"), format!("learner.parallel.rendezvous={meet}")];
                ranks.push(self.role(&format!("learner-{rank}"), self.unveil, &["learner"], &sets, false)?);
            }
        }
        // Rank 0 would wait for long for a rank that could not even start.
        let mut together = || match ranks.iter_mut().find_map(|r| Some((r.exited()?, r))) {
            Some((status, rank)) => Err(rank.failed(status)),
            None => going(),
        };
        let learner_address = format!("{}://{}", self.scheme, learner.address(READY * 5, &mut together)?);
        let mut workers: Vec<Worker> =
            (0..self.workers).map(|number| Worker { number, incarnation: 0, role: None, restarts: Restarts::default(), ended: false }).collect();
        let mut told = BTreeSet::new();
        let outcome = loop {
            if stop() {
                break Err(LaunchError::Interrupted);
            }
            if let Some(status) = learner.exited() {
                break if status.success() { Ok(()) } else { Err(learner.failed(status)) };
            }
            // A rank that fails takes rank 0 with it, which says why; here it is only shown where to read more.
            for role in &mut ranks {
                if let Some(status) = role.exited().filter(|s| !s.success()).filter(|_| told.insert(role.name.clone()))
                {
                    note(&role.failed(status).to_string());
                }
            }
            if let Some((role, bound, restarts, ended)) = &mut reward
                && let Some(status) = role.exited()
            {
                let now = Instant::now();
                if !std::mem::replace(ended, true) {
                    let Some(wait) = restarts.died(now) else {
                        note(&format!("reward service ended with {status}; {}", too_often()));
                        break Err(role.failed(status));
                    };
                    let wait = wait.as_secs_f64();
                    note(&format!("reward service ended with {status}; starting it again on {bound} in {wait:.1} s"));
                }
                if restarts.due(now) {
                    *role = self.reward(Some(bound))?;
                    *ended = false;
                }
            }
            if let Err(e) = self.keep_workers(&mut workers, &learner_address, &reward_address, note) {
                // The learner tells its workers to leave before it exits itself.
                if learner.exited().is_none() {
                    break Err(e);
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        if outcome.is_err() {
            learner.terminate();
        }
        for worker in workers.iter().filter_map(|w| w.role.as_ref()) {
            worker.terminate();
        }
        let deadline = Instant::now() + Duration::from_secs(4);
        // Ranks end with rank 0: what they still do is over in a moment.
        for role in &ranks {
            role.terminate();
        }
        learner.reap(deadline);
        for role in &mut ranks {
            role.reap(deadline);
        }
        for worker in workers.iter_mut().filter_map(|w| w.role.as_mut()) {
            worker.reap(deadline);
        }
        if let Some((role, ..)) = &mut reward {
            role.terminate();
            role.reap(deadline);
        }
        outcome
    }

    fn keep_workers(
        &self,
        workers: &mut [Worker],
        learner: &str,
        reward: &str,
        note: &dyn Fn(&str),
    ) -> Result<(), LaunchError> {
        for w in workers {
            let now = Instant::now();
            match w.role.as_mut().map(|r| (r.exited(), r)) {
                Some((None, _)) => continue,
                Some((Some(status), _)) if status.success() => continue,
                Some((Some(status), role)) if !w.ended => {
                    let Some(wait) = w.restarts.died(now) else {
                        note(&format!("rollout worker {} ended with {status}; {}", w.number, too_often()));
                        return Err(role.failed(status));
                    };
                    let wait = wait.as_secs_f64();
                    note(&format!("rollout worker {} ended with {status}; starting it again in {wait:.1} s", w.number));
                    w.ended = true;
                    continue;
                }
                Some(_) if !w.restarts.due(now) => continue,
                Some(_) | None => {}
            }
            w.ended = false;
            w.incarnation += 1;
            let name = format!("rollout-{}", w.number);
            let sets = [format!("learner.address={learner}"), format!("reward.address={reward}")];
            let worker = format!("{name}#{}", w.incarnation);
            w.role = Some(self.role(&name, self.unveil, &["rollout", "--worker", &worker], &sets, false)?);
        }
        Ok(())
    }

    fn reward(&self, listen: Option<&str>) -> Result<Role, LaunchError> {
        let sets: Vec<String> = listen.map(|a| format!("reward.listen={a}")).into_iter().collect();
        self.role("reward", self.unveil_reward, &["serve"], &sets, false)
    }

    fn role(
        &self,
        name: &str,
        program: &Path,
        command: &[&str],
        sets: &[String],
        shown: bool,
    ) -> Result<Role, LaunchError> {
        let mut args: Vec<String> = command.iter().map(|s| (*s).to_owned()).collect();
        args.extend(["--config".into(), self.config.display().to_string(), "--supervised".into()]);
        args.extend(sets.iter().flat_map(|s| ["--set".to_owned(), s.clone()]));
        let log: PathBuf = self.logs.join(format!("{name}.log"));
        Role::start(name, program, &args, &log, shown)
    }
}
