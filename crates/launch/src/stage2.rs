//! Stage 2 as three kinds of processes: reward service, learner, rollout workers. Restarts what may be restarted, ends all together.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::LaunchError;
use crate::child::{Role, Start};
use crate::gpus::{Gpu, Placement};
use crate::restarts::{Restarts, too_often};

const READY: Duration = Duration::from_secs(60);

/// What stage 2 starts.
pub(crate) struct Stage2<'a> {
    pub unveil: &'a Path,
    pub unveil_reward: &'a Path,
    pub config: &'a Path,
    pub logs: &'a Path,
    /// The learner's ranks and the rollout workers, and the GPU of each.
    pub placement: Placement,
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

impl Worker {
    fn new(number: usize) -> Self {
        Self { number, incarnation: 0, role: None, restarts: Restarts::default(), ended: false }
    }
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
        let mut learner = self.rank(0, &[])?;
        let mut ranks: Vec<Role> = Vec::new();
        if self.placement.ranks.len() > 1 {
            let meet = learner.address(READY * 5, &mut || going())?;
            for rank in 1..self.placement.ranks.len() {
                let sets = [format!("learner.parallel.rank={rank}"), format!("learner.parallel.rendezvous={meet}")];
                ranks.push(self.rank(rank, &sets)?);
            }
        }
        // Rank 0 would wait for long for a rank that could not even start.
        let mut together = || match ranks.iter_mut().find_map(|r| Some((r.exited()?, r))) {
            Some((status, rank)) => Err(rank.failed(status)),
            None => going(),
        };
        let learner_address = format!("{}://{}", self.scheme, learner.address(READY * 5, &mut together)?);
        let mut workers: Vec<Worker> = (0..self.placement.workers.len()).map(Worker::new).collect();
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
            let command = ["rollout", "--worker", &worker];
            let gpu = self.placement.workers[w.number].as_ref();
            w.role = Some(self.role(self.unveil, &command, &sets, Shape { name: &name, shown: false, gpu })?);
        }
        Ok(())
    }

    fn reward(&self, listen: Option<&str>) -> Result<Role, LaunchError> {
        let sets: Vec<String> = listen.map(|a| format!("reward.listen={a}")).into_iter().collect();
        self.role(self.unveil_reward, &["serve"], &sets, Shape { name: "reward", shown: false, gpu: None })
    }

    /// A rank of the learner; the first one has the terminal.
    fn rank(&self, rank: usize, sets: &[String]) -> Result<Role, LaunchError> {
        let name = if rank == 0 { "learner".to_owned() } else { format!("learner-{rank}") };
        let gpu = self.placement.ranks[rank].as_ref();
        self.role(self.unveil, &["learner"], sets, Shape { name: &name, shown: rank == 0, gpu })
    }

    fn role(&self, program: &Path, command: &[&str], sets: &[String], shape: Shape<'_>) -> Result<Role, LaunchError> {
        let Shape { name, shown, gpu } = shape;
        let mut args: Vec<String> = command.iter().map(|s| (*s).to_owned()).collect();
        args.extend(["--config".into(), self.config.display().to_string(), "--supervised".into()]);
        args.extend(sets.iter().flat_map(|s| ["--set".to_owned(), s.clone()]));
        let log: PathBuf = self.logs.join(format!("{name}.log"));
        Role::start(Start { name, program, args, log: &log, shown, gpu })
    }
}

/// How a role of stage 2 is started, beside what it does.
struct Shape<'a> {
    name: &'a str,
    shown: bool,
    gpu: Option<&'a Gpu>,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::gpus::Gpus;

    /// Roles that write down which GPU they see and with which options they were started; the learner ends when both workers have been
    /// there twice.
    const ROLE: &str = r#"#!/bin/sh
echo "$* gpu=${CUDA_VISIBLE_DEVICES-unset}" >> "$(dirname "$0")/seen"
case "$1" in
  serve) echo '{"address":"127.0.0.1:1"}'; exec sleep 60;;
  rollout) exit 7;;
  learner)
    echo '{"address":"127.0.0.1:2"}'
    case "$*" in *parallel.rank=*) exec sleep 60;; esac
    echo '{"address":"127.0.0.1:3"}'
    until [ "$(grep -c '^rollout' "$(dirname "$0")/seen")" -ge 4 ]; do sleep 0.05; done;;
esac
"#;

    #[test]
    fn each_process_sees_its_own_gpu_and_keeps_it_when_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("role");
        std::fs::write(&program, ROLE).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let seen = |device: &str, visible: &str, share: bool| {
            let _first = std::fs::remove_file(dir.path().join("seen"));
            let gpus = Gpus::among(device, Some(visible), visible.split(',').count()).unwrap();
            let stage = Stage2 {
                unveil: &program,
                unveil_reward: &program,
                config: Path::new("run.toml"),
                logs: dir.path(),
                placement: gpus.place(2, 2, share).unwrap(),
                reward_address: "",
                scheme: "http",
            };
            stage.run(&|| false, &|_| ()).unwrap();
            std::fs::read_to_string(dir.path().join("seen")).unwrap()
        };
        let gpu_of = |text: &str, role: &str| -> BTreeSet<String> {
            let own = text.lines().filter(|l| l.contains(role));
            own.map(|l| l.rsplit_once("gpu=").unwrap().1.to_owned()).collect()
        };
        let only = |gpu: &str| BTreeSet::from([gpu.to_owned()]);
        let text = seen("auto", "4,5,6,7", false);
        let ranks: Vec<&str> = text.lines().filter(|l| l.starts_with("learner")).collect();
        assert!(ranks.len() == 2 && ranks[0].ends_with("gpu=4") && ranks[1].ends_with("gpu=5"), "{text}");
        assert_eq!((gpu_of(&text, "rollout-0#"), gpu_of(&text, "rollout-1#")), (only("6"), only("7")), "{text}");
        assert!(text.contains("rollout-0#2") && !text.contains("run.device"), "{text}");
        // One GPU by its number, shared: it is the only one that a process sees.
        let text = seen("cuda:1", "4,5", true);
        assert_eq!((gpu_of(&text, "learner"), gpu_of(&text, "rollout-1#")), (only("5"), only("5")), "{text}");
        let own = text.lines().filter(|l| !l.starts_with("serve"));
        assert!(own.clone().count() >= 6 && own.clone().all(|l| l.contains("--set run.device=cuda")), "{text}");
    }
}
