//! Checkpoints and the run log, in a directory or an object store.
//!
//! Layout under a run's prefix: `log/{seq:08}.json` (append-only, the source of truth) and
//! `checkpoints/step-N/term-T/{objects…, manifest.json}`. A checkpoint exists when a log entry names its manifest; the term folder
//! keeps a learner that was paused and superseded from touching its successor's objects.
//!
//! Tensors are keyed by kind, parameter name and global offset. Each writer stores its slices as safetensors files (`shards/…`), the
//! manifest locates every tensor, and a reader loads the ranges that it needs, no matter which writer stored them. The manifest has
//! the BLAKE3 of every object and of its parts, so that a range is verified without reading the rest. `uploads/` has the ids of
//! uploads in progress. An upload that is interrupted before its id is recorded remains until the store's own rule for incomplete
//! uploads removes it.
//!
//! Needs a tokio runtime with timers. Must not depend on: tch, tonic, the meaning of the objects.
//!
//! # Examples
//! ```
//! use bytes::Bytes;
//! use unveil_checkpoint::{Access, CheckpointHeader, Checkpoints, Object, Reader, Resume, Retention, Store};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let target = dir.path().to_str().expect("a path in UTF-8");
//! # let options: [(&str, &str); 0] = [];
//! let store = Store::open(target, options, Access::Write).await?;
//! let mut checkpoints = Checkpoints::claim(store.clone(), Retention { keep: 2, keep_best: true, keep_every: 0 }).await?;
//! let object = Object { name: "state.json".to_owned(), bytes: Bytes::from_static(b"{}"), layout: None };
//! let header = CheckpointHeader { step: 40, meta: serde_json::json!({"seed": 7}), best: true };
//! checkpoints.save(header, vec![object]).await?;
//!
//! let newest = checkpoints.resume_candidates(Resume::Auto)?.next_candidate()?.expect("step 40 is saved");
//! let reader = Reader::open(&store, &newest).await?;
//! assert_eq!((newest.step, newest.best), (40, true));
//! assert_eq!(reader.manifest().meta["seed"], 7);
//! let state = reader.read_file("state.json").await?;
//! assert_eq!(&state[..], b"{}");
//! # Ok(())
//! # }
//! ```

mod digest;
mod error;
mod export;
mod index;
mod layout;
mod load;
mod log;
mod manifest;
mod open;
mod profile;
mod read;
mod retention;
mod retrying_store;
mod save;
mod store;
mod upload;

pub use error::{Error, Result};
pub use export::export;
pub use index::CheckpointInfo;
pub use layout::{Dtype, MAX_OBJECT_BYTES, ObjectLayout, TensorSlice};
pub use load::{CheckpointDetails, ObjectCheck, Resume, ResumeCandidates, best, list, resume_candidates, show, verify};
pub use log::{EntryKind, LogEntry, RunLog};
pub use manifest::{FORMAT, Manifest, ManifestObject, ManifestTensor, SliceLocation, WriteReport};
pub use read::{ReadRequest, Reader};
pub use retention::{Pruned, Retention, prune};
pub use save::{CheckpointHeader, Checkpoints, Object, WriteTask, write};
pub use store::{Access, Store};
