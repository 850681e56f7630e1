//! Looks at the images of a record file: each path once, on all cores.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::memory::{Memory, Stamp};
use crate::near::dhash;
use crate::records::{ImageRef, RecordFile};
use crate::store::{ContentHash, Image, ImageError};

/// How closely images are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// Whether they are whole, and their size.
    Whole,
    /// Their pixels as well, to be compared.
    Pixels {
        /// And what they look like.
        near: bool,
    },
}

impl Depth {
    pub(super) fn pixels(near: bool) -> Self {
        Self::Pixels { near }
    }
}

/// What is known of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    /// Width and height.
    pub size: (u32, u32),
    /// Hash of its pixels, where they were asked for.
    pub pixels: Option<ContentHash>,
    /// Hash of its looks, where it was asked for and there is one.
    pub likeness: Option<u64>,
}

/// What was seen.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// Of each record, the number of its image; none where it has no file.
    image: Vec<Option<usize>>,
    seen: Vec<Option<Result<Seen, ImageError>>>,
    /// What is wrong with the image of a record that is not the first one with it: an error names its record.
    again: HashMap<usize, ImageError>,
    /// Images that were decoded.
    pub decoded: usize,
    /// Images that were remembered.
    pub known: usize,
}

impl Looked {
    /// What was seen of the image of a record; none where it has no file.
    pub(super) fn of(&self, record: usize) -> Option<Result<&Seen, &ImageError>> {
        let seen = self.seen.get((*self.image.get(record)?)?)?.as_ref()?;
        Some(self.again.get(&record).map_or(seen.as_ref(), Err))
    }
}

/// Looks at every image; what `memory`, a file, says of one that has not changed is taken as it is, and what is found goes into it.
pub(super) fn look(file: &RecordFile, depth: Depth, memory: Option<&Path>) -> Looked {
    let (mut number, mut first) = (HashMap::new(), Vec::new());
    let image = file.records.iter().enumerate().map(|(i, r)| {
        matches!(file.image_ref(r), ImageRef::File(_)).then(|| {
            *number.entry(r.image.as_str()).or_insert_with(|| {
                first.push(i);
                first.len() - 1
            })
        })
    });
    let mut out = Looked { image: image.collect(), ..Looked::default() };
    let old = memory.map(Memory::read).unwrap_or_default();
    let (next, found) = (AtomicUsize::new(0), Mutex::new((Vec::new(), Memory::default())));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(first.len());
    std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(record) = first.get(n) else { break };
                    let (seen, stamp, known) = one(file, *record, depth, &old);
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    if let (Ok(seen), Some((path, stamp))) = (&seen, stamp) {
                        found.1.note(path, stamp, seen.size);
                    }
                    found.0.push((n, seen, known));
                }
            });
        }
    });
    let (list, new) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    out.seen.resize_with(first.len(), || None);
    for (n, seen, known) in list {
        out.known += usize::from(known);
        out.decoded += usize::from(!known);
        out.seen[n] = Some(seen);
    }
    for (i, n) in out.image.iter().enumerate() {
        let failed = |n: usize| first[n] != i && matches!(out.seen[n], Some(Err(_)));
        if n.is_some_and(failed)
            && let (Err(e), ..) = one(file, i, depth, &old)
        {
            out.again.insert(i, e);
        }
    }
    if let Some(path) = memory.filter(|_| new != old) {
        new.write(path);
    }
    out
}

/// The image of a record, what its file was stamped with before it was read, and whether it was remembered.
fn one(
    file: &RecordFile,
    record: usize,
    depth: Depth,
    old: &Memory,
) -> (Result<Seen, ImageError>, Option<(String, Stamp)>, bool) {
    let (root, r) = (file.root(), &file.records[record]);
    let path = match root.file(r) {
        Ok(path) => path,
        Err(e) => return (Err(e), None, false),
    };
    // Taken before the file is read: what changes meanwhile has another one later.
    let full = std::path::absolute(&path).unwrap_or_else(|_| path.clone());
    let stamp = Stamp::of(&path).map(|stamp| (full.to_string_lossy().into_owned(), stamp));
    if let (Depth::Whole, Some((path, stamp))) = (depth, &stamp)
        && let Some(size) = old.size_of(path, stamp)
    {
        return (Ok(Seen { size, pixels: None, likeness: None }), Some((path.clone(), *stamp)), true);
    }
    let name = root.folder().join(&r.image).display().to_string();
    let seen = root.read(r).and_then(|bytes| Image::decode(&bytes, &name)).map(|image| Seen {
        size: (image.width(), image.height()),
        pixels: (depth != Depth::Whole).then(|| ContentHash::of(image.rgb())),
        likeness: if depth == Depth::pixels(true) { dhash(&image) } else { None },
    });
    (seen, stamp, false)
}
