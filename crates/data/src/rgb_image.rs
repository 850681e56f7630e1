//! Images in memory: always 8-bit RGB; a grey image has three equal channels.

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage, imageops};

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
pub struct Image(RgbImage);

impl Image {
    /// Returns a black image.
    pub fn new(width: u32, height: u32) -> Self {
        Self(RgbImage::new(width, height))
    }

    /// Returns an image with the given RGB bytes, or `None` unless there are exactly `width * height * 3` of them.
    pub fn from_rgb(width: u32, height: u32, rgb: Vec<u8>) -> Option<Self> {
        let bytes = (width as usize).checked_mul(height as usize)?.checked_mul(3)?;
        if rgb.len() == bytes { RgbImage::from_raw(width, height, rgb).map(Self) } else { None }
    }

    /// Returns the width in pixels.
    pub fn width(&self) -> u32 {
        self.0.width()
    }

    /// Returns the height in pixels.
    pub fn height(&self) -> u32 {
        self.0.height()
    }

    /// Returns the `width * height * 3` bytes, row-major.
    pub fn rgb(&self) -> &[u8] {
        self.0.as_raw()
    }

    /// Returns the bytes for modification.
    pub fn rgb_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// Returns the pixel at column `x`, row `y`; panics outside the image.
    pub fn pixel(&self, x: u32, y: u32) -> [u8; 3] {
        self.0.get_pixel(x, y).0
    }

    /// Sets the pixel at column `x`, row `y`; panics outside the image.
    pub fn set_pixel(&mut self, x: u32, y: u32, rgb: [u8; 3]) {
        self.0.put_pixel(x, y, Rgb(rgb));
    }

    /// Returns the part of the rectangle `[x, y, width, height]` that is inside the image.
    pub fn crop(&self, [x, y, width, height]: [u32; 4]) -> Self {
        Self(imageops::crop_imm(&self.0, x, y, width, height).to_image())
    }

    /// Mirrors the image left to right.
    pub fn flip_h(&mut self) {
        imageops::flip_horizontal_in_place(&mut self.0);
    }

    /// Mirrors the image top to bottom.
    pub fn flip_v(&mut self) {
        imageops::flip_vertical_in_place(&mut self.0);
    }

    /// Rotates the image clockwise by 90 degrees, which swaps width and height.
    pub fn rotate_clockwise(&mut self) {
        self.0 = imageops::rotate90(&self.0);
    }

    /// Encodes the image as PNG, with one channel if all pixels are grey and three otherwise. Lossless and deterministic.
    pub fn to_png(&self) -> Result<Vec<u8>, ImageError> {
        let grey = self.rgb().chunks_exact(3).all(|p| p[0] == p[1] && p[1] == p[2]);
        let plane: Vec<u8>;
        let (data, colour) = if grey {
            plane = self.rgb().iter().step_by(3).copied().collect();
            (plane.as_slice(), ExtendedColorType::L8)
        } else {
            (self.rgb(), ExtendedColorType::Rgb8)
        };
        let mut out = Vec::with_capacity(data.len() / 2 + 128);
        PngEncoder::new_with_quality(&mut out, CompressionType::Fast, FilterType::Up)
            .write_image(data, self.width(), self.height(), colour)
            .map_err(|e| ImageError::Decode { name: "(in memory)".to_owned(), cause: e.to_string() })?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns an image whose pixels are numbered row by row.
    fn numbered(width: u32, height: u32) -> Image {
        Image::from_rgb(width, height, (0..width * height).flat_map(|i| [i as u8; 3]).collect()).unwrap()
    }

    fn numbers(image: &Image) -> (u32, u32, Vec<u8>) {
        (image.width(), image.height(), image.rgb().iter().step_by(3).copied().collect())
    }

    #[test]
    fn crops_flips_and_rotation_by_hand() {
        let image = numbered(3, 2);
        assert_eq!(numbers(&image.crop([1, 0, 2, 2])), (2, 2, vec![1, 2, 4, 5]));
        assert_eq!(numbers(&image.crop([2, 1, 9, 9])), (1, 1, vec![5]), "beyond the edge");
        let changed = |change: fn(&mut Image)| {
            let mut image = image.clone();
            change(&mut image);
            numbers(&image)
        };
        assert_eq!(changed(Image::flip_h), (3, 2, vec![2, 1, 0, 5, 4, 3]));
        assert_eq!(changed(Image::flip_v), (3, 2, vec![3, 4, 5, 0, 1, 2]));
        assert_eq!(changed(Image::rotate_clockwise), (2, 3, vec![3, 0, 4, 1, 5, 2]));
    }
}
