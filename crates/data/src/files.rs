//! Opening regular files without blocking on anything else.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file for reading; a FIFO, a device or a folder is refused immediately instead of blocking.
pub fn open_regular(path: &Path) -> std::io::Result<File> {
    // Without O_NONBLOCK, opening a FIFO blocks until it has a writer; the flag has no effect on regular files.
    let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() { Ok(file) } else { Err(not_a_regular_file(kind.is_dir())) }
}

fn not_a_regular_file(is_folder: bool) -> std::io::Error {
    match is_folder {
        true => std::io::Error::new(std::io::ErrorKind::IsADirectory, "it is a folder, not a file"),
        false => {
            std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is a FIFO, a socket or a device, not a file")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_files_are_refused_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let link = dir.path().join("link.png");
        std::os::unix::fs::symlink(&fifo, &link).unwrap();
        for (path, needle) in [(&fifo, "FIFO"), (&link, "FIFO"), (&dir.path().to_owned(), "folder")] {
            let e = open_regular(path).unwrap_err().to_string();
            assert!(e.contains(needle), "{e}");
        }
        assert!(open_regular(Path::new("/dev/null")).unwrap_err().to_string().contains("device"));
        std::fs::write(dir.path().join("a"), "x").unwrap();
        assert_eq!(std::io::read_to_string(open_regular(&dir.path().join("a")).unwrap()).unwrap(), "x");
    }
}
