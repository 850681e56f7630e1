//! Which images were found whole, by path, length and times, so that a start does not decode what an earlier one did. A file that is
//! missing, cut or of another make is no error: everything is looked at again.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use unveil_core::write_atomic;

/// Changes when decoders begin to refuse more: what older ones let pass is looked at again.
const MAKE: u32 = 1;
/// Longest file that is read, in bytes.
const LONGEST: u64 = 1 << 30;

/// What a file is told by from itself changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    /// Length in bytes.
    len: u64,
    /// When its content was written, in nanoseconds since 1970.
    written: i64,
    /// When anything about it changed: a copy that keeps the time of its original is told by this.
    changed: i64,
}

impl Stamp {
    /// That of a file; none where it cannot be had.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let m = std::fs::metadata(path).ok()?;
        let nanoseconds = |s: i64, ns: i64| s.saturating_mul(1_000_000_000).saturating_add(ns);
        Some(Self {
            len: m.len(),
            written: nanoseconds(m.mtime(), m.mtime_nsec()),
            changed: nanoseconds(m.ctime(), m.ctime_nsec()),
        })
    }
}

/// Images that were found whole: stamp and size in pixels by path.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Memory {
    make: u32,
    images: BTreeMap<String, (Stamp, (u32, u32))>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { make: MAKE, images: BTreeMap::new() }
    }
}

impl Memory {
    /// Reads a memory; nothing where there is none that can be used.
    pub(super) fn read(path: &Path) -> Self {
        let read = || {
            let file = crate::files::open_regular(path).ok()?;
            let fits = file.metadata().ok()?.len() <= LONGEST;
            serde_json::from_reader(std::io::BufReader::new(file)).ok().filter(|_| fits)
        };
        read().filter(|m: &Self| m.make == MAKE).unwrap_or_default()
    }

    /// Writes it; where that fails the next start looks at everything again.
    pub(super) fn write(&self, path: &Path) {
        if let Ok(json) = serde_json::to_vec(self) {
            let _ = write_atomic(path, &json);
        }
    }

    /// Width and height of an image that has not changed since it was found whole.
    pub(super) fn size_of(&self, path: &str, stamp: &Stamp) -> Option<(u32, u32)> {
        self.images.get(path).filter(|(then, _)| then == stamp).map(|(_, size)| *size)
    }

    /// Takes in an image that is whole.
    pub(super) fn note(&mut self, path: String, stamp: Stamp, size: (u32, u32)) {
        self.images.insert(path, (stamp, size));
    }
}
