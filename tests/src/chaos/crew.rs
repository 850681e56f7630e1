//! The roles of one run as processes of their own, as a cluster starts them: each is started again when it ends, workers under a new
//! name, and every way between two roles leads through a proxy.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use unveil_testkit::{Link, Process, Sandbox, StoreProxy, StoreServer, binary};

/// Wait between the end of a process and its next start.
const PAUSE: Duration = Duration::from_millis(500);

/// A kind of role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The learner, which hosts experience.
    Learner,
    /// A rollout worker, by number.
    Rollout(usize),
    /// The reward service.
    Reward,
}

/// One place in the crew, filled by one process after another.
struct Place {
    role: Role,
    process: Option<Process>,
    /// The process has announced its address, or needs none.
    ready: bool,
    /// How often it was started.
    starts: usize,
    /// When the last one started or, before that, may start.
    at: Instant,
}

/// What came of the processes.
#[derive(Debug, Clone, Default)]
pub struct Ends {
    /// Processes that ended without being killed by the soak, with the end of what they said.
    pub by_themselves: Vec<String>,
    /// Those among them that panicked.
    pub panics: Vec<String>,
    /// What did not end when it was asked to.
    pub stuck: Vec<String>,
}

/// All roles of a run.
pub struct Crew<'a> {
    sandbox: &'a Sandbox,
    s3: &'a StoreServer,
    store: &'a StoreProxy,
    config: PathBuf,
    sets: Vec<String>,
    places: Vec<Place>,
    /// By worker: to the learner, and to the reward service.
    links: Vec<[Link; 2]>,
    ends: Ends,
}

impl<'a> Crew<'a> {
    /// Starts everything: a learner that saves through `store`, the reward service, and `workers` rollout workers.
    pub fn start(
        sandbox: &'a Sandbox,
        s3: &'a StoreServer,
        store: &'a StoreProxy,
        config: PathBuf,
        sets: Vec<String>,
        workers: usize,
    ) -> Self {
        let roles = [Role::Reward, Role::Learner].into_iter().chain((0..workers).map(Role::Rollout));
        let at = Instant::now();
        let places = roles.map(|role| Place { role, process: None, ready: false, starts: 0, at }).collect();
        let links = (0..workers).map(|_| [Link::start(None), Link::start(None)]).collect();
        let mut crew = Self { sandbox, s3, store, config, sets, places, links, ends: Ends::default() };
        crew.tend();
        crew
    }

    /// The links of a worker: to the learner, and to the reward service.
    pub fn links(&self, worker: usize) -> &[Link; 2] {
        &self.links[worker]
    }

    /// Starts what has ended, and leads the links to where roles have said that they listen. Call it all the time.
    pub fn tend(&mut self) {
        for i in 0..self.places.len() {
            let ended = self.places[i].process.as_mut().is_some_and(|p| !p.is_running());
            if ended {
                let process = self.places[i].process.take().expect("it was there");
                self.note(self.places[i].role, process);
                (self.places[i].ready, self.places[i].at) = (false, Instant::now() + PAUSE);
            }
            if self.places[i].process.is_none() && Instant::now() >= self.places[i].at {
                let process = self.spawn(self.places[i].role, self.places[i].starts);
                let place = &mut self.places[i];
                (place.process, place.at) = (Some(process), Instant::now());
                place.starts += 1;
            }
            let place = &mut self.places[i];
            if let Some(address) = place.process.as_ref().filter(|_| !place.ready).and_then(address) {
                place.ready = true;
                let which = usize::from(place.role == Role::Reward);
                self.links.iter().for_each(|links| links[which].lead_to(address));
            }
        }
    }

    /// Whether a role runs and, where others call it, listens.
    pub fn is_up(&self, role: Role) -> bool {
        let place = self.place(role);
        place.process.is_some() && (place.ready || matches!(role, Role::Rollout(_)))
    }

    /// When the present process of a role was started; none while there is none.
    pub fn started(&self, role: Role) -> Option<Instant> {
        let place = self.place(role);
        place.process.as_ref().map(|_| place.at)
    }

    /// Sends a signal to the process of a role, where there is one.
    pub fn signal(&mut self, role: Role, signal: Signal) {
        let Some(place) = self.places.iter_mut().find(|p| p.role == role) else { return };
        let Some(process) = place.process.take() else { return };
        process.signal(signal);
        if signal == Signal::SIGKILL {
            // Reaped here, so that it does not count as an end by itself.
            drop(process);
            (place.ready, place.at) = (false, Instant::now() + PAUSE);
        } else {
            place.process = Some(process);
        }
    }

    /// Ends the learner as Ctrl-C does, so that it saves, then everything else. Returns what became of all processes.
    pub fn end(mut self, within: Duration) -> Ends {
        let learner = self.places.iter_mut().find(|p| p.role == Role::Learner).and_then(|p| p.process.take());
        if let Some(mut learner) = learner {
            learner.interrupt();
            let until = Instant::now() + within;
            while learner.is_running() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
            if learner.is_running() {
                self.ends.stuck.push(format!("the learner did not end within {within:?} of an interrupt"));
            } else {
                let ended = learner.wait(within);
                if ended.code() != Some(130) {
                    self.ends
                        .stuck
                        .push(format!("after an interrupt the learner ended with {}: {}", ended.status, ended.stderr));
                }
            }
        }
        self.ends
    }

    fn place(&self, role: Role) -> &Place {
        self.places.iter().find(|p| p.role == role).expect("every role has its place")
    }

    fn note(&mut self, role: Role, process: Process) {
        let ended = process.wait(Duration::from_secs(1));
        let lines: Vec<&str> = ended.stderr.lines().collect();
        let last = lines[lines.len().saturating_sub(3)..].join(" | ");
        let what = format!("{role:?} ended with {}: {last}", ended.status);
        if ended.stderr.contains("panicked") {
            self.ends.panics.push(what.clone());
        }
        self.ends.by_themselves.push(what);
    }

    fn spawn(&self, role: Role, earlier: usize) -> Process {
        let config = self.config.to_string_lossy().into_owned();
        let (program, mut args): (&str, Vec<String>) = match role {
            Role::Learner => ("unveil", vec!["learner".into()]),
            Role::Reward => ("unveil-reward", vec!["serve".into()]),
            Role::Rollout(i) => ("unveil", vec!["rollout".into(), "--worker".into(), format!("worker-{i}-{earlier}")]),
        };
        args.extend(["--config".to_owned(), config]);
        let mut sets = self.sets.clone();
        if let Role::Rollout(i) = role {
            let [learner, reward] = self.links(i);
            sets.push(format!("learner.address=http://{}", learner.address()));
            sets.push(format!("reward.address=http://{}", reward.address()));
        }
        args.extend(sets.into_iter().flat_map(|set| ["--set".to_owned(), set]));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut command = self.sandbox.command(&binary(program), &args);
        self.sandbox.start(self.s3.tell(&mut command, &self.store.url()))
    }
}

/// The address in the line by which a role says that it is ready.
fn address(process: &Process) -> Option<SocketAddr> {
    let text = process.stdout();
    let (line, _) = text.split_once('\n')?;
    serde_json::from_str::<Value>(line).ok()?["address"].as_str()?.parse().ok()
}

/// Updates in a run's event log, read on from where it was left.
pub struct Tail {
    path: PathBuf,
    read: usize,
    updates: usize,
}

impl Tail {
    /// Of the run in a directory.
    pub fn of(run: &Path) -> Self {
        Self { path: run.join("events.jsonl"), read: 0, updates: 0 }
    }

    /// Updates so far, those that were done again among them.
    pub fn updates(&mut self) -> usize {
        use std::io::{Read, Seek, SeekFrom};
        let mut text = Vec::new();
        let read = std::fs::File::open(&self.path).and_then(|mut f| {
            f.seek(SeekFrom::Start(self.read as u64))?;
            f.read_to_end(&mut text)
        });
        if read.is_ok() {
            let end = text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
            let is_update = |line: &&[u8]| serde_json::from_slice::<Value>(line).is_ok_and(|e| e["kind"] == "train");
            self.updates += text[..end].split(|b| *b == b'\n').filter(is_update).count();
            self.read += end;
        }
        self.updates
    }
}
