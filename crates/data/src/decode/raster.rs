//! PNG and JPEG.

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::{Fault, check_size, fail, jpeg};
use crate::store::Image;

/// Bytes that a decoder may take beside the pixels: rows in work, a colour profile.
const MAX_BESIDE: u64 = 32 << 20;

/// Decodes either format.
pub(super) fn decode(bytes: &[u8]) -> Result<Image, Fault> {
    // First of all: a decoder names what it lacks, and not that the file was cut.
    if is_jpeg(bytes) {
        jpeg::walk(bytes)?;
    }
    let decoder = open(bytes)?;
    let (width, height) = decoder.dimensions();
    check_size(width, height)?;
    let rgb = DynamicImage::from_decoder(decoder).map_err(fail)?.into_rgb8().into_raw();
    Image::from_rgb(width, height, rgb).ok_or_else(|| fail("it does not hold as many pixels as its header says"))
}

fn is_jpeg(bytes: &[u8]) -> bool {
    image::guess_format(bytes).is_ok_and(|f| f == ImageFormat::Jpeg)
}

/// Width and height from the header.
pub(super) fn size(bytes: &[u8]) -> Result<(u32, u32), Fault> {
    Ok(open(bytes)?.dimensions())
}

/// Reads the header; what is not pixels stays within a limit of memory.
fn open(bytes: &[u8]) -> Result<impl ImageDecoder + '_, Fault> {
    let format = match image::guess_format(bytes) {
        Ok(f @ (ImageFormat::Png | ImageFormat::Jpeg)) => f,
        _ if bytes.is_empty() => return Err(fail("the file is empty")),
        Ok(other) => {
            let name = other.extensions_str().first().copied().unwrap_or("unknown").to_uppercase();
            return Err(Fault::Decode(format!("it is a {name} file; PNG, JPEG and DICOM are read")));
        }
        Err(_) => return Err(fail("it is neither PNG nor JPEG nor DICOM")),
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_BESIDE);
    reader.limits(limits);
    reader.into_decoder().map_err(fail)
}
