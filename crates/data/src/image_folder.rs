//! Makes images accessible below the folder of a record file, which image paths must not leave.

use std::path::{Path, PathBuf};

use crate::records;

/// The folder of a record file, with a subfolder for links to images from elsewhere.
#[derive(Debug)]
pub struct ImageFolder {
    source: PathBuf,
    extra_source: Option<PathBuf>,
    root: PathBuf,
    copies: PathBuf,
    has_copies: bool,
}

impl ImageFolder {
    /// Prepares the folder of the record file `out`, creating it if absent, for images from below `source`.
    ///
    /// # Errors
    /// Returns the path concerned and the I/O error if the folder cannot be created or resolved.
    pub fn new(source: &Path, out: &Path) -> Result<Self, (PathBuf, std::io::Error)> {
        let io = |cause| (out.to_owned(), cause);
        let folder = records::folder_of(out);
        std::fs::create_dir_all(folder).map_err(io)?;
        let root = folder.canonicalize().map_err(io)?;
        let stem = out.file_stem().ok_or_else(|| io(std::io::Error::other("the path has no file name")))?;
        let copies = root.join(format!("{}_images", stem.to_string_lossy()));
        Ok(Self { source: source.to_owned(), extra_source: None, root, copies, has_copies: false })
    }

    /// Sets a second source folder. Its images get a separate subfolder, because file names may repeat.
    pub fn add_source(&mut self, folder: &Path) {
        self.extra_source = Some(folder.to_owned());
    }

    /// Makes an image accessible and returns its path relative to the record file. An image outside the folder is hard-linked, or copied
    /// if that fails, into `<stem of the record file>_images/`.
    ///
    /// # Errors
    /// Returns the path concerned and the I/O error if the image cannot be found, linked or copied, or if its path is not UTF-8.
    pub fn link(&mut self, image: &Path) -> Result<String, (PathBuf, std::io::Error)> {
        let full = image.canonicalize().map_err(|e| (image.to_owned(), e))?;
        if let Ok(below) = full.strip_prefix(&self.root) {
            return utf8(below);
        }
        let target = self.target(image);
        let folder = target.parent().unwrap_or(&self.copies);
        std::fs::create_dir_all(folder).map_err(|e| (folder.to_owned(), e))?;
        let _ = std::fs::remove_file(&target);
        let linked = std::fs::hard_link(&full, &target).or_else(|_| std::fs::copy(&full, &target).map(|_| ()));
        linked.map_err(|e| (target.clone(), e))?;
        self.relative(&target)
    }

    /// Writes a PNG in place of an image and returns its path relative to the record file.
    ///
    /// # Errors
    /// Returns the path concerned and the I/O error if the file cannot be written, or if its path is not UTF-8.
    pub fn write(&mut self, image: &Path, png: &[u8]) -> Result<String, (PathBuf, std::io::Error)> {
        let target = self.target(image).with_extension("png");
        unveil_core::write_atomic(&target, png).map_err(|e| (target.clone(), e))?;
        self.relative(&target)
    }

    /// Returns the folder of linked and copied images, or `None` if nothing was put there.
    pub fn copies(self) -> Option<PathBuf> {
        self.has_copies.then_some(self.copies)
    }

    /// Returns where the copy of an image goes: at the same depth as in the source folder, because names repeat between folders.
    fn target(&self, path: &Path) -> PathBuf {
        if let Ok(below) = path.strip_prefix(&self.source) {
            return self.copies.join(below);
        }
        if let Some(Ok(below)) = self.extra_source.as_ref().map(|folder| path.strip_prefix(folder)) {
            return self.copies.join(EXTRA_SOURCE_FOLDER).join(below);
        }
        self.copies.join(path.file_name().map_or(path, Path::new))
    }

    fn relative(&mut self, target: &Path) -> Result<String, (PathBuf, std::io::Error)> {
        self.has_copies = true;
        utf8(target.strip_prefix(&self.root).unwrap_or(target))
    }
}

/// Subfolder for copies of images from the second source folder.
const EXTRA_SOURCE_FOLDER: &str = "other_images";

/// Converts a path to the text that a record stores.
fn utf8(path: &Path) -> Result<String, (PathBuf, std::io::Error)> {
    let not_utf8 = || std::io::Error::new(std::io::ErrorKind::InvalidData, "the path is not UTF-8: rename the file");
    path.to_str().map(str::to_owned).ok_or_else(|| (path.to_owned(), not_utf8()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_repeat_between_folders_stay_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["src/a/x.png", "src/b/x.png", "out/x.png"] {
            std::fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            std::fs::write(path(name), name).unwrap();
        }
        let mut folder = ImageFolder::new(&path("src"), &path("out/r.jsonl")).unwrap();
        assert_eq!(folder.link(&path("out/x.png")).unwrap(), "x.png");
        assert_eq!(folder.link(&path("src/a/x.png")).unwrap(), "r_images/a/x.png");
        assert_eq!(folder.link(&path("src/b/x.png")).unwrap(), "r_images/b/x.png");
        assert_eq!(folder.write(&path("src/b/y.dcm"), b"png").unwrap(), "r_images/b/y.png");
        assert_eq!(std::fs::read_to_string(path("out/r_images/a/x.png")).unwrap(), "src/a/x.png");
        std::fs::create_dir_all(path("far/a")).unwrap();
        std::fs::write(path("far/a/x.png"), "far").unwrap();
        folder.add_source(&path("far"));
        assert_eq!(folder.link(&path("far/a/x.png")).unwrap(), "r_images/other_images/a/x.png");
        assert!(folder.link(&path("src/gone.png")).unwrap_err().0.ends_with("gone.png"));
        assert!(folder.copies().unwrap().ends_with("r_images"));
    }
}
