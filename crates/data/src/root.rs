//! Where images of records may lie: below the folder of their record file, unless a person allows more. Every image of a record is
//! read through here.
//!
//! Must not know: what the images show, who asks.

use std::path::{Path, PathBuf};

use unveil_core::Record;

use crate::records::{ImageRef, folder_of, path_fault};
use crate::store::{Image, ImageError, read_file};

/// How far paths of records may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reach {
    /// Below the folder of the record file, links followed.
    #[default]
    Folder,
    /// Anywhere on this machine.
    Anywhere,
}

impl Reach {
    /// As the key `data.outside` says it.
    pub fn new(outside: bool) -> Self {
        if outside { Self::Anywhere } else { Self::Folder }
    }
}

/// The folder of a record file, and how far its records may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    folder: PathBuf,
    reach: Reach,
}

impl Root {
    /// That of a record file.
    pub fn of(file: &Path, reach: Reach) -> Self {
        Self { folder: folder_of(file).to_owned(), reach }
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the image of `record` is said to be; the path is not looked at.
    pub fn image_ref(&self, record: &Record) -> ImageRef {
        if record.image.is_empty() {
            ImageRef::None
        } else if record.image.contains("://") {
            ImageRef::Url(record.image.clone())
        } else {
            ImageRef::File(self.folder.join(&record.image))
        }
    }

    /// The file that holds the image of `record`.
    ///
    /// # Errors
    /// Its path leaves the folder, by itself or by a link on the way; there is no such file; the record has no file.
    pub fn file(&self, record: &Record) -> Result<PathBuf, ImageError> {
        let refuse = |why: &str| ImageError::Io {
            name: format!("\"{}\" of record \"{}\"", record.image, record.id),
            cause: std::io::Error::other(why.to_owned()),
        };
        if let Some(fault) = path_fault(&record.image, self.reach) {
            return Err(refuse(fault));
        }
        let path = match self.image_ref(record) {
            ImageRef::File(path) => path,
            ImageRef::Url(_) => return Err(refuse("is a URL, this place reads files only")),
            ImageRef::None => return Err(refuse("the record has no image")),
        };
        if self.reach == Reach::Anywhere {
            return Ok(path);
        }
        let name = || format!("{} of record \"{}\"", path.display(), record.id);
        let real = path.canonicalize().map_err(|cause| ImageError::Io { name: name(), cause })?;
        let root = self.folder.canonicalize().map_err(|cause| ImageError::Io { name: name(), cause })?;
        if real.starts_with(root) {
            Ok(real)
        } else {
            Err(refuse(
                "is a link that leaves the folder of the record file; put the image there, or allow it (data.outside = true)",
            ))
        }
    }

    /// Reads the encoded image of `record`.
    ///
    /// # Errors
    /// As [`Root::file`]; the error names record and path.
    pub fn read(&self, record: &Record) -> Result<Vec<u8>, ImageError> {
        read_file(&self.file(record)?).map_err(|e| match e {
            ImageError::Io { name, cause } => {
                ImageError::Io { name: format!("{name} of record \"{}\"", record.id), cause }
            }
            other => other,
        })
    }

    /// Reads and decodes the image of `record`.
    ///
    /// # Errors
    /// As [`Root::read`]; the bytes are no whole image.
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
    fn no_path_leaves_the_folder_unless_it_may() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let png = Image::new(3, 2).to_png().unwrap();
        std::fs::create_dir_all(at("set/deep")).unwrap();
        std::fs::create_dir_all(at("set-2")).unwrap();
        for place in ["set/in.png", "out.png", "set-2/near.png"] {
            std::fs::write(at(place), &png).unwrap();
        }
        symlink(at("out.png"), at("set/link.png")).unwrap();
        symlink(at("set-2"), at("set/folder")).unwrap();
        symlink("../in.png", at("set/deep/inner.png")).unwrap();
        symlink(at("set/in.png"), at("set/absolute-inner.png")).unwrap();
        let closed = Root::of(&at("set/r.jsonl"), Reach::Folder);
        let open = Root::of(&at("set/r.jsonl"), Reach::Anywhere);
        for good in ["in.png", "deep/inner.png", "absolute-inner.png"] {
            assert_eq!(closed.open(&record(good)).unwrap().width(), 3, "{good}");
        }
        let absolute = at("out.png").display().to_string();
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
        // The same through a record file, which names the line of a path that leaves by itself.
        let line = |image: &str| format!("{}\n", serde_json::to_string(&record(image)).unwrap());
        std::fs::write(at("set/r.jsonl"), line("link.png")).unwrap();
        let file = RecordFile::load(&at("set/r.jsonl")).unwrap();
        assert!(file.open_image(&file.records[0]).is_err());
        std::fs::write(at("set/r.jsonl"), line("../out.png")).unwrap();
        assert!(RecordFile::load(&at("set/r.jsonl")).unwrap_err().to_string().contains("r.jsonl:1"));
        let file = RecordFile::load_with(&at("set/r.jsonl"), Reach::Anywhere).unwrap();
        assert_eq!(file.open_image(&file.records[0]).unwrap().height(), 2);
    }

    #[test]
    fn opening_names_record_and_path() {
        let root = Root::of(Path::new("/tmp/r.jsonl"), Reach::Folder);
        let e = root.open(&record("gone.png")).unwrap_err().to_string();
        assert!(e.contains("gone.png") && e.contains("a7"), "{e}");
        let e = root.open(&record("https://user:word@host/x.png")).unwrap_err().to_string();
        assert!(e.contains("credentials"), "{e}");
        assert!(root.open(&record("https://host/x@2.png")).unwrap_err().to_string().contains("URL"));
        assert!(root.open(&record("")).unwrap_err().to_string().contains("no image"));
    }
}
