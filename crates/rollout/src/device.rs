//! The one thread that owns the model. Commands go in by channel, answers come back by one-shot channels.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tch::Device as Place;
use tokio::sync::oneshot;
use unveil_config::Config;
use unveil_engine::{Engine, EngineError, GroupOutput, GroupRequest, Ticket};
use unveil_model::{GpuMemory, gpu_memory};

use crate::hand::Progress;
use crate::weights::Update;
use crate::{Result, RolloutError, open_engine};

/// What the thread needs to start.
pub(crate) struct DeviceSpec {
    pub model_dir: PathBuf,
    pub config: Config,
    pub banned: Vec<u32>,
    /// Told of each step.
    pub progress: Progress,
}

/// Groups that were generated.
pub(crate) struct Generated {
    pub outputs: Vec<GroupOutput>,
    /// Milliseconds for all of them.
    pub ms: f64,
    /// Memory of the GPU when they were done.
    pub gpu: Option<GpuMemory>,
}

enum Command {
    Generate(Vec<GroupRequest>, oneshot::Sender<Result<Generated>>),
    Load(Update, oneshot::Sender<Result<Update, String>>),
}

/// How long the thread is waited for at the end.
const CLOSING: Duration = Duration::from_secs(2);

/// Handle of the thread. Dropping it ends the thread after the present command.
pub(crate) struct DeviceThread {
    commands: mpsc::Sender<Command>,
    thread: JoinHandle<()>,
}

impl DeviceThread {
    /// Starts the thread and waits until the model is loaded. While `cancel` is true, generation ends early.
    pub async fn start(spec: DeviceSpec, cancel: Arc<AtomicBool>) -> Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let (ready, loaded) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("unveil-device".to_owned())
            .spawn(move || {
                let engine = open_engine(&spec.config, &spec.model_dir, spec.config.rollout.threads, &spec.banned);
                match engine.and_then(|engine| Ok((engine, unveil_model::device(&spec.config.run.device)?))) {
                    Ok((engine, place)) => {
                        if ready.send(Ok(())).is_ok() {
                            let progress = spec.progress;
                            let device = Device {
                                engine,
                                place,
                                jobs: Vec::new(),
                                warned: false,
                                progress,
                                #[cfg(test)]
                                model_dir: spec.model_dir,
                            };
                            device.serve(&inbox, &cancel);
                        }
                    }
                    Err(e) => drop(ready.send(Err(e))),
                }
            })
            .map_err(RolloutError::io("cannot start the model's thread"))?;
        loaded.await.map_err(|_| RolloutError::Died("model thread"))??;
        Ok(Self { commands, thread })
    }

    /// Ends the thread and waits for it, so that the process does not leave while it computes.
    pub async fn close(self) {
        drop(self.commands);
        let joined = tokio::task::spawn_blocking(move || self.thread.join());
        if tokio::time::timeout(CLOSING, joined).await.is_err() {
            tracing::warn!("the model's thread is still busy");
        }
    }

    /// Generates groups, together with whatever is under way.
    pub async fn generate(&self, requests: Vec<GroupRequest>) -> Result<Generated> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Generate(requests, reply))?;
        answer.await.map_err(|_| RolloutError::Died("model thread"))?
    }

    /// Takes weights over between two steps and gives them back; the inner error says why they are refused.
    pub async fn load(&self, update: Update) -> Result<Result<Update, String>> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Load(update, reply))?;
        answer.await.map_err(|_| RolloutError::Died("model thread"))
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).map_err(|_| RolloutError::Died("model thread"))
    }
}

/// Groups that were asked for together.
struct Job {
    tickets: Vec<Ticket>,
    outputs: Vec<Option<GroupOutput>>,
    start: Instant,
    reply: oneshot::Sender<Result<Generated>>,
}

impl Job {
    /// Answers when every group is there; otherwise it goes on.
    fn settle(self, place: Place) -> Option<Self> {
        if self.outputs.iter().any(Option::is_none) {
            return Some(self);
        }
        let ms = self.start.elapsed().as_secs_f64() * 1e3;
        let outputs = self.outputs.into_iter().flatten().collect();
        drop(self.reply.send(Ok(Generated { outputs, ms, gpu: gpu_memory(place) })));
        None
    }

    fn put(&mut self, ticket: Ticket, output: GroupOutput) -> Option<GroupOutput> {
        match self.tickets.iter().position(|t| *t == ticket) {
            Some(at) => {
                self.outputs[at] = Some(output);
                None
            }
            None => Some(output),
        }
    }
}

/// The engine, and who waits for what it makes.
struct Device {
    engine: Engine,
    place: Place,
    jobs: Vec<Job>,
    /// It was said that steps are not recorded.
    warned: bool,
    progress: Progress,
    #[cfg(test)]
    model_dir: PathBuf,
}

impl Device {
    /// Takes commands between steps, so that weights change under groups that are under way. Ends when nobody is left to send.
    fn serve(mut self, inbox: &mpsc::Receiver<Command>, cancel: &AtomicBool) {
        loop {
            let command = if self.jobs.is_empty() {
                let Ok(command) = inbox.recv() else { return };
                Some(command)
            } else {
                match inbox.try_recv() {
                    Ok(command) => Some(command),
                    Err(mpsc::TryRecvError::Empty) => None,
                    Err(mpsc::TryRecvError::Disconnected) => return,
                }
            };
            match command {
                Some(Command::Generate(requests, reply)) => self.submit(requests, reply),
                Some(Command::Load(update, reply)) => drop(reply.send(self.load(update))),
                None => self.step(cancel),
            }
        }
    }

    fn submit(&mut self, requests: Vec<GroupRequest>, reply: oneshot::Sender<Result<Generated>>) {
        let outputs = requests.iter().map(|_| None).collect();
        let mut tickets = Vec::with_capacity(requests.len());
        for request in requests {
            match self.engine.submit(request) {
                Ok(ticket) => tickets.push(ticket),
                Err(e) => {
                    tickets.into_iter().for_each(|t| drop(self.engine.cancel(t)));
                    return drop(reply.send(Err(e.into())));
                }
            }
        }
        self.jobs.extend(Job { tickets, outputs, start: Instant::now(), reply }.settle(self.place));
    }

    fn load(&mut self, update: Update) -> Result<Update, String> {
        self.progress.step();
        update.load_into(&mut self.engine).map(|()| update).map_err(|e| e.to_string())
    }

    /// One token for everything under way; after `cancel`, what there is.
    fn step(&mut self, cancel: &AtomicBool) {
        #[cfg(test)]
        crate::fixture::stand_still(&self.model_dir);
        let done = if cancel.load(Ordering::Relaxed) {
            let tickets: Vec<Ticket> = self.jobs.iter().flat_map(|j| j.tickets.iter().copied()).collect();
            Ok(tickets.into_iter().filter_map(|t| self.engine.cancel(t).map(|out| (t, out))).collect())
        } else {
            self.engine.step()
        };
        if let Some(fault) = self.engine.graph_fault().filter(|_| !self.warned) {
            tracing::warn!(
                "a decode step could not be recorded as a GPU graph; steps run one operation after another until a later try succeeds: {fault}"
            );
            self.warned = true;
        }
        match done {
            Ok(done) => {
                self.progress.step();
                for (ticket, output) in done {
                    let mut left = Some(output);
                    for job in &mut self.jobs {
                        left = left.and_then(|output| job.put(ticket, output));
                    }
                }
                self.jobs =
                    std::mem::take(&mut self.jobs).into_iter().filter_map(|job| job.settle(self.place)).collect();
            }
            Err(e) => {
                // The engine has dropped everything; each job is told why.
                let why = e.to_string();
                let mut first = Some(e);
                for job in std::mem::take(&mut self.jobs) {
                    let error = first
                        .take()
                        .map_or_else(|| RolloutError::Engine(EngineError::Lost(why.clone())), RolloutError::Engine);
                    drop(job.reply.send(Err(error)));
                }
            }
        }
    }
}
