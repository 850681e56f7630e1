//! Finding, verifying and reading checkpoints.

use std::collections::BTreeMap;
use std::str::FromStr;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::Serialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::index::{CheckpointInfo, Index, Manifest, ManifestObject};
use crate::log::RunLog;
use crate::store::{Store, hash};

/// Objects read at once.
const PARALLEL: usize = 4;

/// Where to go on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// The newest checkpoint that verifies; afresh when there has never been one.
    Auto,
    /// Afresh, whatever there is.
    Never,
    /// That step and no other.
    Step(u64),
}

impl FromStr for Resume {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::Auto),
            "never" => Ok(Self::Never),
            n => n.parse().map(Self::Step).map_err(|_| Error::BadResume(n.to_string())),
        }
    }
}

/// A checkpoint in memory; every byte has been checked.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Which.
    pub info: CheckpointInfo,
    /// What the writer put beside the objects.
    pub meta: Value,
    /// The objects by name.
    pub objects: BTreeMap<String, Bytes>,
    /// Newer checkpoints that were passed over, and why.
    pub warnings: Vec<String>,
}

/// A checkpoint and its manifest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shown {
    /// What the log says.
    pub info: CheckpointInfo,
    /// What the manifest says.
    pub manifest: Manifest,
}

/// Result of checking one object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ObjectCheck {
    /// Step of the checkpoint.
    pub step: u64,
    /// Term of its writer.
    pub term: u64,
    /// Full name under the run's prefix.
    pub object: String,
    /// Whether size and BLAKE3 are those of the manifest (for the manifest: those of the log).
    pub ok: bool,
    /// What is wrong, when something is.
    pub reason: Option<String>,
}

/// All checkpoints that exist, oldest first.
///
/// # Errors
/// When the log cannot be read.
pub async fn list(store: &Store) -> Result<Vec<CheckpointInfo>> {
    Ok(Index::new(RunLog::read(store).await?.entries()).live)
}

/// The checkpoint that was marked best in the current lineage, if one was.
///
/// # Errors
/// When the log cannot be read.
pub async fn best(store: &Store) -> Result<Option<CheckpointInfo>> {
    Ok(list(store).await?.into_iter().find(|c| c.best))
}

/// One checkpoint with its manifest; `None` is the newest of the current lineage.
///
/// # Errors
/// [`Error::Empty`] or [`Error::NoSuchStep`], or a store error.
pub async fn show(store: &Store, step: Option<u64>) -> Result<Shown> {
    let index = Index::new(RunLog::read(store).await?.entries());
    let info = pick(store, &index, step)?.clone();
    let manifest = read_manifest(store, &info).await?;
    Ok(Shown { info, manifest })
}

/// Loads what a learner would resume from; nothing is recorded. `None`: it would start afresh.
///
/// # Errors
/// [`Error::NoSuchStep`]; [`Error::NoneUsable`] when there are checkpoints but none verifies (a run is never silently
/// started afresh); or a store error.
pub async fn load(store: &Store, resume: Resume) -> Result<Option<Loaded>> {
    load_from(store, &Index::new(RunLog::read(store).await?.entries()), resume).await
}

/// Checks every object of a step's checkpoint, or of all checkpoints. Damage is in the result, not an error.
///
/// # Errors
/// [`Error::Empty`] or [`Error::NoSuchStep`], or when the log cannot be read.
pub async fn verify(store: &Store, step: Option<u64>) -> Result<Vec<ObjectCheck>> {
    let index = Index::new(RunLog::read(store).await?.entries());
    let infos = match step {
        None if index.live.is_empty() => return Err(Error::Empty { place: store.place().to_string() }),
        None => index.live.clone(),
        Some(_) => vec![pick(store, &index, step)?.clone()],
    };
    let mut out = Vec::new();
    for info in &infos {
        let check = |name: &str, fault: Option<Error>| ObjectCheck {
            step: info.step,
            term: info.term,
            object: format!("{}/{name}", info.path),
            ok: fault.is_none(),
            reason: fault.map(|e| e.to_string()),
        };
        match read_manifest(store, info).await {
            Err(e) => out.push(check("manifest.json", Some(e))),
            Ok(manifest) => {
                out.push(check("manifest.json", None));
                let results = futures::stream::iter(&manifest.objects)
                    .map(|o| async move { (o, read_object(store, info, o).await.err()) })
                    .buffered(PARALLEL)
                    .collect::<Vec<_>>()
                    .await;
                out.extend(results.into_iter().map(|(o, fault)| check(&o.name, fault)));
            }
        }
    }
    Ok(out)
}

/// The newest checkpoint, or a step's.
pub(crate) fn pick<'a>(store: &Store, index: &'a Index, step: Option<u64>) -> Result<&'a CheckpointInfo> {
    let place = || store.place().to_string();
    match step {
        None => index.newest().ok_or_else(|| Error::Empty { place: place() }),
        Some(step) => {
            index.of_step(step).ok_or_else(|| Error::NoSuchStep { place: place(), step, have: index.steps() })
        }
    }
}

pub(crate) async fn load_from(store: &Store, index: &Index, resume: Resume) -> Result<Option<Loaded>> {
    let candidates: Vec<&CheckpointInfo> = match resume {
        Resume::Never => return Ok(None),
        Resume::Step(step) => {
            let info = pick(store, index, Some(step))?;
            return fetch(store, info).await.map(Some);
        }
        Resume::Auto if !index.begun => return Ok(None),
        Resume::Auto => index.lineage.iter().filter_map(|seq| index.get(*seq)).collect(),
    };
    let mut warnings = Vec::new();
    for info in candidates {
        match fetch(store, info).await {
            Ok(mut loaded) => {
                loaded.warnings = warnings;
                return Ok(Some(loaded));
            }
            // a store that cannot be reached says nothing about the checkpoint: an older one must not be taken for it
            Err(e @ Error::Read { .. }) => return Err(e),
            Err(e) => {
                tracing::warn!(step = info.step, error = %e, "a checkpoint is passed over");
                warnings.push(format!("step {} is passed over: {e}", info.step));
            }
        }
    }
    if warnings.is_empty() {
        warnings.push("all checkpoints of its lineage were removed".into());
    }
    Err(Error::NoneUsable { place: store.place().to_string(), reasons: warnings.join("; ") })
}

/// Reads and checks a whole checkpoint.
async fn fetch(store: &Store, info: &CheckpointInfo) -> Result<Loaded> {
    let manifest = read_manifest(store, info).await?;
    let objects = futures::stream::iter(&manifest.objects)
        .map(|o| async move { read_object(store, info, o).await.map(|b| (o.name.clone(), b)) })
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await?;
    Ok(Loaded { info: info.clone(), meta: manifest.meta, objects, warnings: Vec::new() })
}

pub(crate) async fn read_manifest(store: &Store, info: &CheckpointInfo) -> Result<Manifest> {
    let name = format!("{}/manifest.json", info.path);
    let corrupt = |why: String| Error::Corrupt { place: store.place().to_string(), object: name.clone(), why };
    let bytes = store.read(&name).await?.ok_or_else(|| corrupt("it is missing".into()))?;
    if hash(&bytes).await != info.manifest_blake3 {
        return Err(corrupt("its BLAKE3 is not the one in the log".into()));
    }
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| corrupt(e.to_string()))?;
    if manifest.format != 1 {
        return Err(corrupt(format!("its format is {}, this version reads 1", manifest.format)));
    }
    Ok(manifest)
}

pub(crate) async fn read_object(store: &Store, info: &CheckpointInfo, object: &ManifestObject) -> Result<Bytes> {
    let name = format!("{}/{}", info.path, object.name);
    let corrupt = |why: String| Error::Corrupt { place: store.place().to_string(), object: name.clone(), why };
    let bytes = store.read(&name).await?.ok_or_else(|| corrupt("it is missing".into()))?;
    if bytes.len() as u64 != object.size {
        return Err(corrupt(format!("it has {} bytes, the manifest says {}", bytes.len(), object.size)));
    }
    if hash(&bytes).await != object.blake3 {
        return Err(corrupt("its BLAKE3 is not the one in the manifest".into()));
    }
    Ok(bytes)
}
