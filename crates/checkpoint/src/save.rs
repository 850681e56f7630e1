//! Saves checkpoints: objects of one or several writers, then the manifest, then the log entry that commits it; finally applies
//! retention.

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;
use serde_json::Value;

use crate::digest;
use crate::error::{Error, Result};
use crate::index::{CheckpointIndex, CheckpointInfo};
use crate::layout::ObjectLayout;
use crate::load::{Resume, ResumeCandidates};
use crate::log::{EntryKind, RunLog};
use crate::manifest::{FORMAT, Manifest, WriteReport, merge_reports};
use crate::retention::{self, Retention};
use crate::store::{Store, unix_s};
use crate::upload::{self, WriterId};

/// An object to write.
#[derive(Debug, Clone)]
pub struct Object {
    /// Name: segments of `[A-Za-z0-9._-]` joined by `/`, such as `model/config.json`.
    pub name: String,
    /// The whole contents.
    pub bytes: Bytes,
    /// Layout of its tensors, if it has any; `bytes` begins with the layout's header.
    pub layout: Option<ObjectLayout>,
}

/// The objects that one writer contributes to a checkpoint.
#[derive(Debug, Clone)]
pub struct WriteTask {
    /// Step after which it was taken.
    pub step: u64,
    /// Term of the learner.
    pub term: u64,
    /// Number of the writer, from 0; each uses its own object names.
    pub rank: usize,
    /// The objects to write.
    pub objects: Vec<Object>,
}

/// Step and metadata of a checkpoint.
#[derive(Debug, Clone)]
pub struct CheckpointHeader {
    /// Step after which it was taken.
    pub step: u64,
    /// The caller's metadata, stored in the manifest verbatim.
    pub meta: Value,
    /// Whether it is the best so far; retention can keep the latest one marked as best.
    pub best: bool,
}

/// Writes one writer's objects. They become part of a checkpoint when the report is passed to [`Checkpoints::commit`].
///
/// # Errors
/// Returns [`Error::Write`] with the object and the cause (disk full…), and [`Error::BadName`] for an invalid or repeated name.
pub async fn write(store: &Store, task: WriteTask) -> Result<WriteReport> {
    check_names(&task.objects)?;
    let folder = retention::checkpoint_folder(task.step, task.term);
    let named: Vec<(String, Bytes)> =
        task.objects.iter().map(|o| (format!("{folder}/{}", o.name), o.bytes.clone())).collect();
    let writer = WriterId { step: task.step, term: task.term, rank: task.rank };
    let mut objects = upload::write_all(store, writer, &named).await?;
    let mut slices = Vec::new();
    for (index, (written, object)) in objects.iter_mut().zip(&task.objects).enumerate() {
        written.name.clone_from(&object.name);
        let layout = object.layout.iter().flat_map(ObjectLayout::slices);
        slices.extend(layout.map(|(slice, offset)| (slice.clone(), index, offset)));
    }
    Ok(WriteReport { objects, slices })
}

/// A learner's claim on a run: one term, under which it saves checkpoints.
#[derive(Debug)]
pub struct Checkpoints {
    store: Store,
    log: RunLog,
    retention: Retention,
}

impl Checkpoints {
    /// Claims the run. Every learner with an earlier claim is fenced: it stops at its next commit. Its unfinished uploads are aborted.
    ///
    /// # Errors
    /// Returns [`Error::Fenced`] if another learner claims the run concurrently, [`Error::NoConditionalWrites`] if the store is
    /// unsuitable, or an error of the log or the store.
    pub async fn claim(store: Store, retention: Retention) -> Result<Self> {
        let mut log = RunLog::read(&store).await?;
        // A local directory always supports conditional writes: a hard link fails if its name exists.
        if store.root().is_none() {
            store.require_put_if_absent().await?;
        }
        let term = log.claim().await?;
        tracing::info!(location = store.location(), term, "run claimed");
        if let Err(e) = upload::abort_unfinished(&store, term).await {
            tracing::warn!(error = %e, "cannot abort unfinished uploads of earlier learners");
        }
        Ok(Self { store, log, retention })
    }

    /// Returns the claimed term, from 1.
    pub fn term(&self) -> u64 {
        self.log.term()
    }

    /// Returns the store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns the checkpoints to resume from.
    ///
    /// # Errors
    /// Returns [`Error::NoSuchStep`] if the requested step has no checkpoint.
    pub fn resume_candidates(&self, resume: Resume) -> Result<ResumeCandidates> {
        ResumeCandidates::new(&self.store, &CheckpointIndex::new(self.log.entries()), resume)
    }

    /// Records the checkpoint that the learner resumes from (`None`: none, it starts from scratch). Call it once, before the first save.
    ///
    /// # Errors
    /// Returns [`Error::Fenced`] if a newer learner has claimed the run, and [`Error::Log`] if the store does not accept the entry.
    pub async fn record_resume(&mut self, from: Option<&CheckpointInfo>) -> Result<()> {
        if from.is_some() || CheckpointIndex::new(self.log.entries()).started {
            self.log.append(EntryKind::Resumed { from: from.map(|c| c.seq) }).await?;
        }
        Ok(())
    }

    /// Returns whether this step has been saved in this term.
    pub fn has_step(&self, step: u64) -> bool {
        let term = self.term();
        CheckpointIndex::new(self.log.entries()).live.iter().any(|c| c.step == step && c.term == term)
    }

    /// Returns all existing checkpoints, as of the last read of the log.
    pub fn list(&self) -> Vec<CheckpointInfo> {
        CheckpointIndex::new(self.log.entries()).live
    }

    /// Fails if a newer learner has claimed the run. Cheap: reads only the log's next entry.
    ///
    /// # Errors
    /// Returns [`Error::Fenced`], or a store error.
    pub async fn check_fence(&mut self) -> Result<()> {
        self.log.check_fence().await
    }

    /// Checks that a save of `step` can be committed.
    ///
    /// # Errors
    /// Returns [`Error::StepAlreadySaved`], [`Error::Fenced`], or a store error.
    pub async fn begin_save(&mut self, step: u64) -> Result<()> {
        if self.has_step(step) {
            let location = self.store.location().to_string();
            return Err(Error::StepAlreadySaved { location, step, term: self.term() });
        }
        self.log.check_fence().await
    }

    /// Commits a checkpoint of the objects that all writers have reported. On success it is complete; on failure older ones are
    /// unchanged.
    ///
    /// Afterwards applies retention and deletes objects of unfinished saves; failures of either are logged, and the next save retries.
    ///
    /// # Errors
    /// Returns [`Error::Fenced`] if a newer learner has claimed the run, [`Error::ObjectMismatch`] if an object differs from its
    /// report, [`Error::IncompleteTensors`] if slices are missing, [`Error::Write`] and [`Error::Log`] for failed writes.
    pub async fn commit(&mut self, header: CheckpointHeader, reports: Vec<WriteReport>) -> Result<CheckpointInfo> {
        let step = header.step;
        let term = self.term();
        let path = retention::checkpoint_folder(step, term);
        self.log.check_fence().await?;
        let (manifest_blake3, bytes, objects) = match self.write_manifest(&path, &header, reports).await {
            Ok(written) => written,
            Err(e) => return Err(self.abandon_save(step, e).await),
        };
        let seq = self.log.append(EntryKind::Checkpoint { step, path, manifest_blake3, bytes, objects }).await?;
        if header.best {
            self.log.append(EntryKind::Best { checkpoint: seq }).await?;
        }
        tracing::info!(location = self.store.location(), step, term, bytes, "checkpoint saved");
        if let Err(e) = retention::apply_retention(&self.store, &mut self.log, self.retention).await {
            match e {
                Error::Fenced { .. } => return Err(e),
                e => tracing::warn!(error = %e, "cannot remove old checkpoints; the next save retries"),
            }
        }
        if let Err(e) = retention::delete_orphans(&self.store, &self.log).await {
            tracing::warn!(error = %e, "cannot remove orphaned objects; the next save retries");
        }
        let index = CheckpointIndex::new(self.log.entries());
        let missing = || Error::NoCheckpoint { location: self.store.location().to_string() };
        index.get(seq).cloned().ok_or_else(missing)
    }

    /// Saves a checkpoint as the only writer.
    ///
    /// # Errors
    /// See [`Checkpoints::begin_save`], [`write()`] and [`Checkpoints::commit`].
    pub async fn save(&mut self, header: CheckpointHeader, objects: Vec<Object>) -> Result<CheckpointInfo> {
        self.begin_save(header.step).await?;
        let task = WriteTask { step: header.step, term: self.term(), rank: 0, objects };
        match write(&self.store, task).await {
            Ok(report) => self.commit(header, vec![report]).await,
            Err(e) => Err(self.abandon_save(header.step, e).await),
        }
    }

    /// Cleans up after a save of `step` that failed with `error`, and returns the error to report: [`Error::Fenced`] if a newer learner
    /// has claimed the run, else `error`. Objects that cannot be deleted now are deleted by the next save.
    pub async fn abandon_save(&mut self, step: u64, error: Error) -> Error {
        if let Ok(names) = self.store.list(&retention::checkpoint_folder(step, self.term())).await {
            let _ = self.store.delete(&names).await;
        }
        match self.log.check_fence().await {
            Err(fenced @ Error::Fenced { .. }) => fenced,
            _ => error,
        }
    }

    /// Marks a saved step of the current lineage as the best so far.
    ///
    /// # Errors
    /// Returns [`Error::NoSuchStep`] if the current lineage does not have the step, [`Error::Fenced`] if a newer learner has claimed
    /// the run, and [`Error::Log`] if the store does not accept the entry.
    pub async fn mark_best(&mut self, step: u64) -> Result<()> {
        let index = CheckpointIndex::new(self.log.entries());
        let Some(info) = index.by_step(step).filter(|c| c.current) else {
            let location = self.store.location().to_string();
            return Err(Error::NoSuchStep { location, step, have: index.steps() });
        };
        let checkpoint = info.seq;
        self.log.append(EntryKind::Best { checkpoint }).await.map(drop)
    }

    /// Writes the manifest; returns its hash, the total size of the objects in bytes, and their number.
    async fn write_manifest(
        &self,
        path: &str,
        header: &CheckpointHeader,
        reports: Vec<WriteReport>,
    ) -> Result<(String, u64, usize)> {
        let store = &self.store;
        let location = || store.location().to_string();
        let (objects, tensors) = merge_reports(reports).map_err(|why| Error::IncompleteTensors {
            location: location(),
            step: header.step,
            why,
        })?;
        // Detects writers that use another store than ours, and truncated objects.
        let sizes: HashMap<String, u64> = store.sizes(path).await?.into_iter().collect();
        for o in &objects {
            let object = format!("{path}/{}", o.name);
            let found = sizes.get(&object).copied();
            if found != Some(o.size) {
                return Err(Error::ObjectMismatch { location: location(), object, written: o.size, found });
            }
        }
        let total_bytes = objects.iter().map(|o| o.size).sum();
        let object_count = objects.len();
        let manifest = Manifest {
            format: FORMAT,
            step: header.step,
            term: self.term(),
            created_unix_s: unix_s(),
            code_version: env!("CARGO_PKG_VERSION").to_string(),
            meta: header.meta.clone(),
            objects,
            tensors,
        };
        let name = format!("{path}/manifest.json");
        let json = serde_json::to_vec_pretty(&manifest).map_err(|e| store.write_error(&name, e.to_string()))?;
        let bytes = Bytes::from(json);
        let hash = digest::root_hash(&digest::hash_parts(&bytes).await);
        store.write(&name, bytes).await?;
        Ok((hash, total_bytes, object_count))
    }
}

fn check_names(objects: &[Object]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for Object { name, .. } in objects {
        let invalid = |why| Err(Error::BadName { name: name.clone(), why });
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.split('/').any(|s| s.is_empty() || s == "." || s == ".." || !s.chars().all(is_allowed)) {
            return invalid("use segments of letters, digits, `.`, `_` and `-`, joined by `/`");
        }
        if name == "manifest.json" {
            return invalid("the name is reserved for the manifest");
        }
        if !seen.insert(name) {
            return invalid("another object has the same name");
        }
    }
    Ok(())
}
