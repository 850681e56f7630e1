//! Writing checkpoints: objects of one or several writers, then the manifest, then the log entry that makes it exist; then tidying up.

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;
use serde_json::Value;

use crate::digest;
use crate::error::{Error, Result};
use crate::index::{CheckpointInfo, Index};
use crate::layout::Layout;
use crate::load::{Choice, Resume};
use crate::log::{Kind, RunLog};
use crate::manifest::{FORMAT, Manifest, Report, join};
use crate::store::{Store, unix_s};
use crate::tidy::{self, Retention};
use crate::upload::{self, Writer};

/// One object to be written.
#[derive(Debug, Clone)]
pub struct Object {
    /// Segments of `[A-Za-z0-9._-]` joined by `/`, such as `model/config.json`.
    pub name: String,
    /// All of it.
    pub bytes: Bytes,
    /// Where tensors lie in it, if it holds some; `bytes` begins with its header.
    pub layout: Option<Layout>,
}

/// What one writer is to write.
#[derive(Debug, Clone)]
pub struct Task {
    /// Step after which it was taken.
    pub step: u64,
    /// Term of the learner.
    pub term: u64,
    /// The writer, from 0; each has names of its own.
    pub rank: usize,
    /// The objects.
    pub objects: Vec<Object>,
}

/// What a checkpoint says beside its objects.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Step after which it was taken.
    pub step: u64,
    /// Goes into the manifest as it is.
    pub meta: Value,
    /// Whether it is the best so far: retention spares the newest one that was.
    pub best: bool,
}

/// Writes one writer's objects. They are part of a checkpoint when [`Checkpoints::commit`] is given the report.
///
/// # Errors
/// [`Error::Write`] names the object and the cause (disk full…); [`Error::BadName`].
pub async fn write(store: &Store, task: Task) -> Result<Report> {
    check_names(&task.objects)?;
    let folder = tidy::folder(task.step, task.term);
    let named: Vec<(String, Bytes)> =
        task.objects.iter().map(|o| (format!("{folder}/{}", o.name), o.bytes.clone())).collect();
    let by = Writer { step: task.step, term: task.term, rank: task.rank };
    let mut objects = upload::write_all(store, by, &named).await?;
    let mut pieces = Vec::new();
    for (at, (made, o)) in objects.iter_mut().zip(&task.objects).enumerate() {
        made.name.clone_from(&o.name);
        pieces.extend(o.layout.iter().flat_map(Layout::pieces).map(|(p, first)| (p.clone(), at, first)));
    }
    Ok(Report { objects, pieces })
}

/// A learner's hold on a run: one term, under which it saves.
#[derive(Debug)]
pub struct Checkpoints {
    store: Store,
    log: RunLog,
    retention: Retention,
}

impl Checkpoints {
    /// Claims the run. Every learner that held it before is fenced: it stops at its next commit. Uploads that it left unfinished are
    /// ended.
    ///
    /// # Errors
    /// When the log cannot be read or written, or another learner claims at the same moment.
    pub async fn claim(store: Store, retention: Retention) -> Result<Self> {
        let mut log = RunLog::read(&store).await?;
        // A directory is known to: a link takes no name that is there.
        if store.root().is_none() {
            store.require_put_if_absent().await?;
        }
        let term = log.claim().await?;
        tracing::info!(place = store.place(), term, "the run is claimed");
        if let Err(e) = upload::abort_left(&store, term).await {
            tracing::warn!(error = %e, "unfinished uploads of an earlier learner could not be looked for");
        }
        Ok(Self { store, log, retention })
    }

    /// The term that was claimed, from 1.
    pub fn term(&self) -> u64 {
        self.log.term()
    }

    /// The store under it.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What to go on from.
    ///
    /// # Errors
    /// [`Error::NoSuchStep`].
    pub fn choice(&self, resume: Resume) -> Result<Choice> {
        Choice::new(&self.store, &Index::new(self.log.entries()), resume)
    }

    /// Records what the learner goes on from (none: afresh). Call it once, before the first save.
    ///
    /// # Errors
    /// [`Error::Fenced`], [`Error::Log`].
    pub async fn resumed(&mut self, from: Option<&CheckpointInfo>) -> Result<()> {
        if from.is_some() || Index::new(self.log.entries()).begun {
            self.log.append(Kind::Resumed { from: from.map(|c| c.seq) }).await?;
        }
        Ok(())
    }

    /// Whether this step was saved in this term.
    pub fn has_step(&self, step: u64) -> bool {
        let term = self.term();
        Index::new(self.log.entries()).live.iter().any(|c| c.step == step && c.term == term)
    }

    /// All checkpoints that exist, as far as this learner has read the log.
    pub fn list(&self) -> Vec<CheckpointInfo> {
        Index::new(self.log.entries()).live
    }

    /// Fails when a newer learner holds the run. Cheap: one read of the log's next entry.
    ///
    /// # Errors
    /// [`Error::Fenced`], or a store error.
    pub async fn check_fence(&mut self) -> Result<()> {
        self.log.check_fence().await
    }

    /// Fails where a save of `step` could not be committed.
    ///
    /// # Errors
    /// [`Error::StepTaken`]; [`Error::Fenced`]; or a store error.
    pub async fn begin(&mut self, step: u64) -> Result<()> {
        if self.has_step(step) {
            return Err(Error::StepTaken { place: self.store.place().to_string(), step, term: self.term() });
        }
        self.log.check_fence().await
    }

    /// Makes a checkpoint of what all writers have reported. When it returns, it is whole and committed; when it fails, older ones are
    /// as they were.
    ///
    /// Then retention removes what is beyond it, and objects of saves that never finished are deleted; trouble with
    /// that is logged and tried again at the next save.
    ///
    /// # Errors
    /// [`Error::Fenced`]; [`Error::Lost`] where an object is not there as reported; [`Error::Parts`] where a tensor is not whole;
    /// [`Error::Write`]; [`Error::Log`].
    pub async fn commit(&mut self, snapshot: Snapshot, reports: Vec<Report>) -> Result<CheckpointInfo> {
        let (step, term) = (snapshot.step, self.term());
        let path = tidy::folder(step, term);
        self.log.check_fence().await?;
        let (manifest_blake3, bytes, objects) = match self.write_manifest(&path, &snapshot, reports).await {
            Ok(x) => x,
            Err(e) => return Err(self.failed(step, e).await),
        };
        let seq = self.log.append(Kind::Checkpoint { step, path, manifest_blake3, bytes, objects }).await?;
        if snapshot.best {
            self.log.append(Kind::Best { of: seq }).await?;
        }
        tracing::info!(place = self.store.place(), step, term, bytes, "a checkpoint is saved");
        if let Err(e) = tidy::remove_beyond(&self.store, &mut self.log, self.retention).await {
            match e {
                Error::Fenced { .. } => return Err(e),
                e => tracing::warn!(error = %e, "old checkpoints could not be removed; the next save tries again"),
            }
        }
        if let Err(e) = tidy::sweep(&self.store, &self.log).await {
            tracing::warn!(error = %e, "left-over objects could not be removed; the next save tries again");
        }
        let index = Index::new(self.log.entries());
        index.get(seq).cloned().ok_or_else(|| Error::Empty { place: self.store.place().to_string() })
    }

    /// Saves as the only writer.
    ///
    /// # Errors
    /// As [`Checkpoints::begin`], [`write()`] and [`Checkpoints::commit`].
    pub async fn save(&mut self, snapshot: Snapshot, objects: Vec<Object>) -> Result<CheckpointInfo> {
        self.begin(snapshot.step).await?;
        let task = Task { step: snapshot.step, term: self.term(), rank: 0, objects };
        match write(&self.store, task).await {
            Ok(report) => self.commit(snapshot, vec![report]).await,
            Err(e) => Err(self.failed(snapshot.step, e).await),
        }
    }

    /// What ended a save of `step`: that another learner holds the run, where it does, else `fault`. The space is given back if the
    /// store lets us; else the next save does that.
    pub async fn failed(&mut self, step: u64, fault: Error) -> Error {
        if let Ok(names) = self.store.list(&tidy::folder(step, self.term())).await {
            let _ = self.store.delete(&names).await;
        }
        match self.log.check_fence().await {
            Err(fenced @ Error::Fenced { .. }) => fenced,
            _ => fault,
        }
    }

    /// Marks a saved step of the current lineage as the best so far.
    ///
    /// # Errors
    /// [`Error::NoSuchStep`], [`Error::Fenced`], [`Error::Log`].
    pub async fn mark_best(&mut self, step: u64) -> Result<()> {
        let index = Index::new(self.log.entries());
        let Some(info) = index.of_step(step).filter(|c| c.current) else {
            return Err(Error::NoSuchStep { place: self.store.place().to_string(), step, have: index.steps() });
        };
        let of = info.seq;
        self.log.append(Kind::Best { of }).await.map(drop)
    }

    /// Writes the manifest; returns its hash, and bytes and number of the objects.
    async fn write_manifest(
        &self,
        path: &str,
        snapshot: &Snapshot,
        reports: Vec<Report>,
    ) -> Result<(String, u64, usize)> {
        let store = &self.store;
        let place = || store.place().to_string();
        let (objects, tensors) =
            join(reports).map_err(|why| Error::Parts { place: place(), step: snapshot.step, why })?;
        // Another writer may write to another place than we do; and what was cut short must not be committed.
        let there: HashMap<String, u64> = store.sizes(path).await?.into_iter().collect();
        for o in &objects {
            let object = format!("{path}/{}", o.name);
            let found = there.get(&object).copied();
            if found != Some(o.size) {
                return Err(Error::Lost { place: place(), object, written: o.size, found });
            }
        }
        let (total, count) = (objects.iter().map(|o| o.size).sum(), objects.len());
        let manifest = Manifest {
            format: FORMAT,
            step: snapshot.step,
            term: self.term(),
            created_unix_s: unix_s(),
            code_version: env!("CARGO_PKG_VERSION").to_string(),
            meta: snapshot.meta.clone(),
            objects,
            tensors,
        };
        let name = format!("{path}/manifest.json");
        let json = serde_json::to_vec_pretty(&manifest).map_err(|e| store.write_fault(&name, e.to_string()))?;
        let bytes = Bytes::from(json);
        let hash = digest::root(&digest::all(&bytes).await);
        store.write(&name, bytes).await?;
        Ok((hash, total, count))
    }
}

fn check_names(objects: &[Object]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for Object { name, .. } in objects {
        let bad = |why| Err(Error::BadName { name: name.clone(), why });
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.split('/').any(|s| s.is_empty() || s == "." || s == ".." || !s.chars().all(plain)) {
            return bad("use segments of letters, digits, `.`, `_` and `-`, joined by `/`");
        }
        if name == "manifest.json" {
            return bad("the name belongs to the manifest");
        }
        if !seen.insert(name) {
            return bad("it is there twice");
        }
    }
    Ok(())
}
