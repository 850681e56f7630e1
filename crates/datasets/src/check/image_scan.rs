//! Scan of the images of a record file: each path is decoded once, on all cores.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use unveil_data::image_store::{ContentHash, Image, ImageError};
use unveil_data::records::{ImageRef, RecordFile};

use super::image_cache::{FileStamp, ImageCache};
use crate::near_duplicates::dhash;

/// Properties of images that a scan determines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScanDepth {
    /// Whether they can be decoded, and their size.
    Size,
    /// Also a hash of their pixels, for comparison.
    Pixels {
        /// Also a perceptual hash.
        near: bool,
    },
}

impl ScanDepth {
    pub(super) fn pixels(near: bool) -> Self {
        Self::Pixels { near }
    }
}

/// Properties of a decoded image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ScannedImage {
    /// Width and height in pixels.
    pub size: (u32, u32),
    /// Hash of its pixels, if requested.
    pub pixels: Option<ContentHash>,
    /// Perceptual hash, if requested and defined.
    pub likeness: Option<u64>,
}

/// Result of a scan.
#[derive(Debug, Default)]
pub(super) struct ImageScan {
    /// Index of each record's image in `scanned`; `None` if it has no file.
    image: Vec<Option<usize>>,
    scanned: Vec<Option<Result<ScannedImage, ImageError>>>,
    /// Errors of records that share an image with an earlier one, because an error names its record.
    repeated_errors: HashMap<usize, ImageError>,
    /// Number of images decoded.
    pub decoded: usize,
    /// Number of images taken from the cache.
    pub cached: usize,
}

impl ImageScan {
    /// Returns the result for the image of a record; `None` if it has no file.
    pub(super) fn image_of(&self, record: usize) -> Option<Result<&ScannedImage, &ImageError>> {
        let scanned = self.scanned.get((*self.image.get(record)?)?)?.as_ref()?;
        Some(self.repeated_errors.get(&record).map_or(scanned.as_ref(), Err))
    }
}

/// Scans all images of a record file. Unchanged images in the cache file `cache` are not decoded again; the file is updated afterwards.
pub(super) fn scan_images(file: &RecordFile, depth: ScanDepth, cache: Option<&Path>) -> ImageScan {
    // Index of each path, and the first record with it.
    let mut index_of_path = HashMap::new();
    let mut first = Vec::new();
    let image = file.records.iter().enumerate().map(|(i, r)| {
        matches!(file.image_ref(r), ImageRef::File(_)).then(|| {
            *index_of_path.entry(r.image.as_str()).or_insert_with(|| {
                first.push(i);
                first.len() - 1
            })
        })
    });
    let mut out = ImageScan { image: image.collect(), ..ImageScan::default() };
    let old = cache.map(ImageCache::load).unwrap_or_default();
    let next = AtomicUsize::new(0);
    let results = Mutex::new((Vec::new(), ImageCache::default()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(first.len());
    std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(record) = first.get(n) else { break };
                    let (scanned, stamp, cached) = scan_image(file, *record, depth, &old);
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    if let (Ok(image), Some((path, stamp))) = (&scanned, stamp) {
                        results.1.insert(path, stamp, image.size);
                    }
                    results.0.push((n, scanned, cached));
                }
            });
        }
    });
    let (list, new) = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    out.scanned.resize_with(first.len(), || None);
    for (n, scanned, cached) in list {
        out.cached += usize::from(cached);
        out.decoded += usize::from(!cached);
        out.scanned[n] = Some(scanned);
    }
    for (i, n) in out.image.iter().enumerate() {
        let failed = |n: usize| first[n] != i && matches!(out.scanned[n], Some(Err(_)));
        if n.is_some_and(failed)
            && let (Err(e), ..) = scan_image(file, i, depth, &old)
        {
            out.repeated_errors.insert(i, e);
        }
    }
    if let Some(path) = cache.filter(|_| new != old) {
        new.save(path);
    }
    out
}

/// Scans the image of a record; returns the result, the stamp of its file before it was read, and whether it came from the cache.
fn scan_image(
    file: &RecordFile,
    record: usize,
    depth: ScanDepth,
    old: &ImageCache,
) -> (Result<ScannedImage, ImageError>, Option<(String, FileStamp)>, bool) {
    let root = file.root();
    let r = &file.records[record];
    let path = match root.file(r) {
        Ok(path) => path,
        Err(e) => return (Err(e), None, false),
    };
    // Taken before the file is read, so that a change in the meantime is detected later.
    let full = std::path::absolute(&path).unwrap_or_else(|_| path.clone());
    let stamp = FileStamp::of(&path).map(|stamp| (full.to_string_lossy().into_owned(), stamp));
    if let (ScanDepth::Size, Some((path, stamp))) = (depth, &stamp)
        && let Some(size) = old.size_of(path, stamp)
    {
        return (Ok(ScannedImage { size, pixels: None, likeness: None }), Some((path.clone(), *stamp)), true);
    }
    let name = root.folder().join(&r.image).display().to_string();
    let scanned = root.read(r).and_then(|bytes| Image::decode(&bytes, &name)).map(|image| ScannedImage {
        size: (image.width(), image.height()),
        pixels: (depth != ScanDepth::Size).then(|| ContentHash::of(image.rgb())),
        likeness: if depth == ScanDepth::pixels(true) { dhash(&image) } else { None },
    });
    (scanned, stamp, false)
}
