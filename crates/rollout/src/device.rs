//! The thread that owns the model. It receives commands through a channel and replies through one-shot channels.

use std::borrow::BorrowMut;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tch::{Device, Tensor};
use tokio::sync::oneshot;
use unveil_config::Config;
use unveil_core::WeightVersion;
use unveil_engine::{Engine, EngineError, GroupOutput, GroupRequest, Ticket};
use unveil_experience_rpc::{Progress, WeightUpdate};
use unveil_model::{Vlm, is_adapter};
use unveil_torch_ext::{GpuMemory, gpu_memory};

use crate::{Result, RolloutError, open_engine};

/// Parameters of the thread.
pub(crate) struct DeviceSpec {
    pub model_dir: PathBuf,
    pub config: Config,
    pub banned: Vec<u32>,
    /// Counts the steps of the thread.
    pub progress: Progress,
}

/// A generated batch.
pub(crate) struct Generated {
    pub outputs: Vec<GroupOutput>,
    /// Time for the whole batch, in milliseconds.
    pub ms: f64,
    /// GPU memory at the end of the batch.
    pub gpu: Option<GpuMemory>,
}

/// A command to the thread, with the channel for its reply.
enum DeviceCommand {
    Generate(Vec<GroupRequest>, oneshot::Sender<Result<Generated>>),
    Load(WeightUpdate, oneshot::Sender<Result<WeightUpdate, String>>),
}

/// Time to wait for the thread at shutdown.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// Handle of the thread. Dropping it ends the thread after the current command.
pub(crate) struct DeviceThread {
    commands: mpsc::Sender<DeviceCommand>,
    thread: JoinHandle<()>,
}

impl DeviceThread {
    /// Starts the thread and waits until the model is loaded. While `cancel` is true, generation ends early.
    pub(crate) async fn start(spec: DeviceSpec, cancel: Arc<AtomicBool>) -> Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let (ready, loaded) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("unveil-device".to_owned())
            .spawn(move || {
                let engine = open_engine(&spec.config, &spec.model_dir, spec.config.rollout.threads, &spec.banned);
                match engine.and_then(|engine| Ok((engine, unveil_model::device(&spec.config.run.device)?))) {
                    Ok((engine, torch_device)) => {
                        if ready.send(Ok(())).is_ok() {
                            let progress = spec.progress;
                            let device = DeviceLoop {
                                engine,
                                torch_device,
                                batches: Vec::new(),
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
            .map_err(RolloutError::io("cannot spawn the model thread"))?;
        loaded.await.map_err(|_| RolloutError::Died("model thread"))??;
        Ok(Self { commands, thread })
    }

    /// Ends the thread and waits for it, so that the process does not exit while it computes.
    pub(crate) async fn close(self) {
        drop(self.commands);
        let joined = tokio::task::spawn_blocking(move || self.thread.join());
        if tokio::time::timeout(SHUTDOWN_GRACE, joined).await.is_err() {
            tracing::warn!("leaving the model thread while it is busy");
        }
    }

    /// Generates groups, together with the batches in flight.
    pub(crate) async fn generate(&self, requests: Vec<GroupRequest>) -> Result<Generated> {
        let (reply, answer) = oneshot::channel();
        self.send(DeviceCommand::Generate(requests, reply))?;
        answer.await.map_err(|_| RolloutError::Died("model thread"))?
    }

    /// Loads weights between two steps and returns them; the inner error is the reason why the engine refuses them.
    pub(crate) async fn load(&self, update: WeightUpdate) -> Result<Result<WeightUpdate, String>> {
        let (reply, answer) = oneshot::channel();
        self.send(DeviceCommand::Load(update, reply))?;
        answer.await.map_err(|_| RolloutError::Died("model thread"))
    }

    fn send(&self, command: DeviceCommand) -> Result<()> {
        self.commands.send(command).map_err(|_| RolloutError::Died("model thread"))
    }
}

/// Groups that were requested together and are not all generated yet.
struct PendingBatch {
    tickets: Vec<Ticket>,
    outputs: Vec<Option<GroupOutput>>,
    start: Instant,
    reply: oneshot::Sender<Result<Generated>>,
}

impl PendingBatch {
    /// Replies if every group is generated; otherwise returns the batch.
    fn reply_if_complete(self, torch_device: Device) -> Option<Self> {
        if self.outputs.iter().any(Option::is_none) {
            return Some(self);
        }
        let ms = self.start.elapsed().as_secs_f64() * 1e3;
        let outputs = self.outputs.into_iter().flatten().collect();
        drop(self.reply.send(Ok(Generated { outputs, ms, gpu: gpu_memory(torch_device) })));
        None
    }

    /// Stores the output of a group of this batch; returns the output of any other group.
    fn store(&mut self, ticket: Ticket, output: GroupOutput) -> Option<GroupOutput> {
        match self.tickets.iter().position(|t| *t == ticket) {
            Some(index) => {
                self.outputs[index] = Some(output);
                None
            }
            None => Some(output),
        }
    }
}

/// State of the thread: the engine and the batches that wait for its output.
struct DeviceLoop {
    engine: Engine,
    torch_device: Device,
    batches: Vec<PendingBatch>,
    /// Whether the failure to capture GPU graphs has been logged.
    warned: bool,
    progress: Progress,
    #[cfg(test)]
    model_dir: PathBuf,
}

impl DeviceLoop {
    /// Executes commands between steps, so that weights may change in the middle of groups. Ends when all senders are dropped.
    fn serve(mut self, inbox: &mpsc::Receiver<DeviceCommand>, cancel: &AtomicBool) {
        loop {
            let command = if self.batches.is_empty() {
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
                Some(DeviceCommand::Generate(requests, reply)) => self.submit(requests, reply),
                Some(DeviceCommand::Load(update, reply)) => drop(reply.send(self.load(update))),
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
        let batch = PendingBatch { tickets, outputs, start: Instant::now(), reply };
        self.batches.extend(batch.reply_if_complete(self.torch_device));
    }

    fn load(&mut self, update: WeightUpdate) -> Result<WeightUpdate, String> {
        self.progress.advance();
        load_update(&mut self.engine, &update).map(|()| update).map_err(|e| e.to_string())
    }

    /// Generates one token for all batches; after `cancel`, collects the partial outputs instead.
    fn step(&mut self, cancel: &AtomicBool) {
        #[cfg(test)]
        crate::fixture::wait_while_stalled(&self.model_dir);
        let done = if cancel.load(Ordering::Relaxed) {
            let tickets: Vec<Ticket> = self.batches.iter().flat_map(|b| b.tickets.iter().copied()).collect();
            Ok(tickets.into_iter().filter_map(|t| self.engine.cancel(t).map(|out| (t, out))).collect())
        } else {
            self.engine.step()
        };
        if let Some(failure) = self.engine.graph_error().filter(|_| !self.warned) {
            tracing::warn!(
                "cannot capture a decode step as a GPU graph, running without graphs until a retry succeeds: {failure}"
            );
            self.warned = true;
        }
        match done {
            Ok(done) => {
                self.progress.advance();
                for (ticket, output) in done {
                    let mut unclaimed = Some(output);
                    for batch in &mut self.batches {
                        unclaimed = unclaimed.and_then(|output| batch.store(ticket, output));
                    }
                }
                let batches = std::mem::take(&mut self.batches).into_iter();
                self.batches = batches.filter_map(|batch| batch.reply_if_complete(self.torch_device)).collect();
            }
            Err(e) => {
                // The engine has dropped all groups; every batch gets the reason.
                let why = e.to_string();
                let mut first = Some(e);
                for batch in std::mem::take(&mut self.batches) {
                    let error = first
                        .take()
                        .map_or_else(|| RolloutError::Engine(EngineError::Aborted(why.clone())), RolloutError::Engine);
                    drop(batch.reply.send(Err(error)));
                }
            }
        }
    }
}

/// Loads received weights under their version into an engine that holds the version they build on.
///
/// # Errors
/// Returns an [`EngineError`] if they do not fit the engine's model; the engine is unchanged then.
pub fn load_update<V: BorrowMut<Vlm>>(engine: &mut Engine<V>, update: &WeightUpdate) -> unveil_engine::Result<()> {
    let version: WeightVersion = update.version;
    let named = update.tensors.as_slice();
    match (update.scale, update.whole) {
        (None, true) => engine.load_weights(version, named),
        (None, false) => engine.load_partial_weights(version, named),
        (Some(scale), whole) => {
            let clone = |(n, t): &(String, Tensor)| (n.clone(), t.shallow_clone());
            let (adapters, base): (Vec<_>, Vec<_>) = named.iter().map(clone).partition(|(n, _)| is_adapter(n));
            engine.load_with_adapters(version, whole.then_some(base.as_slice()), &adapters, scale)
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    /// Adapters that do not fit the model are rejected before any parameter changes.
    #[test]
    fn unfitting_adapters_leave_the_engine_unchanged() {
        let vlm = unveil_testkit_model::model(3);
        let state = |vlm: &Vlm| {
            vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.copy())).collect::<Vec<(String, Tensor)>>()
        };
        let before = state(&vlm);
        let doubled: Vec<_> = before.iter().map(|(n, t)| (n.clone(), t * 2.0)).collect();
        let mut engine = Engine::new(vlm, unveil_engine::EngineOptions::default()).unwrap();
        let name = "model.layers.0.self_attn.q_proj";
        let width = engine.vlm().parameter(&format!("{name}.weight")).unwrap().size();
        let tensor = |end: &str, shape: [i64; 2]| {
            (format!("{name}.{end}.weight"), Tensor::ones(shape, (Kind::Float, Device::Cpu)))
        };
        let update = |whole: bool, scale: f64, adapters: Vec<(String, Tensor)>| {
            let base = doubled.iter().filter(|_| whole).map(|(n, t)| (n.clone(), t.shallow_clone()));
            let tensors = base.chain(adapters).collect();
            WeightUpdate { version: 7, checksum: 0, whole, scale: Some(scale), tensors, sums: Default::default() }
        };
        let a = || tensor("lora_A", [2, width[1]]);
        let b = || tensor("lora_B", [width[0], 2]);
        for (bad, word) in [
            (update(true, 0.5, vec![a()]), "lora_B.weight` is missing"),
            (update(true, 0.5, vec![a(), tensor("lora_B", [width[0], 3])]), "expected"),
            (update(true, f64::INFINITY, vec![a(), b()]), "inf"),
            (update(false, 0.5, vec![("model.other.lora_A.weight".into(), a().1)]), "model.other"),
        ] {
            let text = load_update(&mut engine, &bad).unwrap_err().to_string();
            assert!(text.contains(word) && engine.version() == 0 && state(engine.vlm()) == before, "{word}: {text}");
        }
        load_update(&mut engine, &update(true, 0.5, vec![a(), b()])).unwrap();
        // B A is 2 everywhere, and is added with factor 0.5.
        let changed = |engine: &Engine| engine.vlm().parameter(&format!("{name}.weight")).unwrap().copy();
        let base = doubled.iter().find(|(n, _)| *n == format!("{name}.weight")).unwrap().1.shallow_clone();
        assert_eq!((engine.version(), changed(&engine)), (7, &base + 1.0));
        load_update(&mut engine, &update(false, 1.0, vec![a(), b()])).unwrap();
        assert_eq!(changed(&engine), base + 2.0);
    }
}
