//! Makes images reachable from the folder of a record file, which no image path may leave.

use std::path::{Path, PathBuf};

use crate::records;

/// The folder of a record file, and the one beside it that takes images from elsewhere.
#[derive(Debug)]
pub struct ImageFolder {
    src: PathBuf,
    also: Option<PathBuf>,
    root: PathBuf,
    copies: PathBuf,
    used: bool,
}

impl ImageFolder {
    /// For the record file `out`, whose folder is made if absent; images come from below `src`.
    ///
    /// # Errors
    /// The path, and what the system said.
    pub fn new(src: &Path, out: &Path) -> Result<Self, (PathBuf, std::io::Error)> {
        let io = |cause| (out.to_owned(), cause);
        let folder = records::folder_of(out);
        std::fs::create_dir_all(folder).map_err(io)?;
        let root = folder.canonicalize().map_err(io)?;
        let stem = out.file_stem().ok_or_else(|| io(std::io::Error::other("the path has no file name")))?;
        let copies = root.join(format!("{}_images", stem.to_string_lossy()));
        Ok(Self { src: src.to_owned(), also: None, root, copies, used: false })
    }

    /// Takes images from below this folder, too: theirs go into a folder of their own, for names repeat.
    pub fn also(&mut self, folder: &Path) {
        self.also = Some(folder.to_owned());
    }

    /// Path of an image relative to the record file. What does not lie below its folder is hard-linked, or copied where that
    /// fails, into `<stem of the record file>_images/`.
    ///
    /// # Errors
    /// The path, and what the system said.
    pub fn reach(&mut self, image: &Path) -> Result<String, (PathBuf, std::io::Error)> {
        let full = image.canonicalize().map_err(|e| (image.to_owned(), e))?;
        if let Ok(below) = full.strip_prefix(&self.root) {
            return utf8(below);
        }
        let target = self.target(image);
        let folder = target.parent().unwrap_or(&self.copies);
        std::fs::create_dir_all(folder).map_err(|e| (folder.to_owned(), e))?;
        let _ = std::fs::remove_file(&target);
        let made = std::fs::hard_link(&full, &target).or_else(|_| std::fs::copy(&full, &target).map(|_| ()));
        made.map_err(|e| (target.clone(), e))?;
        self.named(&target)
    }

    /// Writes a PNG in place of an image; its path relative to the record file.
    ///
    /// # Errors
    /// The path, and what the system said.
    pub fn write(&mut self, image: &Path, png: &[u8]) -> Result<String, (PathBuf, std::io::Error)> {
        let target = self.target(image).with_extension("png");
        unveil_core::write_atomic(&target, png).map_err(|e| (target.clone(), e))?;
        self.named(&target)
    }

    /// The folder of copies, where there are any.
    pub fn copies(self) -> Option<PathBuf> {
        self.used.then_some(self.copies)
    }

    /// Where the copy of an image goes: as deep as it lies in the source folder, for names repeat between folders.
    fn target(&self, path: &Path) -> PathBuf {
        if let Ok(below) = path.strip_prefix(&self.src) {
            return self.copies.join(below);
        }
        if let Some(Ok(below)) = self.also.as_ref().map(|folder| path.strip_prefix(folder)) {
            return self.copies.join(ALSO).join(below);
        }
        self.copies.join(path.file_name().map_or(path, Path::new))
    }

    fn named(&mut self, target: &Path) -> Result<String, (PathBuf, std::io::Error)> {
        self.used = true;
        utf8(target.strip_prefix(&self.root).unwrap_or(target))
    }
}

/// Folder of the copies of images that do not lie in the source folder.
const ALSO: &str = "other_images";

/// A path as a record holds it, which is text.
fn utf8(path: &Path) -> Result<String, (PathBuf, std::io::Error)> {
    let odd = || std::io::Error::new(std::io::ErrorKind::InvalidData, "the path is not UTF-8: rename the file");
    path.to_str().map(str::to_owned).ok_or_else(|| (path.to_owned(), odd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_repeat_between_folders_stay_apart() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["src/a/x.png", "src/b/x.png", "out/x.png"] {
            std::fs::create_dir_all(at(name).parent().unwrap()).unwrap();
            std::fs::write(at(name), name).unwrap();
        }
        let mut folder = ImageFolder::new(&at("src"), &at("out/r.jsonl")).unwrap();
        assert_eq!(folder.reach(&at("out/x.png")).unwrap(), "x.png");
        assert_eq!(folder.reach(&at("src/a/x.png")).unwrap(), "r_images/a/x.png");
        assert_eq!(folder.reach(&at("src/b/x.png")).unwrap(), "r_images/b/x.png");
        assert_eq!(folder.write(&at("src/b/y.dcm"), b"png").unwrap(), "r_images/b/y.png");
        assert_eq!(std::fs::read_to_string(at("out/r_images/a/x.png")).unwrap(), "src/a/x.png");
        std::fs::create_dir_all(at("far/a")).unwrap();
        std::fs::write(at("far/a/x.png"), "far").unwrap();
        folder.also(&at("far"));
        assert_eq!(folder.reach(&at("far/a/x.png")).unwrap(), "r_images/other_images/a/x.png");
        assert!(folder.reach(&at("src/gone.png")).unwrap_err().0.ends_with("gone.png"));
        assert!(folder.copies().unwrap().ends_with("r_images"));
    }
}
