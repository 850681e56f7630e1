//! Access to the images of records: only below the folder of their record file, unless the user allows more. Every image of a record is
//! read through this module.

use std::path::{Path, PathBuf};

use unveil_core::Record;

pub use crate::image_path::PathPolicy;
use crate::image_path::{ImageRef, folder_of, path_problem};
use crate::image_store::{Image, ImageError, read_image_file};

/// The folder of a record file and the policy for its image paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRoot {
    folder: PathBuf,
    path_policy: PathPolicy,
}

impl ImageRoot {
    /// Returns the image root of the record file `file`.
    pub fn of(file: &Path, path_policy: PathPolicy) -> Self {
        Self { folder: folder_of(file).to_owned(), path_policy }
    }

    /// Returns the folder of the record file.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns where `record` says its image is; the path is not checked.
    pub fn image_ref(&self, record: &Record) -> ImageRef {
        if record.image.is_empty() {
            ImageRef::None
        } else if record.image.contains("://") {
            ImageRef::Url(record.image.clone())
        } else {
            ImageRef::File(self.folder.join(&record.image))
        }
    }

    /// Returns the path of the image file of `record`.
    ///
    /// # Errors
    /// Returns [`ImageError::Io`] if the path leaves the folder, directly or through a symbolic link, if the file does not exist, or if the
    /// record has no image file.
    pub fn file(&self, record: &Record) -> Result<PathBuf, ImageError> {
        let refuse = |why: &str| ImageError::Io {
            name: format!("\"{}\" of record \"{}\"", record.image, record.id),
            cause: std::io::Error::other(why.to_owned()),
        };
        if let Some(problem) = path_problem(&record.image, self.path_policy) {
            return Err(refuse(problem));
        }
        let path = match self.image_ref(record) {
            ImageRef::File(path) => path,
            ImageRef::Url(_) => return Err(refuse("is a URL, but only files can be read here")),
            ImageRef::None => return Err(refuse("the record has no image")),
        };
        if self.path_policy == PathPolicy::Anywhere {
            return Ok(path);
        }
        let name = || format!("{} of record \"{}\"", path.display(), record.id);
        let real = path.canonicalize().map_err(|cause| ImageError::Io { name: name(), cause })?;
        let root = self.folder.canonicalize().map_err(|cause| ImageError::Io { name: name(), cause })?;
        if real.starts_with(root) {
            Ok(real)
        } else {
            Err(refuse(
                "is a link that leaves the folder of the record file; put the image there, or allow such paths (data.outside = true)",
            ))
        }
    }

    /// Reads the encoded image of `record`.
    ///
    /// # Errors
    /// See [`ImageRoot::file`]; also returns [`ImageError::TooLarge`] for a file above the size limit. The error names record and path.
    pub fn read(&self, record: &Record) -> Result<Vec<u8>, ImageError> {
        read_image_file(&self.file(record)?).map_err(|e| match e {
            ImageError::Io { name, cause } => {
                ImageError::Io { name: format!("{name} of record \"{}\"", record.id), cause }
            }
            other => other,
        })
    }

    /// Reads and decodes the image of `record`.
    ///
    /// # Errors
    /// See [`ImageRoot::read`]; also returns [`ImageError::Decode`] if the bytes are not a complete image.
    pub fn open(&self, record: &Record) -> Result<Image, ImageError> {
        Image::decode(&self.read(record)?, &format!("{} of record \"{}\"", record.image, record.id))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::records::RecordFile;

    fn record(image: &str) -> Record {
        serde_json::from_value(serde_json::json!({"id": "a7", "image": image})).unwrap()
    }

    #[test]
    fn paths_outside_the_folder_need_permission() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let png = Image::new(3, 2).to_png().unwrap();
        std::fs::create_dir_all(path("set/deep")).unwrap();
        std::fs::create_dir_all(path("set-2")).unwrap();
        for place in ["set/in.png", "out.png", "set-2/near.png"] {
            std::fs::write(path(place), &png).unwrap();
        }
        symlink(path("out.png"), path("set/link.png")).unwrap();
        symlink(path("set-2"), path("set/folder")).unwrap();
        symlink("../in.png", path("set/deep/inner.png")).unwrap();
        symlink(path("set/in.png"), path("set/absolute-inner.png")).unwrap();
        let closed = ImageRoot::of(&path("set/r.jsonl"), PathPolicy::Folder);
        let open = ImageRoot::of(&path("set/r.jsonl"), PathPolicy::Anywhere);
        for good in ["in.png", "deep/inner.png", "absolute-inner.png"] {
            assert_eq!(closed.open(&record(good)).unwrap().width(), 3, "{good}");
        }
        let absolute = path("out.png").display().to_string();
        for (bad, why) in [
            ("../out.png", "\"..\""),
            ("deep/../../out.png", "\"..\""),
            (absolute.as_str(), "absolute"),
            ("link.png", "link"),
            ("folder/near.png", "link"),
        ] {
            let e = closed.open(&record(bad)).unwrap_err().to_string();
            assert!(e.contains(why) && e.contains("data.outside") && e.contains("a7"), "{bad}: {e}");
            assert_eq!(open.open(&record(bad)).unwrap().width(), 3, "{bad}");
        }
        // A record file names the line of a path that leaves the folder without a link.
        let line = |image: &str| format!("{}\n", serde_json::to_string(&record(image)).unwrap());
        std::fs::write(path("set/r.jsonl"), line("link.png")).unwrap();
        let file = RecordFile::load(&path("set/r.jsonl")).unwrap();
        assert!(file.open_image(&file.records[0]).is_err());
        std::fs::write(path("set/r.jsonl"), line("../out.png")).unwrap();
        assert!(RecordFile::load(&path("set/r.jsonl")).unwrap_err().to_string().contains("r.jsonl:1"));
        let file = RecordFile::load_with(&path("set/r.jsonl"), PathPolicy::Anywhere).unwrap();
        assert_eq!(file.open_image(&file.records[0]).unwrap().height(), 2);
    }

    #[test]
    fn opening_names_record_and_path() {
        let root = ImageRoot::of(Path::new("/tmp/r.jsonl"), PathPolicy::Folder);
        let e = root.open(&record("gone.png")).unwrap_err().to_string();
        assert!(e.contains("gone.png") && e.contains("a7"), "{e}");
        let e = root.open(&record("https://user:word@host/x.png")).unwrap_err().to_string();
        assert!(e.contains("credentials"), "{e}");
        assert!(root.open(&record("https://host/x@2.png")).unwrap_err().to_string().contains("URL"));
        assert!(root.open(&record("")).unwrap_err().to_string().contains("no image"));
    }
}
