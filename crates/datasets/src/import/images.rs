//! Images of an import: decoded once for size and pixel hash, then linked or copied to where the record file can name them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use unveil_data::image_folder::ImageFolder;
use unveil_data::image_store::{ContentHash, Image, ImageError, read_image_file};

use super::ImportError;
use super::draft::DraftRecord;

/// Offset added to Hounsfield units in the 16-bit PNG files of DeepLesion (its README).
const HOUNSFIELD_ZERO: f32 = 32_768.0;

/// Size and content of a decoded image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ImageInfo {
    /// Width and height in pixels.
    pub(super) size: (u32, u32),
    /// Hash of the decoded pixels.
    pub(super) pixels: ContentHash,
}

/// Decodes every image of `items` once, on all cores; returns what was decoded and the errors, by path.
pub(super) fn decode_images(items: &[DraftRecord]) -> (HashMap<PathBuf, ImageInfo>, BTreeMap<PathBuf, ImageError>) {
    let mut todo: Vec<(&Path, Option<(f32, f32)>)> = items.iter().map(|i| (i.image.as_path(), i.window)).collect();
    todo.sort_by(|a, b| a.0.cmp(b.0));
    todo.dedup_by(|a, b| a.0 == b.0);
    let next = AtomicUsize::new(0);
    let out = Mutex::new((HashMap::new(), BTreeMap::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(todo.len());
    std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                while let Some((path, window)) = todo.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let opened = open_as_shown(path, *window);
                    let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
                    match opened {
                        Ok((image, _)) => {
                            let size = (image.width(), image.height());
                            out.0.insert((*path).to_owned(), ImageInfo { size, pixels: ContentHash::of(image.rgb()) });
                        }
                        Err(e) => {
                            out.1.insert((*path).to_owned(), e);
                        }
                    }
                }
            });
        }
    });
    out.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Decodes an image with its intensity window applied; returns it and whether it differs from the file.
fn open_as_shown(path: &Path, window: Option<(f32, f32)>) -> Result<(Image, bool), ImageError> {
    let bytes = read_image_file(path)?;
    let name = path.display().to_string();
    let image = Image::decode(&bytes, &name)?;
    // The decoder above has enforced the size limits, so nothing too large is unpacked here.
    let Some((low, high)) = window.filter(|_| is_png16(&bytes)) else { return Ok((image, false)) };
    let deep =
        image::load_from_memory(&bytes).map_err(|e| ImageError::Decode { name, cause: e.to_string() })?.into_luma16();
    let mut shown = Image::new(image.width(), image.height());
    for (pixel, value) in shown.rgb_mut().chunks_exact_mut(3).zip(deep.iter()) {
        let share = (f32::from(*value) - HOUNSFIELD_ZERO - low) / (high - low).max(1.0);
        pixel.fill((share.clamp(0.0, 1.0) * 255.0).round() as u8);
    }
    Ok((shown, true))
}

/// Returns whether `bytes` are a PNG with 16 bits per channel: the bit depth is byte 24 of the file (PNG specification, IHDR).
fn is_png16(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.get(24) == Some(&16)
}

/// Returns the path of the image relative to the record file; links, copies or windows the image if it cannot be used in place.
pub(super) fn link_image(
    folder: &mut ImageFolder,
    path: &Path,
    window: Option<(f32, f32)>,
) -> Result<String, ImportError> {
    let io = |(path, cause)| ImportError::Io { path, cause };
    if window.is_some() {
        let (image, differs) = open_as_shown(path, window)?;
        if differs {
            return folder.write(path, &image.to_png()?).map_err(io);
        }
    }
    folder.link(path).map_err(io)
}
