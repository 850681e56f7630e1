//! Which image files a page may show: those below the folders that the run itself reads images from. A line of a predictions file can
//! name any path, and what a page embeds leaves the machine with it. Must not know: what the images show.

use std::path::{Path, PathBuf};

use unveil_data::store::read_file;

/// The folders that images may lie in.
#[derive(Debug, Clone, Default)]
pub struct ImageFolders {
    folders: Vec<PathBuf>,
    anywhere: bool,
}

impl ImageFolders {
    /// Those of `folders` that exist, links followed.
    pub fn new<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Self {
        let folders = folders.into_iter().filter_map(|f| f.canonicalize().ok()).collect();
        Self { folders, anywhere: false }
    }

    /// Lets images lie anywhere, as `data.outside` does for training.
    #[must_use]
    pub fn anywhere(mut self, yes: bool) -> Self {
        self.anywhere = yes;
        self
    }

    /// Also lets them lie below `folder`.
    pub(crate) fn with(&self, folder: &Path) -> Self {
        let mut all = self.clone();
        all.folders.extend(folder.canonicalize().ok());
        all
    }

    /// Reads an image file, bounded in size; none where there is none, or it lies elsewhere.
    pub(crate) fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let real = path.canonicalize().ok()?;
        if !self.anywhere && !self.folders.iter().any(|f| real.starts_with(f)) {
            tracing::warn!(path = %path.display(), "an image outside the folders of the run is not shown");
            return None;
        }
        read_file(&real).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_below_the_folders_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("run/images")).unwrap();
        std::fs::write(at("run/images/a"), "in").unwrap();
        std::fs::write(at("secret"), "out").unwrap();
        std::os::unix::fs::symlink(at("secret"), at("run/images/link")).unwrap();
        let run = at("run");
        let images = ImageFolders::new([run.as_path()]);
        assert_eq!(images.read(&at("run/images/a")).unwrap(), b"in");
        for outside in ["secret", "run/../secret", "run/images/link", "run/none"] {
            assert_eq!(images.read(&at(outside)), None, "{outside}");
        }
        assert_eq!(images.with(dir.path()).read(&at("secret")).unwrap(), b"out");
        assert_eq!(images.anywhere(true).read(&at("run/images/link")).unwrap(), b"out");
    }
}
