//! Images in memory: always 8-bit RGB; a grey image has three equal channels.

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};

/// Maximum width and height of a decoded image in pixels.
pub const MAX_SIDE: u32 = 16_384;
/// Maximum size of a decoded image in pixels (width times height).
pub const MAX_PIXELS: u64 = 64 << 20;
/// Why an image could not be read, decoded or stored. Every message names the image and the cause.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read or written.
    #[error("image {name}: {cause}")]
    Io {
        /// Path or name of the image.
        name: String,
        /// The I/O error.
        cause: std::io::Error,
    },
    /// The bytes are not a complete image in a supported format.
    #[error("image {name}: cannot be decoded: {cause}")]
    Decode {
        /// Path or name of the image.
        name: String,
        /// The decoder's error message.
        cause: String,
    },
    /// The image is larger than the limits.
    #[error("image {name}: {what} exceeds the limit of {limit}")]
    TooLarge {
        /// Path or name of the image.
        name: String,
        /// The quantity that is too large, with its value.
        what: String,
        /// The limit that it exceeds.
        limit: u64,
    },
    /// The stored bytes do not match the hash under which they are stored.
    #[error("image {name}: its content does not match its hash; the image store is damaged")]
    Hash {
        /// The requested hash.
        name: String,
    },
}

/// An 8-bit RGB image, row-major, with exactly `width * height * 3` bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

impl Image {
    /// Returns a black image.
    pub fn new(width: u32, height: u32) -> Self {
        Self { width, height, rgb: vec![0; width as usize * height as usize * 3] }
    }

    /// Returns an image with the given RGB bytes, or `None` unless there are exactly `width * height * 3` of them.
    pub fn from_rgb(width: u32, height: u32, rgb: Vec<u8>) -> Option<Self> {
        let bytes = (width as usize).checked_mul(height as usize)?.checked_mul(3)?;
        (rgb.len() == bytes).then_some(Self { width, height, rgb })
    }

    /// Returns the width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Returns the height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Returns the `width * height * 3` bytes, row-major.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Returns the bytes for modification.
    pub fn rgb_mut(&mut self) -> &mut [u8] {
        &mut self.rgb
    }

    /// Returns the pixel at column `x`, row `y`; panics outside the image.
    pub fn pixel(&self, x: u32, y: u32) -> [u8; 3] {
        let i = (y as usize * self.width as usize + x as usize) * 3;
        [self.rgb[i], self.rgb[i + 1], self.rgb[i + 2]]
    }

    /// Sets the pixel at column `x`, row `y`; panics outside the image.
    pub fn set_pixel(&mut self, x: u32, y: u32, rgb: [u8; 3]) {
        let i = (y as usize * self.width as usize + x as usize) * 3;
        self.rgb[i..i + 3].copy_from_slice(&rgb);
    }

    /// Encodes the image as PNG, with one channel if all pixels are grey and three otherwise. Lossless and deterministic.
    pub fn to_png(&self) -> Result<Vec<u8>, ImageError> {
        let grey = self.rgb.chunks_exact(3).all(|p| p[0] == p[1] && p[1] == p[2]);
        let plane: Vec<u8>;
        let (data, colour) = if grey {
            plane = self.rgb.iter().step_by(3).copied().collect();
            (plane.as_slice(), ExtendedColorType::L8)
        } else {
            (self.rgb.as_slice(), ExtendedColorType::Rgb8)
        };
        let mut out = Vec::with_capacity(data.len() / 2 + 128);
        PngEncoder::new_with_quality(&mut out, CompressionType::Fast, FilterType::Up)
            .write_image(data, self.width, self.height, colour)
            .map_err(|e| ImageError::Decode { name: "(in memory)".to_owned(), cause: e.to_string() })?;
        Ok(out)
    }
}
