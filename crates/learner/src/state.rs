//! Checkpoints of a stage: what goes into one, writing them in the background, and taking one up again. State is keyed by
//! parameter name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Kind, Tensor};
use tokio::runtime::Handle;
use unveil_checkpoint::{Access, CheckpointInfo, Checkpoints, Loaded, Resume, Retention, Snapshot, Store};
use unveil_config::Config;
use unveil_model::{ValueHead, Vlm};

use crate::codec::{from_bytes, to_bytes};
use crate::error::{LearnerError, Result};
use crate::lora::{self, Base, SavedAdapters};
use crate::meter::Saves;
use crate::setup::CRITIC;
use crate::step::Counters;

const OPTIMIZER: &str = "optimizer.safetensors";
const VALUE_HEAD: &str = "value_head.safetensors";
const CRITIC_FILE: &str = "critic.safetensors";
const MODEL: &str = "model/";

/// What a checkpoint says beside the tensors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// `sft` or `rl`.
    pub stage: String,
    /// Counters of the learner.
    pub counters: Counters,
    /// Run seed.
    pub seed: u64,
    /// Where the run stands in its data; stage 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experience: Option<unveil_experience::Snapshot>,
    /// The best evaluation so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
    /// BLAKE3 of the model that the adapters lie beside, where adapters are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Weight of KL to the reference; stage 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl: Option<unveil_algo::KlController>,
}

/// The best evaluation so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Best {
    /// After how many updates.
    pub step: u64,
    /// Its score.
    pub score: f64,
}

/// Files of a model directory that training leaves as they are: tokenizer, processor, chat template.
pub(crate) struct StaticFiles(Vec<(String, Bytes)>);

impl StaticFiles {
    /// Reads them from `dir`; weights and what the model writes itself are left out.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for path in unveil_model::companions(dir)? {
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let bytes = std::fs::read(&path).map_err(LearnerError::io(&path))?;
            files.push((format!("{MODEL}{name}"), Bytes::from(bytes)));
        }
        Ok(Self(files))
    }
}

/// Tensors of a checkpoint beside what the model has itself.
pub(crate) struct Trained<'a> {
    /// Trained weights to their last digit.
    pub weights: Vec<(String, Tensor)>,
    /// The optimiser's moments.
    pub moments: Vec<(String, Tensor)>,
    pub head: Option<&'a ValueHead>,
}

impl Trained<'_> {
    /// The critic's trained weights, where it is a model of its own.
    pub fn critic(&self) -> Vec<(String, Tensor)> {
        let own = self.weights.iter().filter(|(n, _)| n.starts_with(CRITIC));
        own.map(|(n, t)| (n.clone(), t.shallow_clone())).collect()
    }
}

/// Objects of a checkpoint: a whole model directory under `model/`, or adapters alone under `adapter/` where there is a base;
/// moments, value head.
pub(crate) fn objects(
    files: &StaticFiles,
    vlm: &Vlm,
    base: Option<&Base>,
    trained: &Trained<'_>,
) -> Result<Vec<(String, Bytes)>> {
    let mut out = match base {
        Some(base) => SavedAdapters::objects(vlm, &base.dir)?,
        None => whole(files, vlm, &trained.weights)?,
    };
    out.push((OPTIMIZER.to_owned(), to_bytes(&trained.moments)?.into()));
    if let Some(head) = trained.head {
        let named: Vec<_> = head.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        out.push((VALUE_HEAD.to_owned(), to_bytes(&named)?.into()));
    }
    let critic = trained.critic();
    if !critic.is_empty() {
        out.push((CRITIC_FILE.to_owned(), to_bytes(&critic)?.into()));
    }
    Ok(out)
}

/// A whole model directory in fp32.
fn whole(files: &StaticFiles, vlm: &Vlm, weights: &[(String, Tensor)]) -> Result<Vec<(String, Bytes)>> {
    let scratch = tempfile::tempdir().map_err(LearnerError::io("temporary directory"))?;
    vlm.save_with(scratch.path(), Kind::Float, &weights.iter().map(|(n, t)| (n.as_str(), t)).collect())?;
    let mut out = files.0.clone();
    for entry in std::fs::read_dir(scratch.path()).map_err(LearnerError::io(scratch.path()))? {
        let path = entry.map_err(LearnerError::io(scratch.path()))?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        out.push((format!("{MODEL}{name}"), std::fs::read(&path).map_err(LearnerError::io(&path))?.into()));
    }
    Ok(out)
}

/// What a checkpoint has of the model.
enum Weights {
    Whole(Vec<(String, Tensor)>),
    Adapters(SavedAdapters),
}

/// Tensors and numbers of a loaded checkpoint.
pub(crate) struct Restored {
    pub meta: Meta,
    weights: Weights,
    pub moments: Vec<(String, Tensor)>,
    pub head: Option<Vec<(String, Tensor)>>,
    critic: Vec<(String, Tensor)>,
}

impl Restored {
    /// Reads a checkpoint of `stage`, made with `seed`.
    pub fn read(loaded: &Loaded, stage: &str, seed: u64) -> Result<Self> {
        let step = loaded.info.step;
        let fault = |what: String| LearnerError::State { step, what };
        let meta: Meta = serde_json::from_value(loaded.meta.clone())
            .map_err(|e| fault(format!("its description is not readable: {e}")))?;
        if meta.stage != stage {
            return Err(fault(format!(
                "it is of stage `{}`, not `{stage}`: give each stage a prefix of its own",
                meta.stage
            )));
        }
        if meta.seed != seed {
            let was = meta.seed;
            return Err(fault(format!(
                "it was made with run.seed {was}, now {seed}: use the same seed, or run.resume = \"never\""
            )));
        }
        let get = |name: &str| object(&loaded.objects, name, step);
        let weights = match SavedAdapters::read(loaded.objects.iter())? {
            Some(adapters) => Weights::Adapters(adapters),
            None => Weights::Whole(weights(&loaded.objects, step)?),
        };
        Ok(Self {
            weights,
            moments: from_bytes(get(OPTIMIZER)?, OPTIMIZER)?,
            head: loaded.objects.get(VALUE_HEAD).map(|b| from_bytes(b, VALUE_HEAD)).transpose()?,
            critic: match loaded.objects.get(CRITIC_FILE) {
                Some(bytes) => from_bytes(bytes, CRITIC_FILE)?,
                None => Vec::new(),
            },
            meta,
        })
    }
}

impl Restored {
    /// Puts the critic's weights of the checkpoint of `step` into a model that starts where it started.
    pub fn load_critic(&self, step: u64, critic: &mut Vlm) -> Result<()> {
        if self.critic.is_empty() {
            let what = "it has no critic of its own, but learner.critic is \"separate\": use \"shared\", or run.resume = \"never\"";
            return Err(LearnerError::State { step, what: what.into() });
        }
        let plain = |(n, t): &(String, Tensor)| (n.trim_start_matches(CRITIC).to_owned(), t.shallow_clone());
        Ok(critic.load_some(&self.critic.iter().map(plain).collect::<Vec<_>>())?)
    }

    /// Weights to their last digit, by name; those of value head and critic among them.
    pub fn precise(&self) -> Vec<(String, Tensor)> {
        let whole = match &self.weights {
            Weights::Whole(named) => named.as_slice(),
            Weights::Adapters(_) => &[],
        };
        let head = self.head.as_deref().unwrap_or_default();
        whole.iter().chain(head).chain(&self.critic).map(|(n, t)| (n.clone(), t.shallow_clone())).collect()
    }

    /// Puts the weights of the checkpoint of `step` into `vlm`, or its adapters where `vlm` lies on the same base.
    pub fn load_into(&self, step: u64, vlm: &mut Vlm, base: Option<&Base>) -> Result<()> {
        let fault = |what: String| LearnerError::State { step, what };
        match &self.weights {
            Weights::Whole(named) if base.is_none() => Ok(vlm.load_state(named)?),
            Weights::Whole(_) => Err(fault(
                "it holds whole weights, but learner.lora.rank is above 0: set it to 0, or run.resume = \"never\""
                    .into(),
            )),
            Weights::Adapters(saved) => {
                let now = base.map(|b| b.hash.as_str());
                if let (Some(b), true) = (base, self.meta.base.as_deref() != now) {
                    let was = self.meta.base.as_deref().unwrap_or("no known model");
                    return Err(fault(format!(
                        "its adapters belong to the model with BLAKE3 {was}, but {} has {}: start from that model, or run.resume = \"never\"",
                        b.dir.display(),
                        b.hash
                    )));
                }
                saved.load_into(vlm).map_err(fault)
            }
        }
    }
}

/// The model's parameters, from one file or from shards, under the names that they have here.
fn weights(objects: &BTreeMap<String, Bytes>, step: u64) -> Result<Vec<(String, Tensor)>> {
    let mut out = Vec::new();
    for (name, bytes) in objects.iter().filter(|(n, _)| n.starts_with(MODEL) && n.ends_with(".safetensors")) {
        out.extend(from_bytes(bytes, name)?.into_iter().map(|(n, t)| (unveil_model::own_name(&n), t)));
    }
    if out.is_empty() {
        return Err(LearnerError::State { step, what: format!("it has no weights under `{MODEL}`") });
    }
    Ok(out)
}

fn object<'a>(objects: &'a BTreeMap<String, Bytes>, name: &str, step: u64) -> Result<&'a Bytes> {
    objects.get(name).ok_or_else(|| LearnerError::State { step, what: format!("it has no `{name}`") })
}

/// Writes checkpoints in the background, one at a time.
pub(crate) struct Saver {
    handle: Handle,
    store: Store,
    checkpoints: Arc<Mutex<Checkpoints>>,
    pending: Option<JoinHandle<Result<CheckpointInfo, unveil_checkpoint::Error>>>,
    last: Option<u64>,
    saves: Option<Saves>,
    /// The learner's term.
    pub term: u64,
}

impl Saver {
    /// Claims the run under `checkpoint.url` (else the run directory) plus `prefix`, and loads what to go on from.
    pub fn open(
        handle: &Handle,
        config: &Config,
        prefix: &str,
        environment: &[(String, String)],
        resume: Resume,
    ) -> Result<(Self, Option<Loaded>)> {
        let base = if config.checkpoint.url.is_empty() { &config.run.dir } else { &config.checkpoint.url };
        let place = if prefix.is_empty() { base.clone() } else { format!("{}/{prefix}", base.trim_end_matches('/')) };
        let options: Vec<(String, String)> = environment.to_vec();
        let retention = Retention { keep: config.checkpoint.keep, keep_best: true };
        let (store, checkpoints, loaded) = handle.block_on(async {
            let store = Store::open(&place, options, Access::Write).await?;
            let mut checkpoints = Checkpoints::claim(store.clone(), retention).await?;
            let loaded = checkpoints.resume(resume).await?;
            Ok::<_, unveil_checkpoint::Error>((store, checkpoints, loaded))
        })?;
        let (term, last) = (checkpoints.term(), loaded.as_ref().map(|l| l.info.step));
        let checkpoints = Arc::new(Mutex::new(checkpoints));
        Ok((Self { handle: handle.clone(), store, checkpoints, pending: None, last, saves: None, term }, loaded))
    }

    /// Tells `saves` of every checkpoint that is committed from here on.
    pub fn tell(&mut self, saves: Saves) {
        self.saves = Some(saves);
    }

    /// The step that was saved, or resumed from, last.
    pub fn last(&self) -> Option<u64> {
        self.last
    }

    /// Starts writing; the one before is waited for, and its result is returned.
    pub fn save(
        &mut self,
        step: u64,
        objects: Vec<(String, Bytes)>,
        meta: &Meta,
        best: bool,
    ) -> Result<Option<CheckpointInfo>> {
        let before = self.wait()?;
        let meta: Value = serde_json::to_value(meta).map_err(|e| LearnerError::State { step, what: e.to_string() })?;
        let checkpoints = self.checkpoints.clone();
        let snapshot = Snapshot { step, objects, meta, best };
        let (handle, saves) = (self.handle.clone(), self.saves.clone());
        let work = move || {
            let begun = Instant::now();
            let info = handle.block_on(lock(&checkpoints).save(snapshot))?;
            if let Some(saves) = saves {
                saves.committed(begun.elapsed());
            }
            Ok(info)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(work);
        self.pending = Some(thread.map_err(LearnerError::io("thread checkpoint"))?);
        self.last = Some(step);
        Ok(before)
    }

    /// Waits for what is being written.
    pub fn wait(&mut self) -> Result<Option<CheckpointInfo>> {
        match self.pending.take() {
            None => Ok(None),
            Some(task) => {
                let joined = task.join().map_err(|_| LearnerError::Lost("the checkpoint writer"))?;
                Ok(Some(joined?))
            }
        }
    }

    /// Writes the model of a step, whose checkpoint holds adapters to that of `vlm` on `base`, merged to `out`, and the adapters beside
    /// it, replacing what is there.
    pub fn export_adapted(&mut self, step: u64, out: &Path, vlm: &mut Vlm, base: &Base) -> Result<()> {
        let (adapter, fresh) = (lora::beside(out), sibling(out));
        let fresh_adapter = sibling(&adapter);
        remove(&fresh_adapter)?;
        self.handle.block_on(unveil_checkpoint::export(&self.store, Some(step), &fresh_adapter, lora::ADAPTER))?;
        let (_, named) = unveil_model::read_adapters(&fresh_adapter)?;
        vlm.load_adapters(&named)?;
        remove(&fresh)?;
        lora::export(vlm, &base.dir, &fresh, &fresh_adapter)?;
        for (made, place) in [(&fresh_adapter, &adapter), (&fresh, &out.to_path_buf())] {
            remove(place)?;
            std::fs::rename(made, place).map_err(LearnerError::io(place))?;
        }
        Ok(())
    }

    /// Writes the model directory of a step to `out`, replacing what is there.
    pub fn export(&mut self, step: u64, out: &Path) -> Result<()> {
        let fresh = sibling(out);
        remove(&fresh)?;
        self.handle.block_on(unveil_checkpoint::export(&self.store, Some(step), &fresh, "model/"))?;
        remove(out)?;
        std::fs::rename(&fresh, out).map_err(LearnerError::io(out))
    }
}

fn lock(checkpoints: &Mutex<Checkpoints>) -> std::sync::MutexGuard<'_, Checkpoints> {
    checkpoints.lock().unwrap_or_else(PoisonError::into_inner)
}

fn sibling(out: &Path) -> PathBuf {
    let name = out.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    out.with_file_name(format!(".{name}.new"))
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(LearnerError::io(dir)(e)),
        _ => Ok(()),
    }
}

/// The `checkpoint` event.
pub(crate) fn event(stage: &str, info: &CheckpointInfo) -> Value {
    serde_json::json!({
        "kind": "checkpoint", "stage": stage, "step": info.step, "path": info.path, "bytes": info.bytes, "best": info.best,
    })
}
