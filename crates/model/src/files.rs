//! Reading and writing of model files: atomic replacement, JSON, Git LFS pointers.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{ModelError, Result};

/// First bytes of a Git LFS pointer.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Replaces `path` through a temporary file in the same directory, which is synced and renamed over it.
pub(crate) fn write_atomic(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut error = None;
    let written = unveil_core::replace_file(path, unveil_core::FILE_MODE, |temporary| {
        write(temporary).map_err(|e| std::io::Error::other(error.insert(e).to_string()))
    });
    written.map_err(|e| error.unwrap_or_else(|| ModelError::io(path, e)))
}

/// Reads a JSON object.
///
/// # Errors
/// Returns [`ModelError::Io`] if the file cannot be read, [`ModelError::Corrupt`] for a Git LFS pointer, and [`ModelError::Config`] if it
/// is not a JSON object.
pub(crate) fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).map_err(|e| ModelError::io(path, e))?;
    refuse_lfs_pointer(path, text.as_bytes())?;
    serde_json::from_str(&text).map_err(|e| ModelError::config(path, format!("not a JSON object: {e}")))
}

/// Writes indented JSON, atomically.
///
/// # Errors
/// Returns [`ModelError::Io`] if the file cannot be written.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| ModelError::config(path, e.to_string()))?;
    text.push('\n');
    write_atomic(path, |tmp| std::fs::write(tmp, &text).map_err(|e| ModelError::io(tmp, e)))
}

/// Refuses the pointer that Git LFS leaves in place of a file that was not fetched.
///
/// # Errors
/// Returns [`ModelError::Corrupt`] if `bytes` are a pointer.
pub(crate) fn refuse_lfs_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    if !bytes.starts_with(LFS_POINTER) {
        return Ok(());
    }
    Err(ModelError::corrupt(path, "this is a Git LFS pointer, not the file itself: fetch the file with `git lfs pull`"))
}
