//! From encoded bytes to an 8-bit RGB image: PNG, JPEG and DICOM, the format told by the content.
//!
//! What differs between decoders is settled as Pillow's `convert("RGB")` settles it: transparency is dropped, not composed; of an
//! animated PNG the default image is taken; an EXIF orientation is not applied, so pixels and boxes are those of the file. Grey of 16
//! bits is scaled to 8. Sizes are judged from the header, before pixels are unpacked.
//!
//! Must not know: records, model families.

mod dataset;
mod dicom;
mod header;
mod j2k;
mod jpeg;
mod raster;
mod rle;
mod voi;

use crate::store::{Image, ImageError, MAX_PIXELS, MAX_SIDE};

/// Why bytes are no image, without the image's name.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fault {
    /// They cannot be decoded.
    Decode(String),
    /// The image is over a limit.
    TooLarge { what: String, limit: u64 },
}

impl Fault {
    fn named(self, name: &str) -> ImageError {
        let name = name.to_owned();
        match self {
            Self::Decode(cause) => ImageError::Decode { name, cause },
            Self::TooLarge { what, limit } => ImageError::TooLarge { name, what, limit },
        }
    }
}

fn fail<E: std::fmt::Display>(cause: E) -> Fault {
    Fault::Decode(cause.to_string())
}

/// Decodes an image; `name` appears in errors.
pub(crate) fn decode(bytes: &[u8], name: &str) -> Result<Image, ImageError> {
    let made = if header::is_dicom(bytes) { dicom::decode(bytes) } else { raster::decode(bytes) };
    made.map_err(|fault| fault.named(name))
}

/// Width and height from the header alone.
pub(crate) fn size(bytes: &[u8], name: &str) -> Result<(u32, u32), ImageError> {
    let found = if header::is_dicom(bytes) { dicom::size(bytes) } else { raster::size(bytes) };
    found.map_err(|fault| fault.named(name))
}

/// Refuses what is too large to be unpacked, or has no pixels.
fn check_size(width: u32, height: u32) -> Result<(), Fault> {
    if width == 0 || height == 0 {
        return Err(Fault::Decode(format!("it has {width} x {height} pixels")));
    }
    if let Some(side) = [width, height].into_iter().find(|s| *s > MAX_SIDE) {
        let what = format!("a side of {side} pixels ({width} x {height})");
        return Err(Fault::TooLarge { what, limit: u64::from(MAX_SIDE) });
    }
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MAX_PIXELS {
        return Err(Fault::TooLarge { what: format!("{width} x {height} = {pixels} pixels"), limit: MAX_PIXELS });
    }
    Ok(())
}
