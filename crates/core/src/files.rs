//! Atomic file writes.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Mode of new files, less the umask.
pub const FILE_MODE: u32 = 0o666;

/// Replaces `path` by a file with the content `bytes` and creates missing directories. A reader finds either the old file or the new one,
/// also after a crash or on a full disk.
///
/// # Errors
/// Returns the error of the file system; `path` is then unchanged.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_file(path, FILE_MODE, |temporary| File::options().write(true).open(temporary)?.write_all(bytes))
}

/// Replaces `path` atomically by the file that `write` fills. `write` is given the path of an empty temporary file in the same directory,
/// with `mode` less the umask.
///
/// # Errors
/// Returns the error of `write` or of the file system; `path` is then unchanged.
pub fn replace_file(path: &Path, mode: u32, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let name = path.file_name().ok_or_else(|| io::Error::other("the path has no file name"))?;
    let prefix = format!(".{}.", name.to_string_lossy());
    let permissions = Permissions::from_mode(mode);
    let mut builder = tempfile::Builder::new();
    let temporary =
        builder.prefix(&prefix).suffix(".tmp").permissions(permissions).tempfile_in(folder)?.into_temp_path();
    write(&temporary)?;
    File::open(&temporary)?.sync_all()?;
    temporary.persist(path).map_err(|e| e.error)?;
    // The new name is durable only once the directory is synced.
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_writes_keep_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/folder/a.json");
        write_atomic(&path, b"old").unwrap();
        let torn = replace_file(&path, FILE_MODE, |temporary| {
            std::fs::write(temporary, "ne")?;
            assert_eq!(std::fs::read(&path)?, b"old");
            Err(io::Error::from_raw_os_error(28))
        });
        assert_eq!(torn.unwrap_err().raw_os_error(), Some(28));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        write_atomic(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        let names: Vec<_> =
            std::fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["a.json"], "no temporary file is left");
        assert!(write_atomic(Path::new("/"), b"").is_err());
    }

    #[test]
    fn new_files_get_the_requested_mode() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        let closed = dir.path().join("closed");
        write_atomic(&open, b"").unwrap();
        replace_file(&closed, 0o600, |_| Ok(())).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&open) & 0o600, 0o600);
        let plain = dir.path().join("plain");
        std::fs::write(&plain, "").unwrap();
        assert_eq!((mode(&open), mode(&closed)), (mode(&plain), 0o600));
    }
}
