//! Cache of images that were decoded successfully, by path, length and times, so that a restart does not decode them again. A cache file
//! that is missing, truncated or of another version is not an error: all images are decoded again.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use unveil_core::write_atomic;

/// Version of the cache; raised when decoders become stricter, so that images are decoded again.
const VERSION: u32 = 1;
/// Largest cache file that is read, in bytes.
const MAX_FILE: u64 = 1 << 30;

/// Metadata by which a changed file is detected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileStamp {
    /// Length in bytes.
    len: u64,
    /// Modification time in nanoseconds since 1970.
    written: i64,
    /// Status change time in nanoseconds since 1970: it detects a replacement that keeps the modification time.
    changed: i64,
}

impl FileStamp {
    /// Reads the metadata of a file; `None` if that fails.
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

/// File stamp and size in pixels of the images that were decoded successfully, by path.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ImageCache {
    #[serde(rename = "make")]
    version: u32,
    images: BTreeMap<String, (FileStamp, (u32, u32))>,
}

impl Default for ImageCache {
    fn default() -> Self {
        Self { version: VERSION, images: BTreeMap::new() }
    }
}

impl ImageCache {
    /// Reads a cache file; empty if there is none that can be used.
    pub(super) fn load(path: &Path) -> Self {
        let parse = || {
            let file = unveil_data::files::open_regular(path).ok()?;
            let acceptable = file.metadata().ok()?.len() <= MAX_FILE;
            serde_json::from_reader(std::io::BufReader::new(file)).ok().filter(|_| acceptable)
        };
        parse().filter(|cache: &Self| cache.version == VERSION).unwrap_or_default()
    }

    /// Writes the cache file; if that fails, the next start decodes all images again.
    pub(super) fn save(&self, path: &Path) {
        if let Ok(json) = serde_json::to_vec(self) {
            let _ = write_atomic(path, &json);
        }
    }

    /// Returns width and height of an image that has not changed since it was decoded.
    pub(super) fn size_of(&self, path: &str, stamp: &FileStamp) -> Option<(u32, u32)> {
        self.images.get(path).filter(|(cached, _)| cached == stamp).map(|(_, size)| *size)
    }

    /// Adds an image that was decoded successfully.
    pub(super) fn insert(&mut self, path: String, stamp: FileStamp, size: (u32, u32)) {
        self.images.insert(path, (stamp, size));
    }
}
