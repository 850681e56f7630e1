//! Writing checkpoints: objects, then the manifest, then the log entry that makes it exist; then tidying up.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::index::{CheckpointInfo, Index, Manifest, ManifestObject};
use crate::load::{Loaded, Resume, load_from};
use crate::log::{Kind, RunLog};
use crate::store::{Store, hash, unix_s};
use crate::tidy::{self, Retention};

/// Objects written at once.
const PARALLEL: usize = 4;

/// What to save.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Step after which it was taken.
    pub step: u64,
    /// Objects by name: segments of `[A-Za-z0-9._-]` joined by `/`, such as `model/model.safetensors`.
    pub objects: Vec<(String, Bytes)>,
    /// Goes into the manifest as it is.
    pub meta: Value,
    /// Whether it is the best so far: retention spares the newest one that was.
    pub best: bool,
}

/// A learner's hold on a run: one term, under which it saves.
#[derive(Debug)]
pub struct Checkpoints {
    store: Store,
    log: RunLog,
    retention: Retention,
}

impl Checkpoints {
    /// Claims the run. Every learner that held it before is fenced: it stops at its next commit.
    ///
    /// # Errors
    /// When the log cannot be read or written, or another learner claims at the same moment.
    pub async fn claim(store: Store, retention: Retention) -> Result<Self> {
        let mut log = RunLog::read(&store).await?;
        let term = log.claim().await?;
        tracing::info!(place = store.place(), term, "the run is claimed");
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

    /// Loads what to go on from and records that in the log. Call it once, before the first save. `None`: afresh.
    ///
    /// # Errors
    /// As [`crate::load`], and [`Error::Fenced`].
    pub async fn resume(&mut self, resume: Resume) -> Result<Option<Loaded>> {
        let index = Index::new(self.log.entries());
        let loaded = load_from(&self.store, &index, resume).await?;
        if loaded.is_some() || index.begun {
            self.log.append(Kind::Resumed { from: loaded.as_ref().map(|l| l.info.seq) }).await?;
        }
        Ok(loaded)
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

    /// Saves. When it returns, the checkpoint is whole and committed; when it fails, older ones are as they were.
    ///
    /// Then retention removes what is beyond it, and objects of saves that never finished are deleted; trouble with
    /// that is logged and tried again at the next save.
    ///
    /// # Errors
    /// [`Error::Write`] names the object and the cause (disk full…); [`Error::Fenced`]; [`Error::StepTaken`];
    /// [`Error::BadName`]; [`Error::Log`].
    pub async fn save(&mut self, snapshot: Snapshot) -> Result<CheckpointInfo> {
        let (step, term) = (snapshot.step, self.term());
        check_names(&snapshot.objects)?;
        if self.has_step(step) {
            return Err(Error::StepTaken { place: self.store.place().to_string(), step, term });
        }
        self.log.check_fence().await?;
        let path = tidy::folder(step, term);
        let written = self.write(&path, &snapshot).await;
        let (manifest_blake3, bytes) = match written {
            Ok(x) => x,
            Err(e) => {
                self.discard(&path).await;
                return Err(e);
            }
        };
        let objects = snapshot.objects.len();
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

    async fn write(&self, path: &str, snapshot: &Snapshot) -> Result<(String, u64)> {
        let store = &self.store;
        let objects: Vec<ManifestObject> = futures::stream::iter(&snapshot.objects)
            .map(|(name, bytes)| async move {
                store.write(&format!("{path}/{name}"), bytes.clone()).await?;
                let blake3 = hash(bytes).await;
                Ok::<_, Error>(ManifestObject { name: name.clone(), size: bytes.len() as u64, blake3 })
            })
            .buffered(PARALLEL)
            .try_collect()
            .await?;
        let total = objects.iter().map(|o| o.size).sum();
        let manifest = Manifest {
            format: 1,
            step: snapshot.step,
            term: self.term(),
            created_unix_s: unix_s(),
            code_version: env!("CARGO_PKG_VERSION").to_string(),
            meta: snapshot.meta.clone(),
            objects,
        };
        let name = format!("{path}/manifest.json");
        let json = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::Write {
            place: store.place().to_string(),
            object: name.clone(),
            cause: e.to_string(),
        })?;
        let bytes = Bytes::from(json);
        let digest = hash(&bytes).await;
        store.write(&name, bytes).await?;
        Ok((digest, total))
    }

    /// Gives the space of a failed save back, if the store lets us; else the next save does.
    async fn discard(&self, path: &str) {
        if let Ok(names) = self.store.list(path).await {
            let _ = self.store.delete(&names).await;
        }
    }
}

fn check_names(objects: &[(String, Bytes)]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for (name, _) in objects {
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
