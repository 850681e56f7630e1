//! Lists and verifies checkpoints, and selects the one to resume from.

use std::collections::VecDeque;
use std::str::FromStr;

use futures::StreamExt;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::index::{CheckpointIndex, CheckpointInfo};
use crate::log::RunLog;
use crate::manifest::{Manifest, ManifestObject};
use crate::read::{MAX_PARALLEL_READS, Reader};
use crate::store::Store;

/// The checkpoint to resume from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// The newest valid checkpoint; starts from scratch if there has never been one.
    Auto,
    /// Starts from scratch, even if there are checkpoints.
    Never,
    /// The checkpoint of this step only.
    Step(u64),
}

impl FromStr for Resume {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::Auto),
            "never" => Ok(Self::Never),
            step => step.parse().map(Self::Step).map_err(|_| Error::BadResume(step.to_string())),
        }
    }
}

/// The checkpoints that a run may resume from, in order of preference. A caller that finds one damaged rejects it and tries the next.
#[derive(Debug)]
pub struct ResumeCandidates {
    location: String,
    remaining: VecDeque<CheckpointInfo>,
    /// A requested step has no alternatives.
    single: bool,
    /// Whether the run has had checkpoints, so that it must not start from scratch.
    started: bool,
    rejections: Vec<String>,
}

impl ResumeCandidates {
    pub(crate) fn new(store: &Store, index: &CheckpointIndex, resume: Resume) -> Result<Self> {
        let mut remaining = VecDeque::new();
        let mut started = false;
        match resume {
            Resume::Never => {}
            Resume::Step(step) => remaining.push_back(find(store, index, Some(step))?.clone()),
            Resume::Auto => {
                remaining.extend(index.lineage.iter().filter_map(|seq| index.get(*seq)).cloned());
                started = index.started;
            }
        }
        let single = matches!(resume, Resume::Step(_));
        Ok(Self { location: store.location().to_string(), remaining, single, started, rejections: Vec::new() })
    }

    /// Returns the next checkpoint to try; `None`: start from scratch.
    ///
    /// # Errors
    /// Returns [`Error::NoUsableCheckpoint`] if there were checkpoints and none is left: a run never silently starts from scratch.
    pub fn next_candidate(&mut self) -> Result<Option<CheckpointInfo>> {
        if let Some(info) = self.remaining.pop_front() {
            return Ok(Some(info));
        }
        if !self.started && self.rejections.is_empty() {
            return Ok(None);
        }
        if self.rejections.is_empty() {
            self.rejections.push("all checkpoints of its lineage were removed".into());
        }
        Err(Error::NoUsableCheckpoint { location: self.location.clone(), reasons: self.rejections.join("; ") })
    }

    /// Rejects `info`, which could not be loaded because of `error`.
    ///
    /// # Errors
    /// Returns `error` if the step was requested, or if the error is not damage: an older checkpoint must not replace one that is
    /// merely unreachable.
    pub fn reject(&mut self, info: &CheckpointInfo, error: Error) -> Result<()> {
        if self.single || !matches!(error, Error::Corrupt { .. }) {
            return Err(error);
        }
        tracing::warn!(step = info.step, %error, "skipping damaged checkpoint");
        self.rejections.push(format!("skipped step {}: {error}", info.step));
        Ok(())
    }

    /// Describes the rejected checkpoints and the reasons.
    pub fn warnings(&self) -> &[String] {
        &self.rejections
    }
}

/// A checkpoint and its manifest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckpointDetails {
    /// The checkpoint according to the log.
    pub info: CheckpointInfo,
    /// Its manifest.
    pub manifest: Manifest,
}

/// Result of verifying one object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ObjectCheck {
    /// Step of the checkpoint.
    pub step: u64,
    /// Term of its writer.
    pub term: u64,
    /// Full name under the run's prefix.
    pub object: String,
    /// Whether size and BLAKE3 match the manifest (for the manifest itself: the log).
    pub ok: bool,
    /// Why the object is invalid; `None` if it is valid.
    pub reason: Option<String>,
}

/// Lists all existing checkpoints, oldest first.
///
/// # Errors
/// Returns an error if the log cannot be read or is damaged.
pub async fn list(store: &Store) -> Result<Vec<CheckpointInfo>> {
    Ok(CheckpointIndex::new(RunLog::read(store).await?.entries()).live)
}

/// Returns the checkpoint marked as best in the current lineage, if any.
///
/// # Errors
/// Returns an error if the log cannot be read or is damaged.
pub async fn best(store: &Store) -> Result<Option<CheckpointInfo>> {
    Ok(list(store).await?.into_iter().find(|c| c.best))
}

/// Reads a checkpoint's manifest; with `step: None`, that of the newest checkpoint of the current lineage.
///
/// # Errors
/// Returns [`Error::NoCheckpoint`] or [`Error::NoSuchStep`] if there is no such checkpoint, [`Error::Corrupt`] if the manifest is
/// damaged, or a store error.
pub async fn show(store: &Store, step: Option<u64>) -> Result<CheckpointDetails> {
    let index = CheckpointIndex::new(RunLog::read(store).await?.entries());
    let reader = Reader::open(store, find(store, &index, step)?).await?;
    Ok(CheckpointDetails { info: reader.info().clone(), manifest: reader.manifest().clone() })
}

/// Returns the checkpoints that a learner would resume from, without claiming the run.
///
/// # Errors
/// Returns [`Error::NoSuchStep`] if the requested step has no checkpoint, or a store error.
pub async fn resume_candidates(store: &Store, resume: Resume) -> Result<ResumeCandidates> {
    ResumeCandidates::new(store, &CheckpointIndex::new(RunLog::read(store).await?.entries()), resume)
}

/// Verifies every object of a step's checkpoint, or of all checkpoints. Reports damage in the result, not as an error.
///
/// # Errors
/// Returns [`Error::NoCheckpoint`] or [`Error::NoSuchStep`] if there is no such checkpoint, or an error if the log cannot be read.
pub async fn verify(store: &Store, step: Option<u64>) -> Result<Vec<ObjectCheck>> {
    let index = CheckpointIndex::new(RunLog::read(store).await?.entries());
    let infos = match step {
        None if index.live.is_empty() => return Err(Error::NoCheckpoint { location: store.location().to_string() }),
        None => index.live.clone(),
        Some(_) => vec![find(store, &index, step)?.clone()],
    };
    let mut checks = Vec::new();
    for info in &infos {
        let check = |name: &str, error: Option<Error>| ObjectCheck {
            step: info.step,
            term: info.term,
            object: format!("{}/{name}", info.path),
            ok: error.is_none(),
            reason: error.map(|e| e.to_string()),
        };
        let reader = match Reader::open(store, info).await {
            Ok(reader) => reader,
            Err(e) => {
                checks.push(check("manifest.json", Some(e)));
                continue;
            }
        };
        checks.push(check("manifest.json", None));
        // Parts of an object are read in parallel, and so are a few objects.
        let results = futures::stream::iter(&reader.manifest().objects)
            .map(|object| check_object(&reader, object))
            .buffered(MAX_PARALLEL_READS / 4)
            .collect::<Vec<_>>()
            .await;
        checks.extend(results.into_iter().map(|(object, error)| check(&object.name, error)));
    }
    Ok(checks)
}

async fn check_object<'a>(reader: &Reader, object: &'a ManifestObject) -> (&'a ManifestObject, Option<Error>) {
    (object, reader.verify_object(object).await.err())
}

/// Returns the checkpoint of a step, or the newest one of the current lineage.
pub(crate) fn find<'a>(store: &Store, index: &'a CheckpointIndex, step: Option<u64>) -> Result<&'a CheckpointInfo> {
    let location = || store.location().to_string();
    match step {
        None => index.newest().ok_or_else(|| Error::NoCheckpoint { location: location() }),
        Some(step) => {
            index.by_step(step).ok_or_else(|| Error::NoSuchStep { location: location(), step, have: index.steps() })
        }
    }
}
