//! Checkpoints and the run's log, in a directory or an object store.
//!
//! Layout under a run's prefix: `log/{seq:08}.json` (append-only, decides everything) and
//! `checkpoints/step-N/term-T/{objects…, manifest.json}`. A checkpoint exists when a log entry names its manifest; the
//! term folder keeps a learner that was paused and overtaken from touching its successor's objects.
//!
//! Tensors are keyed by kind, parameter name and global offset: each of several writers writes what it has as safetensors files
//! (`shards/…`), the manifest says which tensor lies where, and a reader takes the ranges that it needs, whoever wrote them. Every
//! object has its BLAKE3 in the manifest, and those of its parts, so that a range is checked without the rest. `uploads/` holds the
//! ids of uploads in progress. An upload that begins and is cut off before its id is written stays until the store's own rule for
//! unfinished uploads ends it.
//!
//! Needs a tokio runtime with timers. Must not know: tch, tonic, or what the objects hold.

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
mod save;
mod steady;
mod store;
mod tidy;
mod upload;

pub use error::{Error, Result};
pub use export::export;
pub use index::CheckpointInfo;
pub use layout::{Dtype, Layout, OBJECT, Piece};
pub use load::{Choice, ObjectCheck, Resume, Shown, best, choice, list, show, verify};
pub use log::{Entry, Kind, RunLog};
pub use manifest::{FORMAT, Manifest, ManifestObject, ManifestTensor, Report, TensorPiece};
pub use read::{Reader, Want};
pub use save::{Checkpoints, Object, Snapshot, Task, write};
pub use store::{Access, Store};
pub use tidy::{Pruned, Retention, prune};
