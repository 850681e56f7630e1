//! Paths of images as records write them, and which of them are allowed.

use std::path::{Component, Path, PathBuf};

/// Which image paths the records of a file may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PathPolicy {
    /// Only paths below the folder of the record file, after symbolic links are resolved.
    #[default]
    Folder,
    /// Any path on this machine.
    Anywhere,
}

impl PathPolicy {
    /// Returns the policy for the configuration key `data.outside`.
    pub fn new(outside: bool) -> Self {
        if outside { Self::Anywhere } else { Self::Folder }
    }
}

/// Location of a record's image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageRef {
    /// A file path, already joined with the folder of the record file.
    File(PathBuf),
    /// An object URL, for callers with access to an object store.
    Url(String),
    /// The record has no image, only a size.
    None,
}

/// Returns the folder that contains a record file.
pub fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Returns what is wrong with the image path of a record as written, or `None` if it is allowed. URLs and empty paths are allowed;
/// symbolic links are checked when the image is read.
pub fn path_problem(image: &str, path_policy: PathPolicy) -> Option<&'static str> {
    if let Some((_, rest)) = image.split_once("://") {
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        host.contains('@').then_some("is a URL with credentials before the host; take them out")
    } else if image.contains('\0') {
        Some("contains a NUL character")
    } else if path_policy == PathPolicy::Anywhere {
        None
    } else if Path::new(image).components().any(|c| matches!(c, Component::RootDir | Component::Prefix(_))) {
        Some("is an absolute path; write it relative to the record file, or allow such paths (data.outside = true)")
    } else if Path::new(image).components().any(|c| c == Component::ParentDir) {
        Some(
            "leaves the folder of the record file with \"..\"; put the images next to it or below it, or allow such paths (data.outside = true)",
        )
    } else {
        None
    }
}
