//! Opening files without waiting for what is no file.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a file for reading; a FIFO, a device or a folder is refused at once instead of being waited for.
pub fn open_regular(path: &Path) -> std::io::Result<File> {
    // Without O_NONBLOCK the opening of a FIFO waits for who writes to it; for regular files it says nothing.
    let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() { Ok(file) } else { Err(not_a_file(kind.is_dir())) }
}

fn not_a_file(folder: bool) -> std::io::Error {
    match folder {
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
    fn what_is_no_file_is_refused_without_waiting() {
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
