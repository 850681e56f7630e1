//! Thumbnails small enough for a page with a thousand of them: scaled-down JPEG, each file once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::ExtendedColorType;
use image::codecs::jpeg::JpegEncoder;
use unveil_data::image_store::Image;
use unveil_preprocess::processor::{Filter, resize};

use crate::ImageFolders;

/// Longest side of a thumbnail in pixels.
const SIDE: u32 = 320;
/// JPEG quality, 1 to 100.
const QUALITY: u8 = 85;

/// Thumbnails of a page, one per file.
#[derive(Default)]
pub(crate) struct Thumbnails {
    known: HashMap<PathBuf, Option<usize>>,
    uris: Vec<String>,
}

impl Thumbnails {
    /// Returns the index of the thumbnail of `path`; `None` if the image cannot be read.
    pub(crate) fn index_of(&mut self, images: &ImageFolders, path: &Path) -> Option<usize> {
        if let Some(known) = self.known.get(path) {
            return *known;
        }
        let index = decode(images, path).and_then(|i| thumbnail(&i)).map(|uri| {
            self.uris.push(uri);
            self.uris.len() - 1
        });
        self.known.insert(path.to_owned(), index);
        index
    }

    /// Returns the data URIs by index.
    pub(crate) fn into_uris(self) -> Vec<String> {
        self.uris
    }
}

fn decode(images: &ImageFolders, path: &Path) -> Option<Image> {
    Image::decode(&images.read(path)?, &path.display().to_string()).ok()
}

fn thumbnail(image: &Image) -> Option<String> {
    let longest = image.width().max(image.height());
    let side = |v: u32| ((u64::from(v) * u64::from(SIDE) / u64::from(longest.max(1))) as u32).max(1);
    let small;
    let image = if longest > SIDE {
        small = resize(image, side(image.width()), side(image.height()), Filter::Bilinear);
        &small
    } else {
        image
    };
    let mut bytes = Vec::new();
    let mut encoder = JpegEncoder::new_with_quality(&mut bytes, QUALITY);
    encoder.encode(image.rgb(), image.width(), image.height(), ExtendedColorType::Rgb8).ok()?;
    Some(format!("data:image/jpeg;base64,{}", STANDARD.encode(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thumbnails_are_small_and_unique() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        std::fs::write(&path, Image::new(900, 300).to_png().unwrap()).unwrap();
        let images = ImageFolders::new([dir.path()]);
        let mut t = Thumbnails::default();
        let mut index = |path: &Path| t.index_of(&images, path);
        assert_eq!((index(&path), index(&path), index(Path::new("gone.png"))), (Some(0), Some(0), None));
        let uris = t.into_uris();
        let bytes = STANDARD.decode(uris[0].strip_prefix("data:image/jpeg;base64,").unwrap()).unwrap();
        let back = Image::decode(&bytes, "x").unwrap();
        assert_eq!((uris.len(), back.width(), back.height()), (1, 320, 106));
    }
}
