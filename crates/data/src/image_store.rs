//! Encoded images: reading with limits, content hashes, and a content-addressed store on disk.

use std::io::Read;
use std::path::{Path, PathBuf};

pub use crate::decode::{header_size, image_size};
pub use crate::rgb_image::{Image, ImageError, MAX_PIXELS, MAX_SIDE};

/// Maximum size of an encoded image file in bytes.
pub const MAX_FILE_BYTES: u64 = unveil_core::limits::MAX_IMAGE_BYTES;

/// Reads an encoded image file of at most [`MAX_FILE_BYTES`] bytes.
pub fn read_image_file(path: &Path) -> Result<Vec<u8>, ImageError> {
    let name = || path.display().to_string();
    let io = |cause| ImageError::Io { name: name(), cause };
    let mut file = crate::files::open_regular(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    if len > MAX_FILE_BYTES {
        return Err(ImageError::TooLarge { name: name(), what: format!("{len} bytes"), limit: MAX_FILE_BYTES });
    }
    let mut bytes = Vec::with_capacity(len as usize);
    file.read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// BLAKE3 hash of encoded image bytes; it identifies the image in the store and on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// Computes the hash of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Parses the 64 hexadecimal digits that `Display` writes.
    pub fn parse(hex: &str) -> Option<Self> {
        blake3::Hash::from_hex(hex).ok().map(|h| Self(*h.as_bytes()))
    }

    /// Returns the 32 bytes of the hash.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Display for ContentHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

/// Encoded images on disk, each stored once under its content hash (`ab/abcdef…`). Several processes may use a store concurrently.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
}

impl ImageStore {
    /// Opens the store at `root`, creating it if absent.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        std::fs::create_dir_all(root).map_err(|cause| ImageError::Io { name: root.display().to_string(), cause })?;
        Ok(Self { root: root.to_owned() })
    }

    fn path(&self, hash: &ContentHash) -> PathBuf {
        let hex = hash.to_string();
        self.root.join(&hex[..2]).join(hex)
    }

    /// Returns whether the store contains `hash`.
    pub fn contains(&self, hash: &ContentHash) -> bool {
        self.path(hash).is_file()
    }

    /// Stores `bytes` unless they are already present, and returns their hash.
    pub fn put(&self, bytes: &[u8]) -> Result<ContentHash, ImageError> {
        let hash = ContentHash::of(bytes);
        let path = self.path(&hash);
        if !path.is_file() {
            unveil_core::write_atomic(&path, bytes)
                .map_err(|cause| ImageError::Io { name: path.display().to_string(), cause })?;
        }
        Ok(hash)
    }

    /// Returns the bytes stored under `hash` after verifying them against it.
    pub fn get(&self, hash: &ContentHash) -> Result<Vec<u8>, ImageError> {
        let bytes = read_image_file(&self.path(hash))?;
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
    fn byte_count_must_match_the_size() {
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
    fn decompression_bombs_are_refused_by_their_header() {
        let mut png = gradient(4, 4, false).to_png().unwrap();
        png[16..20].copy_from_slice(&60_000u32.to_be_bytes());
        png[20..24].copy_from_slice(&60_000u32.to_be_bytes());
        assert!(Image::decode(&png, "bomb").unwrap_err().to_string().contains("bomb"));
    }

    #[test]
    fn oversized_files_are_refused_before_reading() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long.png");
        // A sparse file takes no disk space.
        std::fs::File::create(&path).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
        let e = read_image_file(&path).map(drop).unwrap_err();
        assert!(matches!(e, ImageError::TooLarge { limit: MAX_FILE_BYTES, .. }), "{e}");
        assert!(e.to_string().contains("long.png"), "{e}");
    }

    #[test]
    fn store_deduplicates_and_verifies() {
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
