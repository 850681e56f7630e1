//! Decoding of PNG, JPEG and DICOM to 8-bit RGB images; the format is detected from the content.
//!
//! Where decoders differ, this module follows Pillow's `convert("RGB")`: transparency is dropped, not composed; the default image of an
//! animated PNG is used; EXIF orientation is not applied, so that pixels and boxes match the file. 16-bit grey is scaled to 8 bits. Size
//! limits are checked on the header, before pixels are decoded.

mod dataset;
mod dicom;
mod header;
mod inflate;
mod j2k;
mod jpeg;
mod raster;
mod rle;
mod samples;
mod voi;

use std::io::Read;
use std::panic::{UnwindSafe, catch_unwind};
use std::path::Path;

use crate::files::open_regular;
use crate::image_store::read_image_file;
use crate::rgb_image::{Image, ImageError, MAX_PIXELS, MAX_SIDE};

/// Bytes at the start of a file that usually include the header with the image size.
const HEADER_BYTES: usize = 64 << 10;

/// Decoding error without the image's name.
#[derive(Debug, Clone, PartialEq, Eq)]
enum DecodeError {
    /// The bytes cannot be decoded.
    Decode(String),
    /// The image exceeds a limit.
    TooLarge { what: String, limit: u64 },
}

impl DecodeError {
    fn with_name(self, name: &str) -> ImageError {
        let name = name.to_owned();
        match self {
            Self::Decode(cause) => ImageError::Decode { name, cause },
            Self::TooLarge { what, limit } => ImageError::TooLarge { name, what, limit },
        }
    }
}

fn fail<E: std::fmt::Display>(cause: E) -> DecodeError {
    DecodeError::Decode(cause.to_string())
}

impl Image {
    /// Decodes PNG, JPEG or DICOM bytes; the format is detected from the content. `name` appears in errors.
    pub fn decode(bytes: &[u8], name: &str) -> Result<Self, ImageError> {
        decode(bytes, name)
    }

    /// Reads and decodes a file.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        Self::decode(&read_image_file(path)?, &path.display().to_string())
    }
}

/// Returns width and height of a PNG, JPEG or DICOM file from its header, without decoding the pixels.
pub fn image_size(path: &Path) -> Result<(u32, u32), ImageError> {
    size(&read_image_file(path)?, &path.display().to_string())
}

/// Returns width and height of an image file; usually only its beginning is read.
pub fn header_size(path: &Path) -> Result<(u32, u32), ImageError> {
    let name = path.display().to_string();
    let mut head = Vec::with_capacity(HEADER_BYTES);
    let file = open_regular(path).map_err(|cause| ImageError::Io { name: name.clone(), cause })?;
    let read = file.take(HEADER_BYTES as u64).read_to_end(&mut head);
    read.map_err(|cause| ImageError::Io { name: name.clone(), cause })?;
    match size(&head, &name) {
        Ok(size) => Ok(size),
        Err(_) if head.len() == HEADER_BYTES => image_size(path),
        Err(e) => Err(e),
    }
}

/// Decodes an image; `name` appears in errors.
fn decode(bytes: &[u8], name: &str) -> Result<Image, ImageError> {
    guarded(name, || if header::is_dicom(bytes) { dicom::decode(bytes) } else { raster::decode(bytes) })
}

/// Returns width and height from the header.
fn size(bytes: &[u8], name: &str) -> Result<(u32, u32), ImageError> {
    guarded(name, || if header::is_dicom(bytes) { dicom::size(bytes) } else { raster::size(bytes) })
}

/// Runs a decoder and names the image in its error. A panic becomes an error here, and nowhere else, because libraries index into damaged
/// files without checks, and one file must not end a run.
fn guarded<T>(name: &str, decoder: impl FnOnce() -> Result<T, DecodeError> + UnwindSafe) -> Result<T, ImageError> {
    catch_unwind(decoder)
        .unwrap_or_else(|_| Err(fail("it is damaged in a way that made its decoder panic")))
        .map_err(|e| e.with_name(name))
}

/// Checks that an image has pixels and is not too large to be decoded.
fn check_size(width: u32, height: u32) -> Result<(), DecodeError> {
    if width == 0 || height == 0 {
        return Err(DecodeError::Decode(format!("it has {width} x {height} pixels")));
    }
    if let Some(side) = [width, height].into_iter().find(|s| *s > MAX_SIDE) {
        let what = format!("a side of {side} pixels ({width} x {height})");
        return Err(DecodeError::TooLarge { what, limit: u64::from(MAX_SIDE) });
    }
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MAX_PIXELS {
        return Err(DecodeError::TooLarge { what: format!("{width} x {height} = {pixels} pixels"), limit: MAX_PIXELS });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_of_a_decoder_is_an_error_that_names_the_image() {
        let bytes = [1u8, 2];
        let outside = std::hint::black_box(2);
        let error = guarded("scan-7.dcm", || Ok(bytes[outside])).unwrap_err().to_string();
        assert!(error.contains("scan-7.dcm") && error.contains("decoder panic"), "{error}");
        assert_eq!(guarded("scan-7.dcm", || Ok(bytes[outside - 1])).unwrap(), 2);
    }

    #[test]
    fn image_sizes_need_only_the_file_header() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("big.png");
        let mut noise = Image::new(400, 300);
        noise.rgb_mut().iter_mut().enumerate().for_each(|(i, v)| *v = (i * 7919 % 251) as u8);
        let png = noise.to_png().unwrap();
        assert!(png.len() > HEADER_BYTES);
        // Only the header is complete, so nothing beyond it was read.
        std::fs::write(&path, &png[..HEADER_BYTES + 1]).unwrap();
        assert_eq!(header_size(&path).unwrap(), (400, 300));
    }
}
