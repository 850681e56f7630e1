//! Importers: they convert other annotation formats to record files and report what they left out, and why.
//!
//! A module per format parses a folder into draft records; `record_builder`, `box_placement`, `split` and `leaks` turn drafts into records
//! in the same way for all formats.
//!
//! Rules for all formats:
//! - A record without a box means "no finding", so an image is left out if one of its objects could not be read or has no class, or if
//!   all its boxes were left out. Objects of classes that were not asked for do not count.
//! - A data set without any object is an error: it would teach "no finding" for everything.
//! - Text files are UTF-8, UTF-16 with a byte order mark, or (XML) in the declared encoding. `._*` and `__MACOSX` are ignored.
//!
//! Rules for all formats except Pascal VOC, which is strict (a missing or corrupt file is an error, and nothing is clipped):
//! - An image that is missing or corrupt, or whose path leaves the source folder or is not UTF-8, is left out and reported.
//! - A box that overhangs the image is clipped to it if at least half of it is inside, else left out. A box that is inverted, not finite
//!   or without area is left out.
//! - Boxes refer to the image size that the annotation states. If the image has another size but the same shape, they are scaled; if it
//!   has another shape, they are left out.
//! - Splits are the published ones if there are any, else (or with `resplit`) 80 % train, 10 % val and 10 % test by a hash of the
//!   patient, or of the image's pixels if no patient is known.

mod box_placement;
mod choices;
mod coco;
mod conversation;
mod deeplesion;
mod draft;
mod encoding;
mod format;
mod images;
mod kidney_stone;
mod kvasir;
mod leaks;
mod llava;
mod med_grit;
mod medvh;
mod ms_swift;
mod nih;
mod omnimedvqa;
mod pmc_vqa;
mod record_builder;
mod report;
mod slake;
mod source;
mod split;
mod tbx11k;
mod via;
mod voc;
mod vqa_rad;
mod xml;
mod yaml;
mod yolo;

use std::path::{Path, PathBuf};

use unveil_data::image_store::ImageError;
use unveil_data::records::RecordsError;

pub use format::{Format, UnknownFormat};
pub use report::{ImportReport, Leak, LeftOut};

use draft::ParsedDataset;
use source::SourceFolder;

/// Options of an import.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// Split to import; `None`: all.
    pub split: Option<String>,
    /// Class whose boxes are imported; images without one become "no finding". `None`: all classes.
    pub class: Option<ClassFilter>,
    /// Modality of every record, instead of the one in the data set.
    pub modality: Option<String>,
    /// Question for every image that has none.
    pub question: Option<String>,
    /// Assigns splits by patient or image instead of using the published ones.
    pub resplit: bool,
    /// Folder of images that are not in the source folder.
    pub images: Option<PathBuf>,
    /// `suite_task` of every record, instead of the one in the data set's file names.
    pub task: Option<String>,
    /// Leaves out an image whose pixels are also in another split: the copy in test is kept, else in val, else in train.
    pub drop_leaks: bool,
}

/// A class of the data set, and what it is called in the records.
#[derive(Debug, Clone)]
pub struct ClassFilter {
    /// Name in the annotations.
    pub class: String,
    /// Category and label in the records.
    pub category: String,
}

/// Error of an import; the record file is not written then.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The source folder or the folder of images does not exist or is not a folder.
    #[error("{} {what}", path.display())]
    NoFolder {
        /// The folder.
        path: PathBuf,
        /// Description of the problem.
        what: &'static str,
    },
    /// A file or folder cannot be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Error of the operating system.
        cause: std::io::Error,
    },
    /// An annotation file cannot be parsed.
    #[error("{}: {cause}", file.display())]
    Annotation {
        /// The annotation file.
        file: PathBuf,
        /// Description of the problem.
        cause: String,
    },
    /// The data set as a whole does not fit the request.
    #[error("{}: {what}", src.display())]
    Source {
        /// The data set's folder.
        src: PathBuf,
        /// Description of the problem, and what to do.
        what: String,
    },
    /// An image is missing or corrupt.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The records cannot be written.
    #[error(transparent)]
    Records(#[from] RecordsError),
}

/// Imports the folder `src` of the given format into the record file `out`.
///
/// Images under the folder of `out` are used in place; others are hard-linked (copied if that fails) into `<stem of out>_images/` next to
/// it, because an image path may not leave the folder of its record file.
///
/// # Errors
/// Returns an error if the folder does not exist, does not have this format, or does not fit the options. Problems with single images or
/// objects are in the report instead.
pub fn import(format: Format, src: &Path, out: &Path, options: &ImportOptions) -> Result<ImportReport, ImportError> {
    let mut dataset = ParsedDataset::new(SourceFolder::new(src, options.images.as_deref())?);
    if options.images.is_some() && !format.names_images() {
        return Err(dataset
            .source
            .dataset_error(format!("images of {} are next to their annotations: leave out --images", format.name())));
    }
    match format {
        Format::Voc => voc::read(&mut dataset, options)?,
        Format::Coco => coco::read(&mut dataset)?,
        Format::Yolo => yolo::read(&mut dataset)?,
        Format::Via => via::read(&mut dataset)?,
        Format::DeepLesion => deeplesion::read(&mut dataset)?,
        Format::NihChestXray => nih::read(&mut dataset)?,
        Format::Tbx11k => tbx11k::read(&mut dataset)?,
        Format::KvasirSeg => kvasir::read(&mut dataset)?,
        Format::KidneyStone => kidney_stone::read(&mut dataset)?,
        Format::MedGrit => med_grit::read(&mut dataset, options)?,
        Format::Slake => slake::read(&mut dataset)?,
        Format::VqaRad => vqa_rad::read(&mut dataset)?,
        Format::PmcVqa => pmc_vqa::read(&mut dataset)?,
        Format::OmniMedVqa => omnimedvqa::read(&mut dataset)?,
        Format::MedVh => medvh::read(&mut dataset)?,
        Format::MsSwift => ms_swift::read(&mut dataset)?,
        Format::Llava => llava::read(&mut dataset)?,
    }
    record_builder::build_records(dataset, format, out, options)
}
