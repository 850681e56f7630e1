//! Supervisor of the roles of one run as separate processes, like a cluster: each is restarted when it exits, workers under a new name,
//! and every connection between two roles goes through a proxy.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use unveil_testkit::{NetworkLink, Process, Sandbox, StoreProxy, StoreServer, binary};

/// Delay between the end of a process and its restart.
const RESTART_DELAY: Duration = Duration::from_millis(500);

/// Role of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// The learner, which hosts the experience service.
    Learner,
    /// A rollout worker, by number.
    Rollout(usize),
    /// The reward service.
    Reward,
}

/// Slot of a role, occupied by one process after another.
struct RoleSlot {
    role: Role,
    process: Option<Process>,
    /// Whether the process has announced its address.
    ready: bool,
    /// Number of starts so far.
    starts: usize,
    /// Start of the current process, or earliest time of the next start.
    start: Instant,
}

/// Outcome of the processes.
#[derive(Debug, Clone, Default)]
pub(super) struct ProcessExits {
    /// Processes that exited without being killed by the soak, with the end of their output.
    pub by_themselves: Vec<String>,
    /// Those that panicked.
    pub panics: Vec<String>,
    /// Processes that did not exit as requested.
    pub stuck: Vec<String>,
}

/// Supervisor of all roles of a run.
pub(super) struct RoleSupervisor<'a> {
    sandbox: &'a Sandbox,
    s3: &'a StoreServer,
    store: &'a StoreProxy,
    config: String,
    sets: Vec<String>,
    slots: Vec<RoleSlot>,
    /// Links of each worker: to the learner, and to the reward service.
    links: Vec<[NetworkLink; 2]>,
    exits: ProcessExits,
}

impl<'a> RoleSupervisor<'a> {
    /// Starts everything: a learner that saves through `store`, the reward service, and `workers` rollout workers.
    pub(super) fn start(
        sandbox: &'a Sandbox,
        s3: &'a StoreServer,
        store: &'a StoreProxy,
        config: String,
        sets: Vec<String>,
        workers: usize,
    ) -> Self {
        let roles = [Role::Reward, Role::Learner].into_iter().chain((0..workers).map(Role::Rollout));
        let start = Instant::now();
        let slots = roles.map(|role| RoleSlot { role, process: None, ready: false, starts: 0, start }).collect();
        let links = (0..workers).map(|_| [NetworkLink::start(None), NetworkLink::start(None)]).collect();
        let exits = ProcessExits::default();
        let mut supervisor = Self { sandbox, s3, store, config, sets, slots, links, exits };
        supervisor.restart_exited();
        supervisor
    }

    /// Returns the links of a worker: to the learner, and to the reward service.
    pub(super) fn links(&self, worker: usize) -> &[NetworkLink; 2] {
        &self.links[worker]
    }

    /// Restarts exited processes, and points the links at the addresses that roles have announced. Call it continually.
    pub(super) fn restart_exited(&mut self) {
        for i in 0..self.slots.len() {
            let exited = self.slots[i].process.as_mut().is_some_and(|p| !p.is_running());
            if exited {
                let process = self.slots[i].process.take().expect("the slot has a process");
                self.record_exit(self.slots[i].role, process);
                self.slots[i].ready = false;
                self.slots[i].start = Instant::now() + RESTART_DELAY;
            }
            if self.slots[i].process.is_none() && Instant::now() >= self.slots[i].start {
                let process = self.spawn(self.slots[i].role, self.slots[i].starts);
                let slot = &mut self.slots[i];
                slot.process = Some(process);
                slot.start = Instant::now();
                slot.starts += 1;
            }
            let slot = &mut self.slots[i];
            if let Some(address) = slot.process.as_ref().filter(|_| !slot.ready).and_then(announced_address) {
                slot.ready = true;
                let link = usize::from(slot.role == Role::Reward);
                self.links.iter().for_each(|links| links[link].redirect_to(address));
            }
        }
    }

    /// Returns whether a role runs and, if it is a service, listens.
    pub(super) fn is_up(&self, role: Role) -> bool {
        let slot = self.slot(role);
        slot.process.is_some() && (slot.ready || matches!(role, Role::Rollout(_)))
    }

    /// Returns the start time of the current process of a role; `None` if it does not run.
    pub(super) fn started(&self, role: Role) -> Option<Instant> {
        let slot = self.slot(role);
        slot.process.as_ref().map(|_| slot.start)
    }

    /// Sends a signal to the process of a role, if it runs.
    pub(super) fn signal(&mut self, role: Role, signal: Signal) {
        let Some(slot) = self.slots.iter_mut().find(|s| s.role == role) else { return };
        let Some(process) = slot.process.take() else { return };
        process.signal(signal);
        if signal == Signal::SIGKILL {
            // Reaped here, so that it does not count as an exit by itself.
            drop(process);
            slot.ready = false;
            slot.start = Instant::now() + RESTART_DELAY;
        } else {
            slot.process = Some(process);
        }
    }

    /// Interrupts the learner like Ctrl-C, so that it saves, then stops all other roles. Returns the outcome of all processes.
    pub(super) fn shut_down(mut self, within: Duration) -> ProcessExits {
        let learner = self.slots.iter_mut().find(|s| s.role == Role::Learner).and_then(|s| s.process.take());
        if let Some(mut learner) = learner {
            learner.interrupt();
            let until = Instant::now() + within;
            while learner.is_running() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
            if learner.is_running() {
                self.exits.stuck.push(format!("the learner did not exit within {within:?} of an interrupt"));
            } else {
                let finished = learner.wait(within);
                if finished.code() != Some(130) {
                    let message =
                        format!("after an interrupt the learner exited with {}: {}", finished.status, finished.stderr);
                    self.exits.stuck.push(message);
                }
            }
        }
        self.exits
    }

    fn slot(&self, role: Role) -> &RoleSlot {
        self.slots.iter().find(|s| s.role == role).expect("every role has a slot")
    }

    fn record_exit(&mut self, role: Role, process: Process) {
        let finished = process.wait(Duration::from_secs(1));
        let lines: Vec<&str> = finished.stderr.lines().collect();
        let last = lines[lines.len().saturating_sub(3)..].join(" | ");
        let message = format!("{role:?} exited with {}: {last}", finished.status);
        if finished.stderr.contains("panicked") {
            self.exits.panics.push(message.clone());
        }
        self.exits.by_themselves.push(message);
    }

    fn spawn(&self, role: Role, starts: usize) -> Process {
        let (program, mut args): (&str, Vec<String>) = match role {
            Role::Learner => ("unveil", vec!["learner".into()]),
            Role::Reward => ("unveil-reward", vec!["serve".into()]),
            Role::Rollout(i) => ("unveil", vec!["rollout".into(), "--worker".into(), format!("worker-{i}-{starts}")]),
        };
        args.extend(["--config".to_owned(), self.config.clone()]);
        let mut sets = self.sets.clone();
        if let Role::Rollout(i) = role {
            let [learner, reward] = self.links(i);
            sets.push(format!("learner.address=http://{}", learner.address()));
            sets.push(format!("reward.address=http://{}", reward.address()));
        }
        args.extend(sets.into_iter().flat_map(|set| ["--set".to_owned(), set]));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut command = self.sandbox.command(&binary(program), &args);
        self.sandbox.start(self.s3.configure(&mut command, &self.store.url()))
    }
}

/// Returns the address in the ready line of a role.
fn announced_address(process: &Process) -> Option<SocketAddr> {
    let text = process.stdout();
    let (line, _) = text.split_once('\n')?;
    serde_json::from_str::<Value>(line).ok()?["address"].as_str()?.parse().ok()
}

/// Incremental reader of the updates in the event log of a run.
pub(super) struct EventTail {
    path: PathBuf,
    position: usize,
    updates: usize,
}

impl EventTail {
    /// Creates a reader for the run in a directory.
    pub(super) fn new(run: &Path) -> Self {
        Self { path: run.join("events.jsonl"), position: 0, updates: 0 }
    }

    /// Returns the number of updates so far, including repeated ones.
    pub(super) fn updates(&mut self) -> usize {
        use std::io::{Read, Seek, SeekFrom};
        let mut text = Vec::new();
        let read = std::fs::File::open(&self.path).and_then(|mut f| {
            f.seek(SeekFrom::Start(self.position as u64))?;
            f.read_to_end(&mut text)
        });
        if read.is_ok() {
            let end = text.iter().rposition(|b| *b == b'\n').map_or(0, |newline| newline + 1);
            let is_update = |line: &&[u8]| serde_json::from_slice::<Value>(line).is_ok_and(|e| e["kind"] == "train");
            self.updates += text[..end].split(|b| *b == b'\n').filter(is_update).count();
            self.position += end;
        }
        self.updates
    }
}
