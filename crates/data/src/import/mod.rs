//! Importers: other annotation formats to record files. Each says what it left out, and why.
//!
//! Owns the formats and their rules: a module per format turns a folder into items, and the modules `finish`, `place`, `split` and
//! `leaks` turn items into records in one way for all. Must not know: model families, what is done with the records.
//!
//! Rules for all formats:
//! - An image without a box says "no finding", so an image is left out when one of its objects could not be read or has no class, and
//!   when all its boxes were left out. Objects of classes that were not asked for do not count.
//! - A set without one object is an error: it would teach "no finding" for everything.
//! - Texts are UTF-8, UTF-16 with a byte order mark, or (XML) what the declaration says. `._*` and `__MACOSX` are no data.
//!
//! Rules for all formats but Pascal VOC, which is strict (what is missing or corrupt stops it, and nothing is clipped):
//! - An image that is missing or corrupt, a path that leaves the source folder or is not UTF-8: left out, reported.
//! - A box that overhangs the image is clipped to it when at least half of it lies inside, else left out. One without area, inverted or
//!   not finite is left out.
//! - Boxes are in the frame of the size that the annotation states. An image of another size but the same shape has them scaled; one of
//!   another shape has them left out.
//! - Splits are the published ones where there are any, else (or with `resplit`) eight tenths train, one val, one test by a hash of the
//!   patient, or of the image's pixels where no patient is known.

mod choices;
mod coco;
mod conversation;
mod deeplesion;
mod encoding;
mod finish;
mod format;
mod images;
mod item;
mod kidney_stone;
mod kvasir;
mod leaks;
mod llava;
mod med_grit;
mod medvh;
mod ms_swift;
mod nih;
mod omnimedvqa;
mod place;
mod pmc_vqa;
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

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use format::{Format, UnknownFormat};
pub use report::{ImportReport, Leak, LeftOut};

use crate::records::RecordsError;
use crate::store::ImageError;
use item::Found;
use source::Source;

/// What to take over, and how.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// Only this split; all images otherwise.
    pub split: Option<String>,
    /// Only this class's boxes; images without one become "no finding".
    pub class: Option<ClassFilter>,
    /// Written to every record in place of what the data set says.
    pub modality: Option<String>,
    /// Asked of every image that brings no question of its own.
    pub question: Option<String>,
    /// Splits by patient or image instead of the published ones.
    pub resplit: bool,
    /// Where images lie that are not in the source folder.
    pub images: Option<PathBuf>,
    /// Written to every record as its `suite_task`, in place of what the data set's file names say.
    pub task: Option<String>,
    /// Leaves out an image whose pixels are also in another split: the copy in test stays before val before train.
    pub drop_leaks: bool,
}

/// One class of the data set and the words that it gets.
#[derive(Debug, Clone)]
pub struct ClassFilter {
    /// Name in the annotations.
    pub class: String,
    /// Category and label in the records.
    pub category: String,
}

/// Why an import stopped; nothing is written under the output's name then.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The source folder, or that of the images, is not there.
    #[error("{} {what}", path.display())]
    NoFolder {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
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

/// Imports the folder `src` of the given format into the record file `out`.
///
/// Images under the folder of `out` are used where they lie; others are hard-linked (copied where that fails) into
/// `<stem of out>_images/` beside it, because an image path may not leave the folder of its record file.
///
/// # Errors
/// The folder is not there or not of the format, or the request does not fit it; what is wrong with single images or objects is
/// reported instead.
pub fn import(format: Format, src: &Path, out: &Path, options: &ImportOptions) -> Result<ImportReport, ImportError> {
    let mut found = Found::new(Source::new(src, options.images.as_deref())?);
    if options.images.is_some() && !format.names_images() {
        return Err(found
            .source
            .wrong(format!("images of {} lie beside their annotations: leave out --images", format.name())));
    }
    match format {
        Format::Voc => voc::read(&mut found, options)?,
        Format::Coco => coco::read(&mut found)?,
        Format::Yolo => yolo::read(&mut found)?,
        Format::Via => via::read(&mut found)?,
        Format::DeepLesion => deeplesion::read(&mut found)?,
        Format::NihChestXray => nih::read(&mut found)?,
        Format::Tbx11k => tbx11k::read(&mut found)?,
        Format::KvasirSeg => kvasir::read(&mut found)?,
        Format::KidneyStone => kidney_stone::read(&mut found)?,
        Format::MedGrit => med_grit::read(&mut found, options)?,
        Format::Slake => slake::read(&mut found)?,
        Format::VqaRad => vqa_rad::read(&mut found)?,
        Format::PmcVqa => pmc_vqa::read(&mut found)?,
        Format::OmniMedVqa => omnimedvqa::read(&mut found)?,
        Format::MedVh => medvh::read(&mut found)?,
        Format::MsSwift => ms_swift::read(&mut found)?,
        Format::Llava => llava::read(&mut found)?,
    }
    finish::finish(found, format, out, options)
}
