//! Decoding of PNG and JPEG files.

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::{DecodeError, check_size, fail, jpeg};
use crate::rgb_image::Image;

/// Maximum memory in bytes that a decoder may use besides the pixels, e.g. for row buffers and a colour profile.
const MAX_DECODER_BYTES: u64 = 32 << 20;

/// Decodes a PNG or JPEG file.
pub(super) fn decode(bytes: &[u8]) -> Result<Image, DecodeError> {
    // Check this first: a decoder would report what is missing, not that the file is truncated.
    if is_jpeg(bytes) {
        jpeg::scan_markers(bytes)?;
    }
    let decoder = open(bytes)?;
    let (width, height) = decoder.dimensions();
    check_size(width, height)?;
    let rgb = DynamicImage::from_decoder(decoder).map_err(fail)?.into_rgb8().into_raw();
    Image::from_rgb(width, height, rgb).ok_or_else(|| fail("it has fewer pixels than its header claims"))
}

fn is_jpeg(bytes: &[u8]) -> bool {
    image::guess_format(bytes).is_ok_and(|f| f == ImageFormat::Jpeg)
}

/// Returns width and height from the header.
pub(super) fn size(bytes: &[u8]) -> Result<(u32, u32), DecodeError> {
    Ok(open(bytes)?.dimensions())
}

/// Reads the header and limits the memory used for anything but pixels.
fn open(bytes: &[u8]) -> Result<impl ImageDecoder + '_, DecodeError> {
    let format = match image::guess_format(bytes) {
        Ok(f @ (ImageFormat::Png | ImageFormat::Jpeg)) => f,
        _ if bytes.is_empty() => return Err(fail("the file is empty")),
        Ok(other) => {
            let name = other.extensions_str().first().copied().unwrap_or("unknown").to_uppercase();
            return Err(DecodeError::Decode(format!("it is a {name} file; supported are PNG, JPEG and DICOM")));
        }
        Err(_) => return Err(fail("it is neither PNG nor JPEG nor DICOM")),
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    reader.limits(limits);
    reader.into_decoder().map_err(fail)
}
