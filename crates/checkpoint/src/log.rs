//! The run log: `log/{seq:08}.json`, one entry per object, written by put-if-absent at last + 1.
//!
//! It orders everything that happens to a run and fences learners: a learner claims a term, and whoever finds a higher
//! term than its own stops. Each entry carries a nonce; after any error the writer reads back what is there, because a
//! retried request can fail although its first try succeeded.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, cause};
use crate::store::{Store, nonce, unix_s};

/// Tries of one entry when the store neither takes it nor holds another.
const TRIES: u32 = 5;

/// One entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Number in the log, from 1.
    pub seq: u64,
    /// Random, unique to the writer's attempt.
    pub nonce: String,
    /// Term of the writer.
    pub term: u64,
    /// Clock of the writer, for the reader.
    pub written_unix_s: u64,
    /// What happened.
    #[serde(flatten)]
    pub kind: Kind,
}

/// What an entry says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Kind {
    /// A learner takes the run over; all lower terms are fenced from here on.
    Claim {
        /// Version of the program.
        code_version: String,
    },
    /// Training goes on from a checkpoint (`None`: afresh).
    Resumed {
        /// Entry of that checkpoint.
        from: Option<u64>,
    },
    /// A checkpoint exists.
    Checkpoint {
        /// Its step.
        step: u64,
        /// Its folder.
        path: String,
        /// BLAKE3 of its manifest, hex.
        manifest_blake3: String,
        /// Bytes of all objects.
        bytes: u64,
        /// Number of objects.
        objects: usize,
    },
    /// A checkpoint is the best so far.
    Best {
        /// Entry of that checkpoint.
        of: u64,
    },
    /// Checkpoints stop to exist; their objects are deleted after this.
    Removed {
        /// Their entries.
        of: Vec<u64>,
    },
    /// Written by a later version of the program.
    #[serde(other)]
    Unknown,
}

/// The entries, and the right to append to them.
#[derive(Debug)]
pub struct RunLog {
    store: Store,
    entries: Vec<Entry>,
    term: u64,
}

impl RunLog {
    /// Reads the whole log. Appending needs a claim.
    ///
    /// # Errors
    /// A store error, or [`Error::Corrupt`] for an entry that is missing in the middle or does not parse.
    pub async fn read(store: &Store) -> Result<Self> {
        let corrupt = |object: String, why: String| Error::Corrupt { place: store.place().to_string(), object, why };
        let mut seqs = Vec::new();
        for name in store.list("log").await? {
            let number = name.strip_prefix("log/").and_then(|n| n.strip_suffix(".json")).map(str::parse::<u64>);
            match number {
                Some(Ok(seq)) if entry_name(seq) == name => seqs.push(seq),
                _ => tracing::warn!(name, "a file in the log folder is not a log entry; it is left alone"),
            }
        }
        seqs.sort_unstable();
        if let Some((want, _)) = (1..).zip(&seqs).find(|(want, seq)| want != *seq) {
            return Err(corrupt(entry_name(want), "the entry is missing, later ones are there".into()));
        }
        let entries: Vec<Entry> = futures::stream::iter(seqs)
            .map(|seq| read_entry(store, seq))
            .buffered(16)
            .zip(futures::stream::iter(1..))
            .map(|(e, seq)| e?.ok_or_else(|| corrupt(entry_name(seq), "it vanished while it was read".into())))
            .try_collect()
            .await?;
        Ok(Self { store: store.clone(), entries, term: 0 })
    }

    /// All entries, oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The term this handle writes under; 0 before a claim.
    pub fn term(&self) -> u64 {
        self.term
    }

    fn highest_term(&self) -> u64 {
        self.entries.iter().map(|e| e.term).max().unwrap_or(0)
    }

    /// Claims the next term.
    ///
    /// # Errors
    /// [`Error::Fenced`] when another learner claims at the same moment, or a store error.
    pub async fn claim(&mut self) -> Result<u64> {
        let term = self.highest_term() + 1;
        let code_version = env!("CARGO_PKG_VERSION").to_string();
        self.write(term, Kind::Claim { code_version }).await?;
        self.term = term;
        Ok(term)
    }

    /// Writes under the highest term without claiming: for maintenance beside a running learner, which is not fenced.
    pub(crate) fn join(&mut self) {
        self.term = self.highest_term();
    }

    /// Appends an entry.
    ///
    /// # Errors
    /// [`Error::Fenced`] when a newer learner has claimed the run, [`Error::Log`] when the store does not take it.
    pub async fn append(&mut self, kind: Kind) -> Result<u64> {
        self.write(self.term, kind).await
    }

    /// Reads entries that others have appended, and fails if one of them has a higher term.
    ///
    /// # Errors
    /// [`Error::Fenced`], or a store error.
    pub async fn check_fence(&mut self) -> Result<()> {
        while let Some(e) = read_entry(&self.store, self.next()).await? {
            self.entries.push(e);
        }
        self.fence(self.term, false)
    }

    fn next(&self) -> u64 {
        self.entries.len() as u64 + 1
    }

    fn fence(&self, term: u64, claiming: bool) -> Result<()> {
        let theirs = self.highest_term();
        if theirs > term || (claiming && theirs == term) {
            return Err(Error::Fenced { place: self.store.place().to_string(), ours: term, theirs });
        }
        Ok(())
    }

    async fn write(&mut self, term: u64, kind: Kind) -> Result<u64> {
        let claiming = matches!(kind, Kind::Claim { .. });
        let mut entry = Entry { seq: 0, nonce: nonce(), term, written_unix_s: unix_s(), kind };
        let mut tries = 0;
        loop {
            self.fence(term, claiming)?;
            entry.seq = self.next();
            let log_fault = |cause: String| Error::Log { place: self.store.place().to_string(), seq: entry.seq, cause };
            let json = serde_json::to_vec(&entry).map_err(|e| log_fault(e.to_string()))?;
            let Err(error) = self.store.write_new(&entry_name(entry.seq), Bytes::from(json)).await else {
                self.entries.push(entry);
                return Ok(self.entries.len() as u64);
            };
            match read_entry(&self.store, entry.seq).await {
                Ok(Some(found)) if found.nonce == entry.nonce => {
                    self.entries.push(found);
                    return Ok(self.entries.len() as u64);
                }
                Ok(Some(found)) => {
                    // lost the race for this number: take the other's entry in, and look at its term
                    self.entries.push(found);
                    continue;
                }
                Ok(None) => {}
                Err(e @ Error::Corrupt { .. }) => return Err(e),
                Err(e) => tracing::warn!(error = %e, "cannot read a log entry back"),
            }
            tries += 1;
            if tries >= TRIES {
                return Err(log_fault(cause(&error)));
            }
            tracing::warn!(seq = entry.seq, error = cause(&error), "a log entry was not taken; trying again");
            tokio::time::sleep(Duration::from_millis(50 << tries)).await;
        }
    }
}

fn entry_name(seq: u64) -> String {
    format!("log/{seq:08}.json")
}

async fn read_entry(store: &Store, seq: u64) -> Result<Option<Entry>> {
    let name = entry_name(seq);
    let Some(bytes) = store.read(&name).await? else { return Ok(None) };
    let corrupt = |why: String| Error::Corrupt { place: store.place().to_string(), object: name.clone(), why };
    let entry: Entry = serde_json::from_slice(&bytes).map_err(|e| corrupt(e.to_string()))?;
    if entry.seq != seq {
        return Err(corrupt(format!("it says it is entry {}", entry.seq)));
    }
    Ok(Some(entry))
}
