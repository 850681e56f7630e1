//! Image features: each image goes through the vision tower once, known again by what it was made from.

use std::borrow::Borrow;
use std::collections::HashMap;

use tch::Tensor;
use unveil_model::{GridThw, Vlm};

use crate::request::GroupInput;
use crate::{Engine, Result};

/// Features of images under the present weights, the least recently used given up first.
pub(crate) struct ImageCache {
    limit: u64,
    held: u64,
    clock: u64,
    entries: HashMap<([u8; 32], GridThw), (u64, Tensor)>,
}

impl ImageCache {
    pub(crate) fn new(limit: u64) -> Self {
        Self { limit, held: 0, clock: 0, entries: HashMap::new() }
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.held = 0;
    }

    fn get(&mut self, key: &([u8; 32], GridThw)) -> Option<Tensor> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.0 = self.clock;
        Some(entry.1.shallow_clone())
    }

    fn put(&mut self, key: ([u8; 32], GridThw), features: &Tensor) {
        let bytes = size_of(features);
        if bytes > self.limit {
            return;
        }
        while self.held + bytes > self.limit {
            let Some(oldest) = self.entries.iter().min_by_key(|(_, (used, _))| *used).map(|(k, _)| *k) else { break };
            if let Some((_, gone)) = self.entries.remove(&oldest) {
                self.held -= size_of(&gone);
            }
        }
        self.clock += 1;
        // A tensor of its own: a slice would keep its whole batch in memory.
        if self.entries.insert(key, (self.clock, features.copy())).is_none() {
            self.held += bytes;
        }
    }
}

fn size_of(t: &Tensor) -> u64 {
    (t.numel() * t.kind().elt_size_in_bytes()) as u64
}

/// One image of a batch.
struct Wanted<'a> {
    grid: GridThw,
    /// What it was made from, where that is known.
    key: Option<([u8; 32], GridThw)>,
    patches: &'a [f32],
}

impl<V: Borrow<Vlm>> Engine<V> {
    /// Image features of several prompts, in order, those that are not known in one pass; none when there is no image.
    pub(crate) fn encode<'a>(&mut self, inputs: impl Iterator<Item = &'a GroupInput>) -> Result<Option<Tensor>> {
        let vlm = self.vlm.borrow();
        let length = vlm.config().vision.patch_len().max(0) as usize;
        let mut wanted: Vec<Wanted<'_>> = Vec::new();
        for input in inputs {
            let mut at = 0;
            for (i, grid) in input.prompt.grids.iter().enumerate() {
                let end = at + grid.iter().product::<i64>().max(0) as usize * length;
                let key = input.hashes.get(i).map(|h| (*h, *grid));
                wanted.push(Wanted { grid: *grid, key, patches: &input.patches[at..end] });
                at = end;
            }
        }
        if wanted.is_empty() {
            return Ok(None);
        }
        let mut features: Vec<Option<Tensor>> =
            wanted.iter().map(|w| w.key.as_ref().and_then(|k| self.images.get(k))).collect();
        // An image that comes twice in the batch is encoded for its first place.
        let first = |i: usize| wanted[..i].iter().position(|w| w.key.is_some() && w.key == wanted[i].key).unwrap_or(i);
        let missing: Vec<usize> = (0..wanted.len()).filter(|&i| features[i].is_none() && first(i) == i).collect();
        if !missing.is_empty() {
            let values: Vec<&[f32]> = missing.iter().map(|&i| wanted[i].patches).collect();
            let grids: Vec<GridThw> = missing.iter().map(|&i| wanted[i].grid).collect();
            let pixels =
                Tensor::f_from_slice(&values.concat())?.f_view([-1, length as i64])?.f_to_device(vlm.device())?;
            let made = vlm.encode_images(&pixels, &grids)?;
            let sizes: Vec<i64> =
                grids.iter().map(|g| Ok(vlm.config().merged_tokens(*g)? as i64)).collect::<Result<_>>()?;
            self.stats.images_encoded += grids.len() as u64;
            for (&i, part) in missing.iter().zip(made.f_split_with_sizes(sizes.as_slice(), 0)?) {
                if let Some(key) = wanted[i].key {
                    self.images.put(key, &part);
                }
                features[i] = Some(part);
            }
        }
        let order: Vec<usize> = (0..wanted.len()).map(|i| if features[i].is_some() { i } else { first(i) }).collect();
        let parts: Vec<&Tensor> = order.iter().filter_map(|&i| features[i].as_ref()).collect();
        Ok(Some(if parts.len() == 1 { parts[0].shallow_clone() } else { Tensor::f_cat(&parts, 0)? }))
    }
}
