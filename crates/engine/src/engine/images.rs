//! Image features: encodes each image once, and caches features by content hash.

use std::borrow::Borrow;
use std::collections::HashMap;

use tch::Tensor;
use unveil_core::GridThw;
use unveil_model::Vlm;

use crate::request::PromptInput;
use crate::{Engine, Result};

/// Content hash and grid of an image.
type ImageKey = ([u8; 32], GridThw);

/// Cache of image features for the current weights, with least-recently-used eviction.
#[derive(Debug)]
pub(crate) struct ImageCache {
    limit_bytes: u64,
    bytes: u64,
    clock: u64,
    /// Time of the last use, and features.
    entries: HashMap<ImageKey, (u64, Tensor)>,
}

impl ImageCache {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self { limit_bytes, bytes: 0, clock: 0, entries: HashMap::new() }
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
    }

    fn get(&mut self, key: &ImageKey) -> Option<Tensor> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.0 = self.clock;
        Some(entry.1.shallow_clone())
    }

    fn put(&mut self, key: ImageKey, features: &Tensor) {
        let bytes = tensor_bytes(features);
        if bytes > self.limit_bytes {
            return;
        }
        while self.bytes + bytes > self.limit_bytes {
            let Some(oldest) = self.entries.iter().min_by_key(|(_, (last_use, _))| *last_use).map(|(k, _)| *k) else {
                break;
            };
            if let Some((_, evicted)) = self.entries.remove(&oldest) {
                self.bytes -= tensor_bytes(&evicted);
            }
        }
        self.clock += 1;
        // Copied, because a slice would keep its whole batch in memory.
        if self.entries.insert(key, (self.clock, features.copy())).is_none() {
            self.bytes += bytes;
        }
    }
}

fn tensor_bytes(t: &Tensor) -> u64 {
    (t.numel() * t.kind().elt_size_in_bytes()) as u64
}

/// An image of a batch.
struct BatchImage<'a> {
    grid: GridThw,
    /// `None` if the content hash is unknown.
    key: Option<ImageKey>,
    patches: &'a [f32],
}

impl<V: Borrow<Vlm>> Engine<V> {
    /// Returns the image features of several prompts, in order; encodes those that are not cached in one forward pass. `None` if there
    /// are no images.
    pub(crate) fn encode<'a>(&mut self, inputs: impl Iterator<Item = &'a PromptInput>) -> Result<Option<Tensor>> {
        let vlm = self.vlm.borrow();
        let patch_len = vlm.config().vision.patch_len().max(0) as usize;
        let mut images: Vec<BatchImage<'_>> = Vec::new();
        for input in inputs {
            let mut begin = 0;
            for (i, grid) in input.prompt.grids.iter().enumerate() {
                let end = begin + grid.iter().product::<i64>().max(0) as usize * patch_len;
                let key = input.hashes.get(i).map(|h| (*h, *grid));
                images.push(BatchImage { grid: *grid, key, patches: &input.patches[begin..end] });
                begin = end;
            }
        }
        if images.is_empty() {
            return Ok(None);
        }
        let mut features: Vec<Option<Tensor>> =
            images.iter().map(|image| image.key.as_ref().and_then(|k| self.images.get(k))).collect();
        // An image that occurs several times in the batch is encoded once.
        let first_occurrence =
            |i: usize| images[..i].iter().position(|w| w.key.is_some() && w.key == images[i].key).unwrap_or(i);
        let missing: Vec<usize> =
            (0..images.len()).filter(|&i| features[i].is_none() && first_occurrence(i) == i).collect();
        if !missing.is_empty() {
            let values: Vec<&[f32]> = missing.iter().map(|&i| images[i].patches).collect();
            let grids: Vec<GridThw> = missing.iter().map(|&i| images[i].grid).collect();
            let pixels =
                Tensor::f_from_slice(&values.concat())?.f_view([-1, patch_len as i64])?.f_to_device(vlm.device())?;
            let encoded = vlm.encode_images(&pixels, &grids)?;
            let sizes: Vec<i64> =
                grids.iter().map(|g| Ok(vlm.config().merged_tokens(*g)? as i64)).collect::<Result<_>>()?;
            self.stats.images_encoded += grids.len() as u64;
            for (&i, image_features) in missing.iter().zip(encoded.f_split_with_sizes(sizes.as_slice(), 0)?) {
                if let Some(key) = images[i].key {
                    self.images.put(key, &image_features);
                }
                features[i] = Some(image_features);
            }
        }
        let in_order: Vec<&Tensor> = (0..images.len())
            .map(|i| if features[i].is_some() { i } else { first_occurrence(i) })
            .filter_map(|i| features[i].as_ref())
            .collect();
        Ok(Some(if in_order.len() == 1 { in_order[0].shallow_clone() } else { Tensor::f_cat(&in_order, 0)? }))
    }
}
