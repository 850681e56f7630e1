//! Importers: other annotation formats to record files. Each says what it left out, and why.

pub mod voc;
mod xml;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::records::RecordsError;
use crate::store::ImageError;

/// What an import did.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ImportReport {
    /// Records written (one per image).
    pub records: usize,
    /// Objects found in the annotations of these images, before any filter.
    pub objects: usize,
    /// Boxes written.
    pub boxes: usize,
    /// Records by split; the empty name holds images that no list names.
    pub splits: BTreeMap<String, usize>,
    /// Objects by class as annotated, before any filter.
    pub classes: BTreeMap<String, usize>,
    /// Objects left out by rule.
    pub left_out: Vec<LeftOut>,
    /// Annotations whose stated size is not the image's (the image's is used).
    pub size_mismatch: Vec<String>,
    /// Folder into which the images were linked or copied; absent when they are used where they lie.
    pub images_copied_to: Option<PathBuf>,
}

/// One object that was not taken over.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LeftOut {
    /// Annotation file.
    pub file: String,
    /// Position of the object in the file, from 0.
    pub object: usize,
    /// Its class.
    pub label: String,
    /// The rule.
    pub reason: String,
    /// Coordinates as written.
    pub coords: [f32; 4],
}

/// Why an import stopped; nothing is written under the output's name then.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A file or folder cannot be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// An annotation cannot be understood.
    #[error("{}: {cause}", file.display())]
    Annotation {
        /// The annotation file.
        file: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// The data set as a whole does not fit the request.
    #[error("{}: {what}", src.display())]
    Source {
        /// The data set's folder.
        src: PathBuf,
        /// What is wrong and what would do.
        what: String,
    },
    /// An image is missing or corrupt.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The records cannot be written.
    #[error(transparent)]
    Records(#[from] RecordsError),
}
