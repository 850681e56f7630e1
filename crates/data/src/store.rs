//! Images: decoding with limits, PNG for the wire, content hashes, and a content-addressed store on disk.
//!
//! Must not know: records, model families, tch, tonic. An [`Image`] is always 8-bit RGB; what was grey stays grey in all channels.

use std::io::Read;
use std::path::{Path, PathBuf};

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};

use crate::decode;

/// Largest width or height that is decoded, in pixels.
pub const MAX_SIDE: u32 = 16_384;
/// Largest image that is decoded, in pixels (width times height).
pub const MAX_PIXELS: u64 = 64 << 20;
/// Largest encoded file that is read, in bytes.
pub const MAX_FILE: u64 = unveil_core::limits::IMAGE;

/// Why an image could not be had. Every message names the image and the cause.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read or written.
    #[error("image {name}: {cause}")]
    Io {
        /// Path or name of the image.
        name: String,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The bytes are not a whole image of a format that is read.
    #[error("image {name}: cannot be decoded: {cause}")]
    Decode {
        /// Path or name of the image.
        name: String,
        /// What the decoder said.
        cause: String,
    },
    /// The image is larger than the limits.
    #[error("image {name}: {what} is over the limit of {limit}")]
    TooLarge {
        /// Path or name of the image.
        name: String,
        /// What is too large, with its value.
        what: String,
        /// The limit.
        limit: u64,
    },
    /// The stored bytes do not have the hash under which they are stored.
    #[error("image {name}: its content does not match its hash, the store is damaged")]
    Hash {
        /// The hash asked for.
        name: String,
    },
}

/// An 8-bit RGB image, row-major, three bytes a pixel. It always holds as many bytes as its size asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

impl Image {
    /// A black image.
    pub fn new(width: u32, height: u32) -> Self {
        Self { width, height, rgb: vec![0; width as usize * height as usize * 3] }
    }

    /// An image of these bytes; none where they are not `width * height * 3`.
    pub fn from_rgb(width: u32, height: u32, rgb: Vec<u8>) -> Option<Self> {
        let bytes = (width as usize).checked_mul(height as usize)?.checked_mul(3)?;
        (rgb.len() == bytes).then_some(Self { width, height, rgb })
    }

    /// Width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// `width * height * 3` bytes.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// The same bytes, to be changed.
    pub fn rgb_mut(&mut self) -> &mut [u8] {
        &mut self.rgb
    }

    /// The pixel at column `x`, row `y`; panics outside the image.
    pub fn pixel(&self, x: u32, y: u32) -> [u8; 3] {
        let i = (y as usize * self.width as usize + x as usize) * 3;
        [self.rgb[i], self.rgb[i + 1], self.rgb[i + 2]]
    }

    /// Sets the pixel at column `x`, row `y`; panics outside the image.
    pub fn set_pixel(&mut self, x: u32, y: u32, rgb: [u8; 3]) {
        let i = (y as usize * self.width as usize + x as usize) * 3;
        self.rgb[i..i + 3].copy_from_slice(&rgb);
    }

    /// Decodes PNG, JPEG or DICOM bytes, the format told by the content. `name` appears in errors.
    pub fn decode(bytes: &[u8], name: &str) -> Result<Self, ImageError> {
        decode::decode(bytes, name)
    }

    /// Reads and decodes a file.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        Self::decode(&read_file(path)?, &path.display().to_string())
    }

    /// Encodes as PNG: one channel where all pixels are grey, else three. Lossless, the same bytes every time.
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

/// Width and height of a PNG, JPEG or DICOM file from its header alone.
pub fn image_size(path: &Path) -> Result<(u32, u32), ImageError> {
    decode::size(&read_file(path)?, &path.display().to_string())
}

/// Reads an image file whole, up to [`MAX_FILE`] bytes.
pub fn read_file(path: &Path) -> Result<Vec<u8>, ImageError> {
    let name = || path.display().to_string();
    let io = |cause| ImageError::Io { name: name(), cause };
    let mut file = crate::files::open_regular(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    if len > MAX_FILE {
        return Err(ImageError::TooLarge { name: name(), what: format!("{len} bytes"), limit: MAX_FILE });
    }
    let mut bytes = Vec::with_capacity(len as usize);
    file.read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// BLAKE3 hash of encoded image bytes: the image's name in the store and on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// Hash of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Reads the 64 hexadecimal digits that `Display` writes.
    pub fn parse(hex: &str) -> Option<Self> {
        blake3::Hash::from_hex(hex).ok().map(|h| Self(*h.as_bytes()))
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Display for ContentHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

/// Encoded images on disk, each once, under its content hash (`ab/abcdef…`). Safe for several processes at a time.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
}

impl ImageStore {
    /// Opens the store at `root`, made if absent.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        std::fs::create_dir_all(root).map_err(|cause| ImageError::Io { name: root.display().to_string(), cause })?;
        Ok(Self { root: root.to_owned() })
    }

    fn path(&self, hash: &ContentHash) -> PathBuf {
        let hex = hash.to_string();
        self.root.join(&hex[..2]).join(hex)
    }

    /// True when the store holds `hash`.
    pub fn contains(&self, hash: &ContentHash) -> bool {
        self.path(hash).is_file()
    }

    /// Stores `bytes` unless they are there already; returns their hash.
    pub fn put(&self, bytes: &[u8]) -> Result<ContentHash, ImageError> {
        let hash = ContentHash::of(bytes);
        let path = self.path(&hash);
        if !path.is_file() {
            unveil_core::write_atomic(&path, bytes)
                .map_err(|cause| ImageError::Io { name: path.display().to_string(), cause })?;
        }
        Ok(hash)
    }

    /// The bytes stored under `hash`, checked against it.
    pub fn get(&self, hash: &ContentHash) -> Result<Vec<u8>, ImageError> {
        let bytes = read_file(&self.path(hash))?;
        if ContentHash::of(&bytes) != *hash {
            return Err(ImageError::Hash { name: hash.to_string() });
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient(w: u32, h: u32, grey: bool) -> Image {
        let mut i = Image::new(w, h);
        for y in 0..h {
            for x in 0..w {
                let v = (x * 7 + y * 3) as u8;
                i.set_pixel(x, y, if grey { [v; 3] } else { [v, x as u8, y as u8] });
            }
        }
        i
    }

    #[test]
    fn png_round_trip_is_lossless() {
        for grey in [false, true] {
            let i = gradient(13, 7, grey);
            let png = i.to_png().unwrap();
            assert_eq!(png, i.to_png().unwrap());
            assert_eq!(Image::decode(&png, "x").unwrap(), i);
        }
    }

    #[test]
    fn an_image_holds_what_its_size_says() {
        assert_eq!(Image::from_rgb(3, 2, vec![0; 18]), Some(Image::new(3, 2)));
        for (width, height, bytes) in [(3, 2, 17), (3, 2, 19), (9, 9, 9 * 9 * 2), (0, 4, 1), (u32::MAX, u32::MAX, 0)] {
            assert_eq!(Image::from_rgb(width, height, vec![0; bytes]), None, "{width} x {height} of {bytes}");
        }
    }

    #[test]
    fn bad_images_name_path_and_cause() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        let text = |r: Result<Image, ImageError>| r.unwrap_err().to_string();
        assert!(text(Image::open(&path)).contains("a.png"));
        for bytes in [&b""[..], b"hello, no image", &gradient(20, 20, false).to_png().unwrap()[..80]] {
            std::fs::write(&path, bytes).unwrap();
            let e = text(Image::open(&path));
            assert!(e.contains("a.png") && e.contains("decoded"), "{e}");
        }
        assert!(image_size(&path).is_ok_and(|s| s == (20, 20)));
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_unpacked() {
        let mut png = gradient(4, 4, false).to_png().unwrap();
        png[16..20].copy_from_slice(&60_000u32.to_be_bytes());
        png[20..24].copy_from_slice(&60_000u32.to_be_bytes());
        assert!(Image::decode(&png, "bomb").unwrap_err().to_string().contains("bomb"));
    }

    #[test]
    fn a_file_over_the_limit_is_refused_before_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long.png");
        // Sparse: it takes no room on the disk.
        std::fs::File::create(&path).unwrap().set_len(MAX_FILE + 1).unwrap();
        let e = read_file(&path).map(drop).unwrap_err();
        assert!(matches!(e, ImageError::TooLarge { limit: MAX_FILE, .. }), "{e}");
        assert!(e.to_string().contains("long.png"), "{e}");
    }

    #[test]
    fn store_keeps_once_and_checks() {
        let dir = tempfile::tempdir().unwrap();
        let s = ImageStore::open(&dir.path().join("s")).unwrap();
        let png = gradient(5, 5, true).to_png().unwrap();
        let h = s.put(&png).unwrap();
        assert_eq!(s.put(&png).unwrap(), h);
        assert_eq!(ContentHash::parse(&h.to_string()), Some(h));
        assert!(s.contains(&h) && s.get(&h).unwrap() == png);
        std::fs::write(s.path(&h), b"other").unwrap();
        assert!(matches!(s.get(&h), Err(ImageError::Hash { .. })));
        assert!(matches!(s.get(&ContentHash::of(b"absent")), Err(ImageError::Io { .. })));
    }
}
