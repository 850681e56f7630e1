//! Stage 2 as three kinds of processes: reward service, learner and rollout workers. Restarts the reward service and workers when they
//! fail, and ends all processes together.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::LaunchError;
use crate::gpus::{Gpu, Placement};
use crate::restart_backoff::{RestartBackoff, limit_reached};
use crate::role_process::{RoleCommand, RoleProcess};

/// Timeout for the reward service to become ready; the learner gets several times as long.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// The processes of stage 2.
pub(crate) struct Stage2<'a> {
    pub unveil: &'a Path,
    pub unveil_reward: &'a Path,
    pub config: &'a Path,
    pub logs: &'a Path,
    /// The learner's ranks and the rollout workers, and the GPU of each.
    pub placement: Placement,
    /// Address of a running reward service; empty: one is started here.
    pub reward_address: &'a str,
    /// Scheme of the addresses of services started here: `http` or `https`.
    pub scheme: &'static str,
}

struct Worker {
    number: usize,
    incarnation: u32,
    role: Option<RoleProcess>,
    restarts: RestartBackoff,
    /// Whether it has ended for good, or its restart is not due yet.
    ended: bool,
}

impl Worker {
    fn new(number: usize) -> Self {
        Self { number, incarnation: 0, role: None, restarts: RestartBackoff::default(), ended: false }
    }
}

impl Stage2<'_> {
    /// Runs until the learner has ended; all processes have ended when this returns.
    pub(crate) fn run(&self, stop: &dyn Fn() -> bool, note: &dyn Fn(&str)) -> Result<(), LaunchError> {
        let check_stop = || if stop() { Err(LaunchError::Interrupted) } else { Ok(()) };
        let mut reward = None;
        let mut reward_address = self.reward_address.to_owned();
        if reward_address.is_empty() {
            let mut role = self.start_reward_service(None)?;
            let bound = role.wait_for_address(READY_TIMEOUT, &mut || check_stop())?;
            reward_address = format!("{}://{bound}", self.scheme);
            reward = Some((role, bound, RestartBackoff::default(), false));
        }
        let mut learner = self.start_rank(0, &[])?;
        let mut ranks: Vec<RoleProcess> = Vec::new();
        if self.placement.ranks.len() > 1 {
            let rendezvous = learner.wait_for_address(READY_TIMEOUT * 5, &mut || check_stop())?;
            for rank in 1..self.placement.ranks.len() {
                let sets =
                    [format!("learner.parallel.rank={rank}"), format!("learner.parallel.rendezvous={rendezvous}")];
                ranks.push(self.start_rank(rank, &sets)?);
            }
        }
        // Rank 0 would wait a long time for a rank that failed to start.
        let mut check_ranks = || match ranks.iter_mut().find_map(|r| Some((r.exit_status()?, r))) {
            Some((status, rank)) => Err(rank.failure(status)),
            None => check_stop(),
        };
        let learner_address =
            format!("{}://{}", self.scheme, learner.wait_for_address(READY_TIMEOUT * 5, &mut check_ranks)?);
        let mut workers: Vec<Worker> = (0..self.placement.workers.len()).map(Worker::new).collect();
        let mut reported = BTreeSet::new();
        let outcome = loop {
            if stop() {
                break Err(LaunchError::Interrupted);
            }
            if let Some(status) = learner.exit_status() {
                break if status.success() { Ok(()) } else { Err(learner.failure(status)) };
            }
            // A failed rank ends rank 0 as well, which says why; here only the log of the rank is pointed out.
            for role in &mut ranks {
                let failed = role.exit_status().filter(|s| !s.success());
                if let Some(status) = failed.filter(|_| reported.insert(role.name.clone())) {
                    note(&role.failure(status).to_string());
                }
            }
            if let Some((role, bound, restarts, ended)) = &mut reward
                && let Some(status) = role.exit_status()
            {
                let now = Instant::now();
                if !std::mem::replace(ended, true) {
                    let Some(delay) = restarts.record_exit(now) else {
                        note(&format!("reward service ended with {status}; {}", limit_reached()));
                        break Err(role.failure(status));
                    };
                    let delay = delay.as_secs_f64();
                    note(&format!("reward service ended with {status}; restarting it on {bound} in {delay:.1} s"));
                }
                if restarts.take_due(now) {
                    *role = self.start_reward_service(Some(bound))?;
                    *ended = false;
                }
            }
            if let Err(e) = self.keep_workers(&mut workers, &learner_address, &reward_address, note) {
                // The learner asks its workers to leave before it exits itself.
                if learner.exit_status().is_none() {
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
        // Ranks end with rank 0, so they need only a moment.
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

    /// Starts workers that are not running, unless they ended successfully or their restart is not due.
    fn keep_workers(
        &self,
        workers: &mut [Worker],
        learner: &str,
        reward: &str,
        note: &dyn Fn(&str),
    ) -> Result<(), LaunchError> {
        for w in workers {
            let now = Instant::now();
            match w.role.as_mut().map(|r| (r.exit_status(), r)) {
                Some((None, _)) => continue,
                Some((Some(status), _)) if status.success() => continue,
                Some((Some(status), role)) if !w.ended => {
                    let Some(delay) = w.restarts.record_exit(now) else {
                        note(&format!("rollout worker {} ended with {status}; {}", w.number, limit_reached()));
                        return Err(role.failure(status));
                    };
                    let delay = delay.as_secs_f64();
                    note(&format!("rollout worker {} ended with {status}; restarting it in {delay:.1} s", w.number));
                    w.ended = true;
                    continue;
                }
                Some(_) if !w.restarts.take_due(now) => continue,
                Some(_) | None => {}
            }
            w.ended = false;
            w.incarnation += 1;
            let name = format!("rollout-{}", w.number);
            let sets = [format!("learner.address={learner}"), format!("reward.address={reward}")];
            let worker = format!("{name}#{}", w.incarnation);
            let command = ["rollout", "--worker", &worker];
            let gpu = self.placement.workers[w.number].as_ref();
            w.role =
                Some(self.start_role(self.unveil, &command, &sets, RoleOptions { name: &name, shown: false, gpu })?);
        }
        Ok(())
    }

    fn start_reward_service(&self, listen: Option<&str>) -> Result<RoleProcess, LaunchError> {
        let sets: Vec<String> = listen.map(|a| format!("reward.listen={a}")).into_iter().collect();
        self.start_role(self.unveil_reward, &["serve"], &sets, RoleOptions { name: "reward", shown: false, gpu: None })
    }

    /// Starts a rank of the learner; stderr of rank 0 goes to the terminal.
    fn start_rank(&self, rank: usize, sets: &[String]) -> Result<RoleProcess, LaunchError> {
        let name = if rank == 0 { "learner".to_owned() } else { format!("learner-{rank}") };
        let gpu = self.placement.ranks[rank].as_ref();
        self.start_role(self.unveil, &["learner"], sets, RoleOptions { name: &name, shown: rank == 0, gpu })
    }

    fn start_role(
        &self,
        program: &Path,
        command: &[&str],
        sets: &[String],
        options: RoleOptions<'_>,
    ) -> Result<RoleProcess, LaunchError> {
        let RoleOptions { name, shown, gpu } = options;
        let mut args: Vec<String> = command.iter().map(|s| (*s).to_owned()).collect();
        args.extend(["--config".into(), self.config.display().to_string(), "--supervised".into()]);
        args.extend(sets.iter().flat_map(|s| ["--set".to_owned(), s.clone()]));
        let log: PathBuf = self.logs.join(format!("{name}.log"));
        RoleProcess::start(RoleCommand { name, program, args, log: &log, shown, gpu })
    }
}

/// Name, terminal and GPU of a role of stage 2.
struct RoleOptions<'a> {
    name: &'a str,
    shown: bool,
    gpu: Option<&'a Gpu>,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::gpus::Gpus;

    /// Script that plays all roles and records its GPU and options; the learner ends when both workers have run twice.
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
    fn each_process_keeps_its_gpu_across_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("role");
        std::fs::write(&program, ROLE).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let seen = |device: &str, visible: &str, share: bool| {
            let _may_not_exist = std::fs::remove_file(dir.path().join("seen"));
            let gpus = Gpus::from_count(device, Some(visible), visible.split(',').count()).unwrap();
            let stage = Stage2 {
                unveil: &program,
                unveil_reward: &program,
                config: Path::new("run.toml"),
                logs: dir.path(),
                placement: gpus.assign(2, 2, share).unwrap(),
                reward_address: "",
                scheme: "http",
            };
            stage.run(&|| false, &|_| ()).unwrap();
            std::fs::read_to_string(dir.path().join("seen")).unwrap()
        };
        let gpu_of = |text: &str, role: &str| -> BTreeSet<String> {
            let starts = text.lines().filter(|l| l.contains(role));
            starts.map(|l| l.rsplit_once("gpu=").unwrap().1.to_owned()).collect()
        };
        let only = |gpu: &str| BTreeSet::from([gpu.to_owned()]);
        let text = seen("auto", "4,5,6,7", false);
        let ranks: Vec<&str> = text.lines().filter(|l| l.starts_with("learner")).collect();
        assert!(ranks.len() == 2 && ranks[0].ends_with("gpu=4") && ranks[1].ends_with("gpu=5"), "{text}");
        assert_eq!((gpu_of(&text, "rollout-0#"), gpu_of(&text, "rollout-1#")), (only("6"), only("7")), "{text}");
        assert!(text.contains("rollout-0#2") && !text.contains("run.device"), "{text}");
        // A shared GPU given by its number is the only one that each process sees.
        let text = seen("cuda:1", "4,5", true);
        assert_eq!((gpu_of(&text, "learner"), gpu_of(&text, "rollout-1#")), (only("5"), only("5")), "{text}");
        let mut gpu_roles = text.lines().filter(|l| !l.starts_with("serve"));
        assert!(gpu_roles.clone().count() >= 6 && gpu_roles.all(|l| l.contains("--set run.device=cuda")), "{text}");
    }
}
