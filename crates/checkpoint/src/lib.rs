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
