//! KV caches for generation, in fixed slots with one group each: the prefix is stored once, each of its n responses has its own suffix. The
//! row of a response is slot * n + index. Free slots take part in the computation harmlessly, so that shapes are the same in every step.
//! Keys and values are fp32, or bf16 in the fast mode.

use tch::{Device, Kind, Tensor};

use crate::generation::graph::StepGraphs;
use crate::layers::attention::{AttentionSet, gather_positions};
use crate::layers::ops::minus_infinity_where;
use crate::{ModelError, Result, TextConfig};

/// Result of running a batch of prompts: keys and values of each layer, and the hidden states that predict the first response tokens.
#[derive(Debug)]
pub struct Prefill {
    /// Hidden state at each prompt's last token `[G, D]`.
    pub last_hidden: Tensor,
    /// Image tokens of each prompt.
    pub image_tokens: Vec<usize>,
    /// Keys and values `[G, Hkv, L, d]` of each layer, padded at the end.
    pub(crate) layers: Vec<(Tensor, Tensor)>,
    /// Prompt length of each group in tokens.
    pub(crate) lengths: Vec<i64>,
    /// Rotary position of the first response token of each group.
    pub(crate) next: Vec<i64>,
    /// Positions of the image tokens of each prompt.
    pub(crate) images: Vec<Vec<i64>>,
    /// Range within L of each response, by group; empty after a plain prefill.
    pub(crate) responses: Vec<Vec<std::ops::Range<i64>>>,
}

impl Prefill {
    /// Returns the number of prompts in the batch.
    pub fn groups(&self) -> usize {
        self.lengths.len()
    }
}

/// Result of a decode step.
#[derive(Debug)]
pub struct DecodeOut {
    /// Hidden states `[R, D]` that predict the next tokens, in the order of the fed rows.
    pub hidden: Tensor,
    /// Attention rows `[R, V]` (fp32) of the fed tokens, if the cache captures.
    pub attention: Option<Tensor>,
}

/// The KV cache of one layer.
#[derive(Debug)]
pub(crate) struct LayerCache {
    pub prefix_k: Tensor,
    pub prefix_v: Tensor,
    pub suffix_k: Tensor,
    pub suffix_v: Tensor,
    /// Set if the layer's attention is captured.
    pub captured: Option<CapturedLayer>,
}

/// Data of one layer that capture needs.
#[derive(Debug)]
pub(crate) struct CapturedLayer {
    /// Keys of the image tokens `[S, Hkv, V, d]`.
    pub image_k: Tensor,
    /// Captured heads; `None`: all heads.
    pub heads: Option<Tensor>,
    /// 1 for each captured head, 0 for others; `None`: all heads.
    pub flags: Option<Vec<u8>>,
}

/// State of one slot.
#[derive(Clone, Default, Debug)]
pub(crate) struct SlotState {
    /// Prompt length in tokens; 0 if the slot is free.
    pub prefix: i64,
    /// Rotary position of the first response token.
    pub next: i64,
    /// Number of image tokens.
    pub images: usize,
}

/// Capacity of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Number of slots, with one group each.
    pub slots: usize,
    /// Responses per group.
    pub n: usize,
    /// Longest prompt in tokens; grows when a longer one is admitted.
    pub prompt: usize,
    /// Longest response in tokens.
    pub response: usize,
    /// Maximum image tokens of a prompt; grows like `prompt`.
    pub images: usize,
}

/// KV caches of several groups with n responses each.
#[derive(Debug)]
pub struct GroupCache {
    shape: CacheShape,
    layers: Vec<LayerCache>,
    pub(crate) slots: Vec<SlotState>,
    /// Response tokens fed so far, by row.
    pub(crate) lengths: Vec<i64>,
    capture: Option<AttentionSet>,
    /// Whether each image token is real, not padding `[S, 1, 1, V]`; `None` if all are.
    pub(crate) image_valid: Option<Tensor>,
    /// Additive mask `[S, 1, 1, P]` of the prefixes; `None` if all have full length.
    pub(crate) prefix_bias: Option<Tensor>,
    pub(crate) device: Device,
    /// Whether every step computes all rows, in repeating shapes.
    fixed_shapes: bool,
    /// Recorded steps.
    pub(crate) graphs: StepGraphs,
}

impl GroupCache {
    /// Creates empty caches of keys and values of dtype `kind`. With `fixed_shapes`, the shapes of a step depend only on the shape of the cache and on the suffix length
    /// rounded up to a multiple of 64, at the price of also computing rows that have ended; on a GPU, steps are recorded and replayed.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] for an empty shape or a capture set that the model does not have, and [`ModelError::Torch`] if there
    /// is not enough memory.
    pub fn new(
        config: &TextConfig,
        shape: CacheShape,
        capture: Option<AttentionSet>,
        fixed_shapes: bool,
        (kind, device): (Kind, Device),
    ) -> Result<Self> {
        if shape.slots == 0 || shape.n == 0 || shape.response == 0 {
            return Err(ModelError::input(
                "a group cache needs at least one slot, one response and one response token",
            ));
        }
        if let Some(set) = &capture {
            set.check(config)?;
        }
        let mut shape = shape;
        (shape.prompt, shape.response) = (align_tokens(shape.prompt, device), align_tokens(shape.response, device));
        let s = shape.slots as i64;
        let rows = (shape.slots * shape.n) as i64;
        let heads = config.num_key_value_heads;
        let d = config.head_dim;
        let zeros = |groups: i64, tokens: usize| -> Result<Tensor> {
            Ok(Tensor::f_zeros([groups, heads, tokens as i64, d], (kind, device))?)
        };
        let layer = |index: usize| -> Result<LayerCache> {
            let set = capture.as_ref().filter(|c| c.captures(index));
            let captured = |set: &AttentionSet| -> Result<CapturedLayer> {
                let image_k = zeros(s, shape.images)?;
                let flags = set.head_flags(index, config.num_attention_heads);
                Ok(CapturedLayer { image_k, heads: set.heads(index, device), flags })
            };
            Ok(LayerCache {
                prefix_k: zeros(s, shape.prompt)?,
                prefix_v: zeros(s, shape.prompt)?,
                suffix_k: zeros(rows, shape.response)?,
                suffix_v: zeros(rows, shape.response)?,
                captured: set.map(captured).transpose()?,
            })
        };
        let mut cache = Self {
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            slots: vec![SlotState::default(); shape.slots],
            lengths: vec![0; rows as usize],
            shape,
            capture,
            image_valid: None,
            prefix_bias: None,
            device,
            fixed_shapes,
            graphs: StepGraphs::default(),
        };
        cache.rebuild_masks();
        Ok(cache)
    }

    /// Returns the device memory that a cache of `shape` with keys and values of dtype `kind` needs, in bytes.
    pub fn bytes(config: &TextConfig, shape: &CacheShape, kind: Kind) -> u64 {
        let values_per_token =
            config.num_hidden_layers * 2 * (config.num_key_value_heads * config.head_dim).max(0) as usize;
        let tokens = shape.slots * (shape.prompt + shape.n * shape.response);
        (values_per_token * tokens * kind.elt_size_in_bytes()) as u64
    }

    /// Returns the dtype of keys and values.
    pub fn kind(&self) -> Kind {
        self.layers.first().map_or(Kind::Float, |layer| layer.prefix_k.kind())
    }

    /// Returns the current capacity.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Returns the number of responses per group.
    pub fn n(&self) -> usize {
        self.shape.n
    }

    /// Returns the number of rows: slots times responses.
    pub fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// Returns the number of response tokens fed so far, by row.
    pub fn lengths(&self) -> &[i64] {
        &self.lengths
    }

    /// Returns the number of image tokens of a slot's prompt.
    pub fn image_tokens(&self, slot: usize) -> usize {
        self.slots.get(slot).map_or(0, |s| s.images)
    }

    /// Returns whether every step computes all rows.
    pub fn fixed_shapes(&self) -> bool {
        self.fixed_shapes
    }

    /// Returns the number of steps that were replayed from recorded graphs, and the error of the latest recording, if it failed.
    pub fn graph_steps(&self) -> (u64, Option<&str>) {
        (self.graphs.replayed, self.graphs.last_error())
    }

    /// Returns the captured layers and heads.
    pub fn capture(&self) -> Option<&AttentionSet> {
        self.capture.as_ref()
    }

    /// Copies the prompts of `prefill` to `slots`, in order, overwriting their contents. If the prefill also ran responses, their keys and
    /// values are copied to the rows and count as fed.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] if prompts, slots or layers do not match or a response is too long, and [`ModelError::Torch`] if
    /// there is not enough memory.
    pub fn admit(&mut self, prefill: &Prefill, slots: &[usize]) -> Result<()> {
        if slots.len() != prefill.groups() || slots.iter().any(|s| *s >= self.shape.slots) {
            let prompts = prefill.groups();
            let all = self.shape.slots;
            return Err(ModelError::input(format!("{prompts} prompts do not fit slots {slots:?} of {all}")));
        }
        if prefill.layers.len() != self.layers.len() {
            return Err(ModelError::input("the prefill comes from a model with a different number of layers"));
        }
        let longest = prefill.lengths.iter().copied().max().unwrap_or(0);
        let images = prefill.images.iter().map(Vec::len).max().unwrap_or(0);
        self.grow_prefixes(longest, images as i64)?;
        for (g, &slot) in slots.iter().enumerate() {
            self.copy_prefill(prefill, g as i64, slot)?;
            self.slots[slot] =
                SlotState { prefix: prefill.lengths[g], next: prefill.next[g], images: prefill.images[g].len() };
            let fed = prefill.responses.get(g);
            for r in 0..self.shape.n {
                let length = fed.and_then(|f| f.get(r)).map_or(0, |range| range.end - range.start);
                self.lengths[slot * self.shape.n + r] = length;
            }
        }
        self.rebuild_masks();
        Ok(())
    }

    /// Marks a slot as free.
    pub fn free_slot(&mut self, slot: usize) {
        if let Some(s) = self.slots.get_mut(slot) {
            *s = SlotState::default();
            self.lengths[slot * self.shape.n..(slot + 1) * self.shape.n].fill(0);
            self.rebuild_masks();
        }
    }

    /// Keeps only the given slots, in the given order, and frees the memory of the others.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] for a slot that does not exist.
    pub fn retain_slots(&mut self, keep: &[usize]) -> Result<()> {
        if let Some(slot) = keep.iter().find(|g| **g >= self.shape.slots) {
            let slots = self.shape.slots;
            return Err(ModelError::input(format!("slot {slot} does not exist: the cache has {slots} slots")));
        }
        let n = self.shape.n;
        let rows: Vec<i64> = keep.iter().flat_map(|g| (g * n..(g + 1) * n).map(|r| r as i64)).collect();
        let groups: Vec<i64> = keep.iter().map(|g| *g as i64).collect();
        self.lengths = rows.iter().map(|r| self.lengths[*r as usize]).collect();
        self.slots = keep.iter().map(|g| self.slots[*g].clone()).collect();
        self.shape.slots = keep.len();
        let rows = Tensor::from_slice(&rows).to_device(self.device);
        let groups = Tensor::from_slice(&groups).to_device(self.device);
        for layer in &mut self.layers {
            layer.prefix_k = layer.prefix_k.f_index_select(0, &groups)?;
            layer.prefix_v = layer.prefix_v.f_index_select(0, &groups)?;
            layer.suffix_k = layer.suffix_k.f_index_select(0, &rows)?;
            layer.suffix_v = layer.suffix_v.f_index_select(0, &rows)?;
            if let Some(captured) = &mut layer.captured {
                captured.image_k = captured.image_k.f_index_select(0, &groups)?;
            }
        }
        self.graphs.clear();
        self.rebuild_masks();
        Ok(())
    }

    /// Copies the keys and values of group `g` of a prefill to a slot.
    fn copy_prefill(&mut self, prefill: &Prefill, g: i64, slot: usize) -> Result<()> {
        let s = slot as i64;
        let length = prefill.lengths[g as usize];
        let first = s * self.shape.n as i64;
        let image = Tensor::from_slice(&prefill.images[g as usize]).to_device(self.device).unsqueeze(0);
        for (store, (k, v)) in self.layers.iter_mut().zip(&prefill.layers) {
            let k = k.narrow(0, g, 1);
            let v = v.narrow(0, g, 1);
            for (target, source) in [(&store.prefix_k, &k), (&store.prefix_v, &v)] {
                target.narrow(0, s, 1).narrow(2, 0, length).f_copy_(&source.narrow(2, 0, length))?;
            }
            for (r, range) in prefill.responses.get(g as usize).into_iter().flatten().enumerate() {
                let row = first + r as i64;
                let count = range.end - range.start;
                let capacity = self.shape.response as i64;
                if count > capacity {
                    let message = format!("a response of {count} tokens does not fit a row of {capacity}");
                    return Err(ModelError::input(message));
                }
                for (target, source) in [(&store.suffix_k, &k), (&store.suffix_v, &v)] {
                    target.narrow(0, row, 1).narrow(2, 0, count).f_copy_(&source.narrow(2, range.start, count))?;
                }
            }
            if let Some(captured) = store.captured.as_ref().filter(|_| image.numel() > 0) {
                let keys = gather_positions(&k, &image);
                captured.image_k.narrow(0, s, 1).narrow(2, 0, image.size()[1]).f_copy_(&keys)?;
            }
        }
        Ok(())
    }

    /// Grows the prefixes for longer prompts.
    fn grow_prefixes(&mut self, prompt: i64, images: i64) -> Result<()> {
        let prompt = align_tokens(prompt as usize, self.device) as i64;
        if prompt > self.shape.prompt as i64 {
            for layer in &mut self.layers {
                layer.prefix_k = zero_pad(&layer.prefix_k, 2, prompt)?;
                layer.prefix_v = zero_pad(&layer.prefix_v, 2, prompt)?;
            }
            self.graphs.clear();
            self.shape.prompt = prompt as usize;
        }
        if images > self.shape.images as i64 {
            for layer in &mut self.layers {
                if let Some(captured) = &mut layer.captured {
                    captured.image_k = zero_pad(&captured.image_k, 2, images)?;
                }
            }
            self.graphs.clear();
            self.shape.images = images as usize;
        }
        Ok(())
    }

    /// Grows the cache for more groups and longer responses; it never shrinks.
    ///
    /// # Errors
    /// Returns [`ModelError::Torch`] if there is not enough memory.
    pub fn reserve(&mut self, slots: usize, response: usize) -> Result<()> {
        let response = align_tokens(response, self.device).max(self.shape.response);
        let slots = slots.max(self.shape.slots);
        if (slots, response) == (self.shape.slots, self.shape.response) {
            return Ok(());
        }
        let rows = slots * self.shape.n;
        for layer in &mut self.layers {
            layer.prefix_k = zero_pad(&layer.prefix_k, 0, slots as i64)?;
            layer.prefix_v = zero_pad(&layer.prefix_v, 0, slots as i64)?;
            layer.suffix_k = zero_pad(&zero_pad(&layer.suffix_k, 2, response as i64)?, 0, rows as i64)?;
            layer.suffix_v = zero_pad(&zero_pad(&layer.suffix_v, 2, response as i64)?, 0, rows as i64)?;
            if let Some(captured) = &mut layer.captured {
                captured.image_k = zero_pad(&captured.image_k, 0, slots as i64)?;
            }
        }
        self.graphs.clear();
        self.slots.resize(slots, SlotState::default());
        self.lengths.resize(rows, 0);
        (self.shape.slots, self.shape.response) = (slots, response);
        self.rebuild_masks();
        Ok(())
    }

    /// Checks that every given row exists and has room for one more token.
    pub(crate) fn check_capacity(&self, rows: &[usize]) -> Result<()> {
        let capacity = self.shape.response as i64;
        if let Some(row) = rows.iter().find(|r| **r >= self.rows()) {
            let count = self.rows();
            return Err(ModelError::input(format!("row {row} does not exist: the cache has {count} rows")));
        }
        match rows.iter().find(|r| self.lengths[**r] >= capacity) {
            Some(row) => Err(ModelError::input(format!("row {row} is full: it already holds {capacity} tokens"))),
            None => Ok(()),
        }
    }

    /// Adds one token to the lengths of the given rows.
    pub(crate) fn advance(&mut self, rows: &[usize]) {
        rows.iter().for_each(|r| self.lengths[*r] += 1);
    }

    pub(crate) fn layer(&self, layer: usize) -> &LayerCache {
        &self.layers[layer]
    }

    /// Rebuilds the masks after a change of slots or capacity.
    fn rebuild_masks(&mut self) {
        let slots = self.slots.len() as i64;
        let width = self.shape.prompt as i64;
        // A free slot attends to one key of zeros.
        let lengths: Vec<i64> = self.slots.iter().map(|s| s.prefix.max(1)).collect();
        let beyond = |lengths: &[i64], width: i64| {
            let lengths = Tensor::from_slice(lengths).to_device(self.device).unsqueeze(1);
            Tensor::arange(width, (Kind::Int64, self.device)).unsqueeze(0).ge_tensor(&lengths)
        };
        let needed = self.fixed_shapes || lengths.iter().any(|len| *len != width);
        let bias = || minus_infinity_where(&beyond(&lengths, width), Kind::Float).view([slots, 1, 1, width]);
        replace_values(&mut self.prefix_bias, needed.then(bias));
        let images: Vec<i64> = self.slots.iter().map(|s| s.images as i64).collect();
        let width = self.shape.images as i64;
        let needed = self.capture.is_some() && (self.fixed_shapes || images.iter().any(|v| *v != width));
        let valid = needed.then(|| beyond(&images, width).logical_not().view([slots, 1, 1, width]));
        replace_values(&mut self.image_valid, valid);
    }
}

/// Copies a tensor's values in place if the shape is the same, since recorded graphs read from the old memory; else replaces it.
fn replace_values(old: &mut Option<Tensor>, new: Option<Tensor>) {
    match (old.as_mut(), new) {
        (Some(old), Some(new)) if old.size() == new.size() => old.copy_(&new),
        (_, new) => *old = new,
    }
}

/// Pads `dim` with zeros at the end to `to` entries.
fn zero_pad(t: &Tensor, dim: usize, to: i64) -> Result<Tensor> {
    let mut size = t.size();
    if size[dim] >= to {
        return Ok(t.shallow_clone());
    }
    size[dim] = to - size[dim];
    Ok(Tensor::f_cat(&[t, &Tensor::f_zeros(size.as_slice(), (t.kind(), t.device()))?], dim as i64)?)
}

/// Rounds a capacity up on a GPU, where the rows of masks must start at multiples of 16 bytes.
fn align_tokens(tokens: usize, device: Device) -> usize {
    if device.is_cuda() { tokens.next_multiple_of(16) } else { tokens }
}
