//! Retention, orphans, and export of a model from a checkpoint.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::Serialize;

use crate::error::{Error, Result, cause};
use crate::index::{CheckpointInfo, Index};
use crate::load::{pick, read_manifest, read_object};
use crate::log::{Kind, RunLog};
use crate::store::{Store, nonce};

/// How many checkpoints stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many of the current lineage (at least 1 stays); checkpoints of lineages that were left fill up
    /// what is not used.
    pub keep: usize,
    /// Whether the best one stays beside them.
    pub keep_best: bool,
}

/// What [`prune`] did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Pruned {
    /// Checkpoints removed.
    pub removed: Vec<CheckpointInfo>,
    /// Objects deleted that belonged to no checkpoint.
    pub orphans: usize,
}

/// Removes checkpoints beyond the retention, and orphans if asked to.
///
/// It does not fence a running learner. Orphans of the current term may be a running learner's unfinished save, so ask
/// for them only when none runs.
///
/// # Errors
/// Store errors; [`Error::Fenced`] when a learner claims the run meanwhile.
pub async fn prune(store: &Store, retention: Retention, orphans: bool) -> Result<Pruned> {
    let mut log = RunLog::read(store).await?;
    log.join();
    let removed = remove_beyond(store, &mut log, retention).await?;
    let orphans = if orphans { sweep(store, &log).await? } else { 0 };
    Ok(Pruned { removed, orphans })
}

/// Folder of a checkpoint under the run's prefix.
pub(crate) fn folder(step: u64, term: u64) -> String {
    format!("checkpoints/step-{step}/term-{term}")
}

/// Writes the log entry first: from then on nobody resumes from what is about to be deleted.
pub(crate) async fn remove_beyond(store: &Store, log: &mut RunLog, keep: Retention) -> Result<Vec<CheckpointInfo>> {
    let index = Index::new(log.entries());
    let mut order: Vec<&CheckpointInfo> = index.live.iter().collect();
    order.sort_by_key(|c| std::cmp::Reverse((c.current, c.seq)));
    let beyond = order.into_iter().skip(keep.keep.max(1)).filter(|c| !(keep.keep_best && c.best));
    let removed: Vec<CheckpointInfo> = beyond.cloned().collect();
    if removed.is_empty() {
        return Ok(removed);
    }
    log.append(Kind::Removed { of: removed.iter().map(|c| c.seq).collect() }).await?;
    for c in &removed {
        let names = store.list(&c.path).await?;
        // the manifest first: what is left after an interruption cannot be taken for a checkpoint
        let (manifest, objects): (Vec<_>, Vec<_>) = names.into_iter().partition(|n| n.ends_with("/manifest.json"));
        store.delete(&manifest).await?;
        store.delete(&objects).await?;
        tracing::info!(place = store.place(), step = c.step, term = c.term, "a checkpoint is removed");
    }
    Ok(removed)
}

/// Deletes objects of no checkpoint, written under our term or an earlier one; returns how many. Those of a later term
/// are another learner's save in progress.
pub(crate) async fn sweep(store: &Store, log: &RunLog) -> Result<usize> {
    let live: BTreeSet<String> = Index::new(log.entries()).live.into_iter().map(|c| c.path).collect();
    let ours = log.term();
    let orphan = |name: &String| {
        let parts: Vec<&str> = name.splitn(4, '/').collect();
        let [_, step, term, _] = parts[..] else { return false };
        let number = |s: &str, p: &str| s.strip_prefix(p).and_then(|n| n.parse::<u64>().ok());
        match (number(step, "step-"), number(term, "term-")) {
            (Some(step), Some(term)) => term <= ours && !live.contains(&folder(step, term)),
            _ => false,
        }
    };
    let names: Vec<String> = store.list("checkpoints").await?.into_iter().filter(orphan).collect();
    if !names.is_empty() {
        store.delete(&names).await?;
        tracing::info!(place = store.place(), objects = names.len(), "left-over objects are removed");
    }
    Ok(names.len())
}

/// Writes the objects under `prefix` (such as `model/`, which is cut off) of a checkpoint to the directory `out`,
/// which must not exist or be empty: it appears whole or not at all. Returns the files.
///
/// # Errors
/// [`Error::Empty`], [`Error::NoSuchStep`], damage as [`Error::Corrupt`], [`Error::Export`].
pub async fn export(store: &Store, step: Option<u64>, out: &Path, prefix: &str) -> Result<Vec<PathBuf>> {
    let fault = |cause: String| Error::Export { dir: out.display().to_string(), cause };
    let index = Index::new(RunLog::read(store).await?.entries());
    let info = pick(store, &index, step)?;
    let manifest = read_manifest(store, info).await?;
    let mut files: Vec<(String, Bytes)> = Vec::new();
    for object in &manifest.objects {
        // names come from the store: none may lead out of the directory
        let Some(name) = object.name.strip_prefix(prefix).filter(|n| !n.is_empty()) else { continue };
        if name.split('/').any(|s| s.is_empty() || s == "." || s == "..") {
            return Err(fault(format!("the object name `{name}` leads out of the directory")));
        }
        files.push((name.to_string(), read_object(store, info, object).await?));
    }
    if files.is_empty() {
        return Err(fault(format!("the checkpoint of step {} has no objects under `{prefix}`", info.step)));
    }
    let target = out.to_path_buf();
    let done = tokio::task::spawn_blocking(move || write_dir(&target, &files)).await;
    done.map_err(|e| fault(e.to_string()))?.map_err(|e| fault(cause(&e)))
}

fn write_dir(out: &Path, files: &[(String, Bytes)]) -> std::io::Result<Vec<PathBuf>> {
    let taken = |why: &str| Err(std::io::Error::new(std::io::ErrorKind::AlreadyExists, why.to_string()));
    match std::fs::read_dir(out).map(Iterator::count) {
        Ok(1..) => return taken("the directory is not empty"),
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let Some(name) = out.file_name() else { return taken("the path has no last component") };
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    let partial = parent.join(format!(".{}.partial-{}", name.to_string_lossy(), nonce()));
    let written = (|| {
        for (file, bytes) in files {
            let path = partial.join(file);
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir)?;
            }
            let mut f = std::fs::File::create_new(&path)?;
            std::io::Write::write_all(&mut f, bytes)?;
            f.sync_all()?;
        }
        std::fs::rename(&partial, out)
    })();
    if let Err(e) = written {
        let _ = std::fs::remove_dir_all(&partial);
        return Err(e);
    }
    Ok(files.iter().map(|(file, _)| out.join(file)).collect())
}
