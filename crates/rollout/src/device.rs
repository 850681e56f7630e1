//! The one thread that owns the model. Commands go in by channel, answers come back by one-shot channels.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};
use tokio::sync::oneshot;
use unveil_engine::{Engine, EngineOptions, GroupOutput, GroupRequest};
use unveil_model::Vlm;

use crate::{Result, RolloutError, weights};

/// What the thread needs to start.
pub(crate) struct DeviceSpec {
    pub model_dir: PathBuf,
    pub device: String,
    /// 0 = all cores.
    pub threads: usize,
    /// None = the model's default layer.
    pub layer: Option<usize>,
    pub banned: Vec<u32>,
}

/// Groups that were generated.
pub(crate) struct Generated {
    pub outputs: Vec<GroupOutput>,
    /// Milliseconds for all of them.
    pub ms: f64,
}

enum Command {
    Generate(Vec<GroupRequest>, oneshot::Sender<Result<Generated>>),
    Load(u64, Vec<u8>, oneshot::Sender<Result<(), String>>),
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
                let engine = open(&spec.model_dir, &spec.device, spec.threads, spec.layer, spec.banned);
                match engine {
                    Ok(engine) => {
                        if ready.send(Ok(())).is_ok() {
                            serve(engine, &inbox, &cancel);
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

    /// Generates groups, all in one batch.
    pub async fn generate(&self, requests: Vec<GroupRequest>) -> Result<Generated> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Generate(requests, reply))?;
        answer.await.map_err(|_| RolloutError::Died("model thread"))?
    }

    /// Takes over the weights of a safetensors file in memory; the inner error says why they are refused.
    pub async fn load(&self, version: u64, bytes: Vec<u8>) -> Result<Result<(), String>> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Load(version, bytes, reply))?;
        answer.await.map_err(|_| RolloutError::Died("model thread"))
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).map_err(|_| RolloutError::Died("model thread"))
    }
}

fn serve(mut engine: Engine, inbox: &mpsc::Receiver<Command>, cancel: &AtomicBool) {
    while let Ok(command) = inbox.recv() {
        match command {
            Command::Generate(requests, reply) => {
                let start = Instant::now();
                let made = engine.generate(&requests, Some(cancel)).map_err(RolloutError::from);
                let ms = start.elapsed().as_secs_f64() * 1e3;
                drop(reply.send(made.map(|outputs| Generated { outputs, ms })));
            }
            Command::Load(version, bytes, reply) => {
                let named = weights::tensors(&bytes);
                drop(reply.send(
                    named.and_then(|n: Vec<(String, Tensor)>| {
                        engine.load_weights(version, &n).map_err(|e| e.to_string())
                    }),
                ));
            }
        }
    }
}

/// Loads a model into an engine on the calling thread, which it then belongs to.
pub(crate) fn open(dir: &Path, device: &str, threads: usize, layer: Option<usize>, banned: Vec<u32>) -> Result<Engine> {
    if threads > 0 {
        tch::set_num_threads(threads as i32);
    }
    let vlm = Vlm::load(dir, unveil_model::device(device)?, Kind::Float)?;
    let layer = layer.unwrap_or_else(|| vlm.config().default_capture_layer());
    Ok(Engine::new(vlm, EngineOptions { capture_layer: Some(layer), banned, ..Default::default() })?)
}
