//! Images of an import: decoded once for size and pixel hash, then made reachable from the record file.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::ImportError;
use super::item::Item;
use crate::reach::ImageFolder;
use crate::store::{ContentHash, Image, ImageError, read_file};

/// DeepLesion stores Hounsfield units plus this in 16-bit PNG files (its README).
const HOUNSFIELD_ZERO: f32 = 32_768.0;

/// What is known of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Seen {
    pub(super) size: (u32, u32),
    /// Hash of the decoded pixels.
    pub(super) pixels: ContentHash,
}

/// Decodes every image of these items once, on all cores: what is seen, and what cannot be read.
pub(super) fn look(items: &[Item]) -> (HashMap<PathBuf, Seen>, BTreeMap<PathBuf, ImageError>) {
    let mut todo: Vec<(&Path, Option<(f32, f32)>)> = items.iter().map(|i| (i.image.as_path(), i.window)).collect();
    todo.sort_by(|a, b| a.0.cmp(b.0));
    todo.dedup_by(|a, b| a.0 == b.0);
    let (next, out) = (AtomicUsize::new(0), Mutex::new((HashMap::new(), BTreeMap::new())));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(todo.len());
    std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                while let Some((path, window)) = todo.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let looked = open(path, *window);
                    let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
                    match looked {
                        Ok((image, _)) => {
                            let size = (image.width(), image.height());
                            out.0.insert((*path).to_owned(), Seen { size, pixels: ContentHash::of(image.rgb()) });
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

/// The image as its record will show it, and whether that differs from the file.
fn open(path: &Path, window: Option<(f32, f32)>) -> Result<(Image, bool), ImageError> {
    let (bytes, name) = (read_file(path)?, path.display().to_string());
    let image = Image::decode(&bytes, &name)?;
    // Limits were judged by the decoder above, so that nothing large is unpacked here.
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

/// Whether these are bytes of a PNG of 16 bits a channel: the bit depth is byte 24 of the file (PNG specification, IHDR).
fn is_png16(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.get(24) == Some(&16)
}

/// Path of the image relative to the record file, after linking, copying or windowing it where it cannot be used as it lies.
pub(super) fn reach(folder: &mut ImageFolder, path: &Path, window: Option<(f32, f32)>) -> Result<String, ImportError> {
    let io = |(path, cause)| ImportError::Io { path, cause };
    if window.is_some() {
        let (image, differs) = open(path, window)?;
        if differs {
            return folder.write(path, &image.to_png()?).map_err(io);
        }
    }
    folder.reach(path).map_err(io)
}
