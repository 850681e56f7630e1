//! Retention, and what saves that never finished left.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use crate::error::Result;
use crate::index::{CheckpointInfo, Index};
use crate::log::{Kind, RunLog};
use crate::store::Store;
use crate::upload;

/// How many checkpoints stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many of the current lineage (at least 1 stays); checkpoints of lineages that were left fill up
    /// what is not used.
    pub keep: usize,
    /// Whether the best one stays beside them.
    pub keep_best: bool,
    /// Milestones stay beside them: those of the current lineage whose step is a multiple of this (0 = none).
    pub keep_every: u64,
}

impl Retention {
    fn spares(&self, c: &CheckpointInfo) -> bool {
        let milestone = self.keep_every > 0 && c.current && c.step.is_multiple_of(self.keep_every);
        milestone || (self.keep_best && c.best)
    }
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
/// Store errors; [`crate::Error::Fenced`] when a learner claims the run meanwhile.
pub async fn prune(store: &Store, retention: Retention, orphans: bool) -> Result<Pruned> {
    let mut log = RunLog::read(store).await?;
    log.join();
    let removed = remove_beyond(store, &mut log, retention).await?;
    let orphans = if orphans {
        // Those of the newest term may be a running learner's.
        upload::abort_left(store, log.term()).await?;
        sweep(store, &log).await?
    } else {
        0
    };
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
    let beyond = order.into_iter().skip(keep.keep.max(1)).filter(|c| !keep.spares(c));
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

/// Step and term of a checkpoint's folder, from the name of something in it.
fn step_and_term(name: &str) -> Option<(u64, u64)> {
    let parts: Vec<&str> = name.splitn(4, '/').collect();
    let [_, step, term, ..] = parts[..] else { return None };
    let number = |s: &str, p: &str| s.strip_prefix(p).and_then(|n| n.parse::<u64>().ok());
    Some((number(step, "step-")?, number(term, "term-")?))
}

/// Deletes objects of no checkpoint, written under our term or an earlier one; returns how many. Those of a later term
/// are another learner's save in progress.
pub(crate) async fn sweep(store: &Store, log: &RunLog) -> Result<usize> {
    let live: BTreeSet<String> = Index::new(log.entries()).live.into_iter().map(|c| c.path).collect();
    let ours = log.term();
    let left = |name: &str| {
        step_and_term(name).is_some_and(|(step, term)| term <= ours && !live.contains(&folder(step, term)))
    };
    let names: Vec<String> = store.list("checkpoints").await?.into_iter().filter(|n| left(n)).collect();
    if !names.is_empty() {
        store.delete(&names).await?;
        tracing::info!(place = store.place(), objects = names.len(), "left-over objects are removed");
    }
    if let Some(root) = store.root() {
        for name in folders(root) {
            // What a killed writer had staged is in no list.
            if left(&name) {
                let _ = std::fs::remove_dir_all(root.join(&name));
            }
        }
        // Steps' own folders, unless another term has something there; a writer may have been killed before it made more.
        for step in inside(&root.join("checkpoints")) {
            let _ = std::fs::remove_dir(root.join("checkpoints").join(step));
        }
    }
    Ok(names.len())
}

fn inside(dir: &Path) -> Vec<String> {
    let found = std::fs::read_dir(dir).into_iter().flatten().flatten();
    found.filter_map(|e| e.file_name().into_string().ok()).collect()
}

/// Folders of checkpoints in a directory.
fn folders(root: &Path) -> Vec<String> {
    let all = root.join("checkpoints");
    let of = |step: String| {
        let terms = inside(&all.join(&step)).into_iter();
        terms.map(move |term| format!("checkpoints/{step}/{term}"))
    };
    inside(&all).into_iter().flat_map(of).collect()
}
