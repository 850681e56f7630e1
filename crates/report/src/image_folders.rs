//! Access control for images on pages: only files below the folders from which the run reads images may be shown. A line of a
//! predictions file can name any path, and an embedded file leaves the machine with the page.

use std::path::{Path, PathBuf};

use unveil_data::image_store::read_image_file;

/// Folders whose images may be shown.
#[derive(Debug, Clone, Default)]
pub struct ImageFolders {
    folders: Vec<PathBuf>,
    anywhere: bool,
}

impl ImageFolders {
    /// Allows `folders`, as far as they exist; links are followed.
    pub fn new<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Self {
        let folders = folders.into_iter().filter_map(|f| f.canonicalize().ok()).collect();
        Self { folders, anywhere: false }
    }

    /// Allows images anywhere if `yes`, as `data.outside` does for training.
    #[must_use]
    pub fn allow_anywhere(mut self, yes: bool) -> Self {
        self.anywhere = yes;
        self
    }

    /// Returns a copy that also allows images below `folder`.
    pub(crate) fn and_below(&self, folder: &Path) -> Self {
        let mut all = self.clone();
        all.folders.extend(folder.canonicalize().ok());
        all
    }

    /// Reads an image file, bounded in size; `None` if it does not exist or is not allowed.
    pub(crate) fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let real = path.canonicalize().ok()?;
        if !self.anywhere && !self.folders.iter().any(|f| real.starts_with(f)) {
            tracing::warn!(path = %path.display(), "skipped image outside the folders of the run");
            return None;
        }
        read_image_file(&real).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_outside_the_folders_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(path("run/images")).unwrap();
        std::fs::write(path("run/images/a"), "in").unwrap();
        std::fs::write(path("secret"), "out").unwrap();
        std::os::unix::fs::symlink(path("secret"), path("run/images/link")).unwrap();
        let run = path("run");
        let images = ImageFolders::new([run.as_path()]);
        assert_eq!(images.read(&path("run/images/a")).unwrap(), b"in");
        for outside in ["secret", "run/../secret", "run/images/link", "run/none"] {
            assert_eq!(images.read(&path(outside)), None, "{outside}");
        }
        assert_eq!(images.and_below(dir.path()).read(&path("secret")).unwrap(), b"out");
        assert_eq!(images.allow_anywhere(true).read(&path("run/images/link")).unwrap(), b"out");
    }
}
