//! Checkpoints and the run's log, in a directory or an object store.
//!
//! Layout under a run's prefix: `log/{seq:08}.json` (append-only, decides everything) and
//! `checkpoints/step-N/term-T/{objects…, manifest.json}`. A checkpoint exists when a log entry names its manifest; the
//! term folder keeps a learner that was paused and overtaken from touching its successor's objects.
//!
//! Needs a tokio runtime with timers. Must not know: tch, tonic, or what the objects hold.

mod error;
mod index;
mod load;
mod log;
mod save;
mod steady;
mod store;
mod tidy;

pub use error::{Error, Result};
pub use index::{CheckpointInfo, Manifest, ManifestObject};
pub use load::{Loaded, ObjectCheck, Resume, Shown, best, list, load, show, verify};
pub use log::{Entry, Kind, RunLog};
pub use save::{Checkpoints, Snapshot};
pub use store::{Access, Store};
pub use tidy::{Pruned, Retention, export, prune};
