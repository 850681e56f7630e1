//! Retention of checkpoints, and removal of objects left by unfinished saves.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use crate::error::Result;
use crate::index::{CheckpointIndex, CheckpointInfo};
use crate::log::{EntryKind, RunLog};
use crate::store::Store;
use crate::upload;

/// Rules for the checkpoints to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Number of the newest checkpoints to keep, at least 1. Those of the current lineage come first; checkpoints of abandoned
    /// lineages use up the rest.
    pub keep: usize,
    /// Whether to keep the best checkpoint in addition.
    pub keep_best: bool,
    /// Keeps, in addition, checkpoints of the current lineage whose step is a multiple of this; 0 keeps none.
    pub keep_every: u64,
}

impl Retention {
    /// Returns whether a checkpoint is kept regardless of its age.
    fn always_keeps(&self, c: &CheckpointInfo) -> bool {
        let milestone = self.keep_every > 0 && c.current && c.step.is_multiple_of(self.keep_every);
        milestone || (self.keep_best && c.best)
    }
}

/// Checkpoints and objects that [`prune`] has removed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Pruned {
    /// The removed checkpoints.
    pub removed: Vec<CheckpointInfo>,
    /// Number of deleted objects that belonged to no checkpoint.
    pub orphans: usize,
}

/// Removes checkpoints beyond the retention and, with `orphans`, objects that belong to no checkpoint.
///
/// Pruning does not fence a running learner. Orphans of the current term may be a running learner's unfinished save, so request
/// their removal only when no learner runs.
///
/// # Errors
/// Returns [`crate::Error::Fenced`] if a learner claims the run meanwhile, or a store error.
pub async fn prune(store: &Store, retention: Retention, orphans: bool) -> Result<Pruned> {
    let mut log = RunLog::read(store).await?;
    log.adopt_highest_term();
    let removed = apply_retention(store, &mut log, retention).await?;
    let orphans = if orphans {
        // Uploads of the newest term may belong to a running learner.
        upload::abort_unfinished(store, log.term()).await?;
        delete_orphans(store, &log).await?
    } else {
        0
    };
    Ok(Pruned { removed, orphans })
}

/// Returns the folder of a checkpoint under the run's prefix.
pub(crate) fn checkpoint_folder(step: u64, term: u64) -> String {
    format!("checkpoints/step-{step}/term-{term}")
}

/// Removes checkpoints beyond the retention. Writes the log entry before it deletes objects, so that no learner resumes from a
/// checkpoint that is being deleted.
pub(crate) async fn apply_retention(
    store: &Store,
    log: &mut RunLog,
    retention: Retention,
) -> Result<Vec<CheckpointInfo>> {
    let index = CheckpointIndex::new(log.entries());
    let mut newest_first: Vec<&CheckpointInfo> = index.live.iter().collect();
    newest_first.sort_by_key(|c| std::cmp::Reverse((c.current, c.seq)));
    let excess = newest_first.into_iter().skip(retention.keep.max(1)).filter(|c| !retention.always_keeps(c));
    let removed: Vec<CheckpointInfo> = excess.cloned().collect();
    if removed.is_empty() {
        return Ok(removed);
    }
    log.append(EntryKind::Removed { checkpoints: removed.iter().map(|c| c.seq).collect() }).await?;
    for c in &removed {
        let names = store.list(&c.path).await?;
        // Delete the manifest first, so that leftovers of an interruption cannot be mistaken for a checkpoint.
        let (manifest, objects): (Vec<_>, Vec<_>) = names.into_iter().partition(|n| n.ends_with("/manifest.json"));
        store.delete(&manifest).await?;
        store.delete(&objects).await?;
        tracing::info!(location = store.location(), step = c.step, term = c.term, "checkpoint removed");
    }
    Ok(removed)
}

/// Parses step and term from the name of an object in a checkpoint's folder.
fn step_and_term(name: &str) -> Option<(u64, u64)> {
    let segments: Vec<&str> = name.splitn(4, '/').collect();
    let [_, step, term, ..] = segments[..] else { return None };
    let number = |segment: &str, prefix: &str| segment.strip_prefix(prefix).and_then(|n| n.parse::<u64>().ok());
    Some((number(step, "step-")?, number(term, "term-")?))
}

/// Deletes objects of no checkpoint that were written in our term or an earlier one, and returns their number. Objects of a later term
/// are another learner's save in progress.
pub(crate) async fn delete_orphans(store: &Store, log: &RunLog) -> Result<usize> {
    let live: BTreeSet<String> = CheckpointIndex::new(log.entries()).live.into_iter().map(|c| c.path).collect();
    let own_term = log.term();
    let is_orphan = |name: &str| {
        step_and_term(name)
            .is_some_and(|(step, term)| term <= own_term && !live.contains(&checkpoint_folder(step, term)))
    };
    let names: Vec<String> = store.list("checkpoints").await?.into_iter().filter(|n| is_orphan(n)).collect();
    if !names.is_empty() {
        store.delete(&names).await?;
        tracing::info!(location = store.location(), objects = names.len(), "orphaned objects removed");
    }
    if let Some(root) = store.root() {
        for name in term_folders(root) {
            // The store does not list files that a killed writer had staged.
            if is_orphan(&name) {
                let _ = std::fs::remove_dir_all(root.join(&name));
            }
        }
        // Remove empty step folders: a writer may have been killed before it created anything inside.
        for step in entry_names(&root.join("checkpoints")) {
            let _ = std::fs::remove_dir(root.join("checkpoints").join(step));
        }
    }
    Ok(names.len())
}

fn entry_names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

/// Returns all term folders in a run's directory, relative to it.
fn term_folders(root: &Path) -> Vec<String> {
    let checkpoints = root.join("checkpoints");
    let terms_of = |step: String| {
        let terms = entry_names(&checkpoints.join(&step)).into_iter();
        terms.map(move |term| format!("checkpoints/{step}/{term}"))
    };
    entry_names(&checkpoints).into_iter().flat_map(terms_of).collect()
}
