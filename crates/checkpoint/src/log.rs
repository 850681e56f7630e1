//! The run log: `log/{seq:08}.json`, one entry per object, appended by put-if-absent at the next number.
//!
//! It orders all events of a run and fences learners: a learner claims a term, and a learner that reads a higher term than its own
//! stops. Each entry has a nonce; after any error the writer reads the entry back, because a retried request can fail although its
//! first attempt succeeded.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, cause};
use crate::store::{Store, nonce, unix_s};

/// Attempts to write an entry when the store neither accepts it nor has another one.
const MAX_ATTEMPTS: u32 = 5;

/// One entry of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Number in the log, from 1.
    pub seq: u64,
    /// Random value, unique to the writer's attempt.
    pub nonce: String,
    /// Term of the writer.
    pub term: u64,
    /// Time of the writer's clock, in Unix seconds; informational.
    pub written_unix_s: u64,
    /// The event.
    #[serde(flatten)]
    pub kind: EntryKind,
}

/// The event that an entry records.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EntryKind {
    /// A learner claims the run; all lower terms are fenced from here on.
    Claim {
        /// Version of the program.
        code_version: String,
    },
    /// Training resumes from a checkpoint (`None`: starts from scratch).
    Resumed {
        /// Log entry of the checkpoint.
        from: Option<u64>,
    },
    /// A checkpoint is committed.
    Checkpoint {
        /// Step after which it was taken.
        step: u64,
        /// Folder under the run's prefix.
        path: String,
        /// BLAKE3 of the manifest, hex.
        manifest_blake3: String,
        /// Total size of all objects, in bytes.
        bytes: u64,
        /// Number of objects.
        objects: usize,
    },
    /// A checkpoint is the best so far.
    Best {
        /// Log entry of the checkpoint.
        #[serde(rename = "of")]
        checkpoint: u64,
    },
    /// Checkpoints cease to exist; their objects are deleted afterwards.
    Removed {
        /// Log entries of the checkpoints.
        #[serde(rename = "of")]
        checkpoints: Vec<u64>,
    },
    /// An entry written by a later version of the program.
    #[serde(other)]
    Unknown,
}

/// The entries, and the right to append to them.
#[derive(Debug)]
pub struct RunLog {
    store: Store,
    entries: Vec<LogEntry>,
    term: u64,
}

impl RunLog {
    /// Reads the whole log. Appending requires a claim.
    ///
    /// # Errors
    /// Returns [`Error::Corrupt`] if an entry is missing in the middle or malformed, or a store error.
    pub async fn read(store: &Store) -> Result<Self> {
        let corrupt =
            |object: String, why: String| Error::Corrupt { location: store.location().to_string(), object, why };
        let mut seqs = Vec::new();
        for name in store.list("log").await? {
            let number = name.strip_prefix("log/").and_then(|n| n.strip_suffix(".json")).map(str::parse::<u64>);
            match number {
                Some(Ok(seq)) if entry_name(seq) == name => seqs.push(seq),
                _ => tracing::warn!(name, "ignoring file that is not a log entry"),
            }
        }
        seqs.sort_unstable();
        if let Some((expected, _)) = (1..).zip(&seqs).find(|(expected, seq)| expected != *seq) {
            return Err(corrupt(entry_name(expected), "the entry is missing, but later ones exist".into()));
        }
        let entries: Vec<LogEntry> = futures::stream::iter(seqs)
            .map(|seq| read_entry(store, seq))
            .buffered(16)
            .zip(futures::stream::iter(1..))
            .map(|(e, seq)| e?.ok_or_else(|| corrupt(entry_name(seq), "it was deleted while the log was read".into())))
            .try_collect()
            .await?;
        Ok(Self { store: store.clone(), entries, term: 0 })
    }

    /// Returns all entries, oldest first.
    pub fn entries(&self) -> &[LogEntry] {
        &self.entries
    }

    /// Returns the term of this handle; 0 before a claim.
    pub fn term(&self) -> u64 {
        self.term
    }

    fn highest_term(&self) -> u64 {
        self.entries.iter().map(|e| e.term).max().unwrap_or(0)
    }

    /// Claims the next term.
    ///
    /// # Errors
    /// Returns [`Error::Fenced`] if another learner claims the run concurrently, or a store error.
    pub async fn claim(&mut self) -> Result<u64> {
        let term = self.highest_term() + 1;
        let code_version = env!("CARGO_PKG_VERSION").to_string();
        self.write(term, EntryKind::Claim { code_version }).await?;
        self.term = term;
        Ok(term)
    }

    /// Adopts the highest term without claiming it: for maintenance while a learner runs, without fencing it.
    pub(crate) fn adopt_highest_term(&mut self) {
        self.term = self.highest_term();
    }

    /// Appends an entry.
    ///
    /// # Errors
    /// Returns [`Error::Fenced`] if a newer learner has claimed the run, and [`Error::Log`] if the store does not accept the entry.
    pub async fn append(&mut self, kind: EntryKind) -> Result<u64> {
        self.write(self.term, kind).await
    }

    /// Reads entries that other processes have appended, and fails if one of them has a higher term.
    ///
    /// # Errors
    /// Returns [`Error::Fenced`] if a newer learner has claimed the run, or a store error.
    pub async fn check_fence(&mut self) -> Result<()> {
        while let Some(e) = read_entry(&self.store, self.next_seq()).await? {
            self.entries.push(e);
        }
        self.check_term(self.term, false)
    }

    fn next_seq(&self) -> u64 {
        self.entries.len() as u64 + 1
    }

    fn check_term(&self, term: u64, claiming: bool) -> Result<()> {
        let theirs = self.highest_term();
        if theirs > term || (claiming && theirs == term) {
            return Err(Error::Fenced { location: self.store.location().to_string(), ours: term, theirs });
        }
        Ok(())
    }

    async fn write(&mut self, term: u64, kind: EntryKind) -> Result<u64> {
        let claiming = matches!(kind, EntryKind::Claim { .. });
        let mut entry = LogEntry { seq: 0, nonce: nonce(), term, written_unix_s: unix_s(), kind };
        let mut attempts = 0;
        loop {
            self.check_term(term, claiming)?;
            entry.seq = self.next_seq();
            let log_error =
                |cause: String| Error::Log { location: self.store.location().to_string(), seq: entry.seq, cause };
            let json = serde_json::to_vec(&entry).map_err(|e| log_error(e.to_string()))?;
            let Err(error) = self.store.write_new(&entry_name(entry.seq), Bytes::from(json)).await else {
                self.entries.push(entry);
                return Ok(self.entries.len() as u64);
            };
            match read_entry(&self.store, entry.seq).await {
                Ok(Some(stored)) if stored.nonce == entry.nonce => {
                    self.entries.push(stored);
                    return Ok(self.entries.len() as u64);
                }
                Ok(Some(stored)) => {
                    // Lost the race for this number: record the other entry, then check its term.
                    self.entries.push(stored);
                    continue;
                }
                Ok(None) => {}
                Err(e @ Error::Corrupt { .. }) => return Err(e),
                Err(e) => tracing::warn!(error = %e, "cannot read back log entry"),
            }
            attempts += 1;
            if attempts >= MAX_ATTEMPTS {
                return Err(log_error(cause(&error)));
            }
            tracing::warn!(seq = entry.seq, error = cause(&error), "writing log entry failed, retrying");
            tokio::time::sleep(Duration::from_millis(50 << attempts)).await;
        }
    }
}

fn entry_name(seq: u64) -> String {
    format!("log/{seq:08}.json")
}

async fn read_entry(store: &Store, seq: u64) -> Result<Option<LogEntry>> {
    let name = entry_name(seq);
    let Some(bytes) = store.read(&name).await? else { return Ok(None) };
    let corrupt = |why: String| Error::Corrupt { location: store.location().to_string(), object: name.clone(), why };
    let entry: LogEntry = serde_json::from_slice(&bytes).map_err(|e| corrupt(e.to_string()))?;
    if entry.seq != seq {
        return Err(corrupt(format!("its `seq` is {}", entry.seq)));
    }
    Ok(Some(entry))
}
