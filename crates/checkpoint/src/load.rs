//! Which checkpoints there are, which one to go on from, and whether they are as they were written.

use std::collections::VecDeque;
use std::str::FromStr;

use futures::StreamExt;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::index::{CheckpointInfo, Index};
use crate::log::RunLog;
use crate::manifest::{Manifest, ManifestObject};
use crate::read::{PARALLEL, Reader};
use crate::store::Store;

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

/// The checkpoints that a run may go on from, best first. Who reads one and finds it damaged says so, and takes the next.
#[derive(Debug)]
pub struct Choice {
    place: String,
    left: VecDeque<CheckpointInfo>,
    /// An asked-for step is that step or an error.
    one: bool,
    /// A run that has begun is not started afresh.
    begun: bool,
    passed: Vec<String>,
}

impl Choice {
    pub(crate) fn new(store: &Store, index: &Index, resume: Resume) -> Result<Self> {
        let (mut left, mut begun) = (VecDeque::new(), false);
        match resume {
            Resume::Never => {}
            Resume::Step(step) => left.push_back(pick(store, index, Some(step))?.clone()),
            Resume::Auto => {
                left.extend(index.lineage.iter().filter_map(|seq| index.get(*seq)).cloned());
                begun = index.begun;
            }
        }
        let one = matches!(resume, Resume::Step(_));
        Ok(Self { place: store.place().to_string(), left, one, begun, passed: Vec::new() })
    }

    /// The next one to try; none: afresh.
    ///
    /// # Errors
    /// [`Error::NoneUsable`] when there were checkpoints and none is left: a run is never silently started afresh.
    pub fn take(&mut self) -> Result<Option<CheckpointInfo>> {
        if let Some(info) = self.left.pop_front() {
            return Ok(Some(info));
        }
        if !self.begun && self.passed.is_empty() {
            return Ok(None);
        }
        if self.passed.is_empty() {
            self.passed.push("all checkpoints of its lineage were removed".into());
        }
        Err(Error::NoneUsable { place: self.place.clone(), reasons: self.passed.join("; ") })
    }

    /// Passes over `info`, which could not be used for `fault`.
    ///
    /// # Errors
    /// `fault`, where it says nothing about the checkpoint (a store that cannot be reached: an older one must not be taken for it),
    /// or that step was asked for.
    pub fn pass(&mut self, info: &CheckpointInfo, fault: Error) -> Result<()> {
        if self.one || !matches!(fault, Error::Corrupt { .. }) {
            return Err(fault);
        }
        tracing::warn!(step = info.step, error = %fault, "a checkpoint is passed over");
        self.passed.push(format!("step {} is passed over: {fault}", info.step));
        Ok(())
    }

    /// Checkpoints that were passed over, and why.
    pub fn warnings(&self) -> &[String] {
        &self.passed
    }
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
    let reader = Reader::open(store, pick(store, &index, step)?).await?;
    Ok(Shown { info: reader.info().clone(), manifest: reader.manifest().clone() })
}

/// What a learner would go on from; nothing is recorded.
///
/// # Errors
/// [`Error::NoSuchStep`], or a store error.
pub async fn choice(store: &Store, resume: Resume) -> Result<Choice> {
    Choice::new(store, &Index::new(RunLog::read(store).await?.entries()), resume)
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
        let reader = match Reader::open(store, info).await {
            Ok(reader) => reader,
            Err(e) => {
                out.push(check("manifest.json", Some(e)));
                continue;
            }
        };
        out.push(check("manifest.json", None));
        // Parts of an object are read side by side; a few small objects, too.
        let results = futures::stream::iter(&reader.manifest().objects)
            .map(|o| check_one(&reader, o))
            .buffered(PARALLEL / 4)
            .collect::<Vec<_>>()
            .await;
        out.extend(results.into_iter().map(|(o, fault)| check(&o.name, fault)));
    }
    Ok(out)
}

async fn check_one<'a>(reader: &Reader, object: &'a ManifestObject) -> (&'a ManifestObject, Option<Error>) {
    (object, reader.check(object).await.err())
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
