//! Keys and values of generation in fixed slots, one per group: the prefix is stored once, its n responses keep suffixes
//! of their own. Row r = slot * n + index. A slot that is free computes along harmlessly, so that shapes stay the same
//! from step to step. Keys and values are fp32 (see the decoder). Knows no sampling and no scheduling.

use tch::{Device, Kind, Tensor};

use crate::attention::{AttentionSet, pick};
use crate::graph::Graphs;
use crate::{ModelError, Result, TextConfig};

/// A prompt batch that has been run: keys and values per layer, and what predicts the first response token.
pub struct Prefill {
    /// Hidden state at each prompt's last token `[G, D]`.
    pub last_hidden: Tensor,
    /// Image tokens of each prompt.
    pub image_tokens: Vec<usize>,
    /// Per layer (K, V) `[G, Hkv, L, d]`, padded at the end.
    pub(crate) layers: Vec<(Tensor, Tensor)>,
    pub(crate) lengths: Vec<i64>,
    pub(crate) next: Vec<i64>,
    pub(crate) images: Vec<Vec<i64>>,
    /// Where each response's tokens stand within L, by group; empty after a plain prefill.
    pub(crate) responses: Vec<Vec<std::ops::Range<i64>>>,
}

impl Prefill {
    /// Prompts in the batch.
    pub fn groups(&self) -> usize {
        self.lengths.len()
    }
}

/// What a decode step returns.
pub struct DecodeOut {
    /// Hidden states that predict the next token `[R, D]`, in the order of the rows that were fed.
    pub hidden: Tensor,
    /// Attention rows `[R, V]` (fp32) of the tokens just fed, if the cache captures.
    pub attention: Option<Tensor>,
}

pub(crate) struct LayerStore {
    pub prefix_k: Tensor,
    pub prefix_v: Tensor,
    pub suffix_k: Tensor,
    pub suffix_v: Tensor,
    /// Where the layer's attention is captured.
    pub captured: Option<Captured>,
}

/// What capture needs of one layer.
pub(crate) struct Captured {
    /// Keys of the image tokens `[S, Hkv, V, d]`.
    pub image_k: Tensor,
    /// Heads that are read, none = all.
    pub heads: Option<Tensor>,
    /// The same as 1 for each head that is read.
    pub flags: Option<Vec<u8>>,
}

/// What one group of a cache is.
#[derive(Clone, Default)]
pub(crate) struct Slot {
    /// Prompt tokens; 0 = free.
    pub prefix: i64,
    /// Rotary position of the first response token.
    pub next: i64,
    /// Image tokens.
    pub images: usize,
}

/// How much a cache may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Groups at a time.
    pub slots: usize,
    /// Responses per group.
    pub n: usize,
    /// Longest prompt in tokens; grows when a longer one is admitted.
    pub prompt: usize,
    /// Longest response in tokens.
    pub response: usize,
    /// Most image tokens of a prompt; grows like `prompt`.
    pub images: usize,
}

/// Caches of some groups with n responses each.
pub struct GroupCache {
    shape: CacheShape,
    layers: Vec<LayerStore>,
    pub(crate) slots: Vec<Slot>,
    /// Tokens fed so far, by row.
    pub(crate) lengths: Vec<i64>,
    capture: Option<AttentionSet>,
    /// Which image tokens are real `[S, 1, 1, V]`, where slots differ in number.
    pub(crate) image_valid: Option<Tensor>,
    /// Additive mask `[S, 1, 1, P]` where prefixes differ in length.
    pub(crate) prefix_bias: Option<Tensor>,
    pub(crate) device: Device,
    /// Every step takes all rows, in shapes that repeat.
    steady: bool,
    /// Recorded steps.
    pub(crate) graphs: Graphs,
}

impl GroupCache {
    /// Empty caches. With `steady`, a step's shapes depend on the cache's shape and the suffix length in steps of 64 alone, at
    /// the price of computing rows that have ended along; on a GPU steps are recorded then and run again. Errors for a shape without room, or a set of heads that the model does not have.
    pub fn new(
        config: &TextConfig,
        shape: CacheShape,
        capture: Option<AttentionSet>,
        steady: bool,
        device: Device,
    ) -> Result<Self> {
        if shape.slots == 0 || shape.n == 0 || shape.response == 0 {
            return Err(ModelError::input("a group cache needs at least one response of at least one token"));
        }
        if let Some(set) = &capture {
            set.check(config)?;
        }
        let mut shape = shape;
        (shape.prompt, shape.response) = (aligned(shape.prompt, device), aligned(shape.response, device));
        let (s, rows) = (shape.slots as i64, (shape.slots * shape.n) as i64);
        let (heads, d) = (config.num_key_value_heads, config.head_dim);
        let room = |groups: i64, tokens: usize| -> Result<Tensor> {
            Ok(Tensor::f_zeros([groups, heads, tokens as i64, d], (Kind::Float, device))?)
        };
        let layer = |index: usize| -> Result<LayerStore> {
            let set = capture.as_ref().filter(|c| c.reads(index));
            let captured = |set: &AttentionSet| -> Result<Captured> {
                let image_k = Tensor::f_zeros([s, heads, shape.images as i64, d], (Kind::Float, device))?;
                let flags = set.flags(index, config.num_attention_heads);
                Ok(Captured { image_k, heads: set.heads(index, device), flags })
            };
            Ok(LayerStore {
                prefix_k: room(s, shape.prompt)?,
                prefix_v: room(s, shape.prompt)?,
                suffix_k: room(rows, shape.response)?,
                suffix_v: room(rows, shape.response)?,
                captured: set.map(captured).transpose()?,
            })
        };
        let mut cache = Self {
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            slots: vec![Slot::default(); shape.slots],
            lengths: vec![0; rows as usize],
            shape,
            capture,
            image_valid: None,
            prefix_bias: None,
            device,
            steady,
            graphs: Graphs::default(),
        };
        cache.refresh();
        Ok(cache)
    }

    /// Bytes of device memory that a cache of `shape` takes.
    pub fn bytes(config: &TextConfig, shape: &CacheShape) -> u64 {
        let token = config.num_hidden_layers * 2 * (config.num_key_value_heads * config.head_dim).max(0) as usize;
        let tokens = shape.slots * (shape.prompt + shape.n * shape.response);
        (token * tokens * Kind::Float.elt_size_in_bytes()) as u64
    }

    /// Sizes, as they have grown.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Responses per group.
    pub fn n(&self) -> usize {
        self.shape.n
    }

    /// Slots times responses.
    pub fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// Response tokens fed so far, per row.
    pub fn lengths(&self) -> &[i64] {
        &self.lengths
    }

    /// Image tokens of a slot's prompt.
    pub fn image_tokens(&self, slot: usize) -> usize {
        self.slots.get(slot).map_or(0, |s| s.images)
    }

    /// Whether every step takes all rows.
    pub fn steady(&self) -> bool {
        self.steady
    }

    /// Steps that ran as recorded graphs, and why the newest recording failed, if it did.
    pub fn graph_steps(&self) -> (u64, Option<&str>) {
        (self.graphs.replayed, self.graphs.fault())
    }

    /// Which attention is captured.
    pub fn capture(&self) -> Option<&AttentionSet> {
        self.capture.as_ref()
    }

    /// Puts the prompts of `prefill` into `slots`, in order. Where the prefill ran responses too, their keys and values go
    /// into the rows and count as fed. What was in the slots is overwritten.
    pub fn admit(&mut self, prefill: &Prefill, slots: &[usize]) -> Result<()> {
        if slots.len() != prefill.groups() || slots.iter().any(|s| *s >= self.shape.slots) {
            let (groups, all) = (prefill.groups(), self.shape.slots);
            return Err(ModelError::input(format!("{groups} prompts cannot go to slots {slots:?} of {all}")));
        }
        if prefill.layers.len() != self.layers.len() {
            return Err(ModelError::input("the prefill comes from a model with another number of layers"));
        }
        let longest = prefill.lengths.iter().copied().max().unwrap_or(0);
        let images = prefill.images.iter().map(Vec::len).max().unwrap_or(0);
        self.grow(longest, images as i64)?;
        for (g, &slot) in slots.iter().enumerate() {
            self.fill(prefill, g as i64, slot)?;
            self.slots[slot] =
                Slot { prefix: prefill.lengths[g], next: prefill.next[g], images: prefill.images[g].len() };
            let fed = prefill.responses.get(g);
            for r in 0..self.shape.n {
                let ran = fed.and_then(|f| f.get(r)).map_or(0, |range| range.end - range.start);
                self.lengths[slot * self.shape.n + r] = ran;
            }
        }
        self.refresh();
        Ok(())
    }

    /// Marks a slot as free.
    pub fn free(&mut self, slot: usize) {
        if let Some(s) = self.slots.get_mut(slot) {
            *s = Slot::default();
            self.lengths[slot * self.shape.n..(slot + 1) * self.shape.n].fill(0);
            self.refresh();
        }
    }

    /// Keeps the named slots, in the order given, and gives the others' memory back.
    pub fn keep(&mut self, keep: &[usize]) -> Result<()> {
        if let Some(bad) = keep.iter().find(|g| **g >= self.shape.slots) {
            return Err(ModelError::input(format!("slot {bad} is not among the {} of the cache", self.shape.slots)));
        }
        let n = self.shape.n;
        let rows: Vec<i64> = keep.iter().flat_map(|g| (g * n..(g + 1) * n).map(|r| r as i64)).collect();
        let groups: Vec<i64> = keep.iter().map(|g| *g as i64).collect();
        self.lengths = rows.iter().map(|r| self.lengths[*r as usize]).collect();
        self.slots = keep.iter().map(|g| self.slots[*g].clone()).collect();
        self.shape.slots = keep.len();
        let (rows, groups) =
            (Tensor::from_slice(&rows).to_device(self.device), Tensor::from_slice(&groups).to_device(self.device));
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
        self.refresh();
        Ok(())
    }

    fn fill(&mut self, prefill: &Prefill, g: i64, slot: usize) -> Result<()> {
        let (s, length) = (slot as i64, prefill.lengths[g as usize]);
        let first = s * self.shape.n as i64;
        let image = Tensor::from_slice(&prefill.images[g as usize]).to_device(self.device).unsqueeze(0);
        for (store, (k, v)) in self.layers.iter_mut().zip(&prefill.layers) {
            let (k, v) = (k.narrow(0, g, 1), v.narrow(0, g, 1));
            for (target, source) in [(&store.prefix_k, &k), (&store.prefix_v, &v)] {
                target.narrow(0, s, 1).narrow(2, 0, length).f_copy_(&source.narrow(2, 0, length))?;
            }
            for (r, range) in prefill.responses.get(g as usize).into_iter().flatten().enumerate() {
                let (row, count) = (first + r as i64, range.end - range.start);
                if count > self.shape.response as i64 {
                    return Err(ModelError::input(format!("a response of {count} tokens is longer than its row")));
                }
                for (target, source) in [(&store.suffix_k, &k), (&store.suffix_v, &v)] {
                    target.narrow(0, row, 1).narrow(2, 0, count).f_copy_(&source.narrow(2, range.start, count))?;
                }
            }
            if let Some(captured) = store.captured.as_ref().filter(|_| image.numel() > 0) {
                let keys = pick(&k, &image);
                captured.image_k.narrow(0, s, 1).narrow(2, 0, image.size()[1]).f_copy_(&keys)?;
            }
        }
        Ok(())
    }

    /// Makes room for longer prompts.
    fn grow(&mut self, prompt: i64, images: i64) -> Result<()> {
        let prompt = aligned(prompt as usize, self.device) as i64;
        if prompt > self.shape.prompt as i64 {
            for layer in &mut self.layers {
                layer.prefix_k = widen(&layer.prefix_k, 2, prompt)?;
                layer.prefix_v = widen(&layer.prefix_v, 2, prompt)?;
            }
            self.graphs.clear();
            self.shape.prompt = prompt as usize;
        }
        if images > self.shape.images as i64 {
            for layer in &mut self.layers {
                if let Some(captured) = &mut layer.captured {
                    captured.image_k = widen(&captured.image_k, 2, images)?;
                }
            }
            self.graphs.clear();
            self.shape.images = images as usize;
        }
        Ok(())
    }

    /// Makes room for more groups and longer responses; never less than there is.
    pub fn extend(&mut self, slots: usize, response: usize) -> Result<()> {
        let response = aligned(response, self.device).max(self.shape.response);
        let slots = slots.max(self.shape.slots);
        if (slots, response) == (self.shape.slots, self.shape.response) {
            return Ok(());
        }
        let rows = slots * self.shape.n;
        for layer in &mut self.layers {
            layer.prefix_k = widen(&layer.prefix_k, 0, slots as i64)?;
            layer.prefix_v = widen(&layer.prefix_v, 0, slots as i64)?;
            layer.suffix_k = widen(&widen(&layer.suffix_k, 2, response as i64)?, 0, rows as i64)?;
            layer.suffix_v = widen(&widen(&layer.suffix_v, 2, response as i64)?, 0, rows as i64)?;
            if let Some(captured) = &mut layer.captured {
                captured.image_k = widen(&captured.image_k, 0, slots as i64)?;
            }
        }
        self.graphs.clear();
        self.slots.resize(slots, Slot::default());
        self.lengths.resize(rows, 0);
        (self.shape.slots, self.shape.response) = (slots, response);
        self.refresh();
        Ok(())
    }

    /// Checks that every named row has room for one more token.
    pub(crate) fn check_room(&self, rows: &[usize]) -> Result<()> {
        let capacity = self.shape.response as i64;
        if let Some(bad) = rows.iter().find(|r| **r >= self.rows()) {
            return Err(ModelError::input(format!("row {bad} is not among the {} of the cache", self.rows())));
        }
        match rows.iter().find(|r| self.lengths[**r] >= capacity) {
            Some(row) => Err(ModelError::input(format!("row {row} already holds {capacity} tokens, its capacity"))),
            None => Ok(()),
        }
    }

    /// Counts the step's token in for the named rows.
    pub(crate) fn advance(&mut self, rows: &[usize]) {
        rows.iter().for_each(|r| self.lengths[*r] += 1);
    }

    pub(crate) fn layer(&self, layer: usize) -> &LayerStore {
        &self.layers[layer]
    }

    fn refresh(&mut self) {
        let (slots, width) = (self.slots.len() as i64, self.shape.prompt as i64);
        // A free slot sees one key of zeros.
        let lengths: Vec<i64> = self.slots.iter().map(|s| s.prefix.max(1)).collect();
        let beyond = |lengths: &[i64], width: i64| {
            let lengths = Tensor::from_slice(lengths).to_device(self.device).unsqueeze(1);
            Tensor::arange(width, (Kind::Int64, self.device)).unsqueeze(0).ge_tensor(&lengths)
        };
        let needed = self.steady || lengths.iter().any(|len| *len != width);
        let bias = needed.then(|| minus_infinity_where(&beyond(&lengths, width)).view([slots, 1, 1, width]));
        replace(&mut self.prefix_bias, bias);
        let images: Vec<i64> = self.slots.iter().map(|s| s.images as i64).collect();
        let width = self.shape.images as i64;
        let needed = self.capture.is_some() && (self.steady || images.iter().any(|v| *v != width));
        let valid = needed.then(|| beyond(&images, width).logical_not().view([slots, 1, 1, width]));
        replace(&mut self.image_valid, valid);
    }
}

/// Takes over a tensor's values in place where the shape is the same, since recorded work reads from there.
fn replace(old: &mut Option<Tensor>, new: Option<Tensor>) {
    match (old.as_mut(), new) {
        (Some(old), Some(new)) if old.size() == new.size() => old.copy_(&new),
        (_, new) => *old = new,
    }
}

/// Zeros at the end of `dim` until it has `to` entries.
fn widen(t: &Tensor, dim: usize, to: i64) -> Result<Tensor> {
    let mut size = t.size();
    if size[dim] >= to {
        return Ok(t.shallow_clone());
    }
    size[dim] = to - size[dim];
    Ok(Tensor::f_cat(&[t, &Tensor::f_zeros(size.as_slice(), (t.kind(), t.device()))?], dim as i64)?)
}

/// On a GPU the masks' rows must start at multiples of 16 bytes.
fn aligned(tokens: usize, device: Device) -> usize {
    if device.is_cuda() { tokens.next_multiple_of(16) } else { tokens }
}

pub(crate) fn minus_infinity_where(mask: &Tensor) -> Tensor {
    Tensor::zeros(mask.size().as_slice(), (Kind::Float, mask.device())).masked_fill(mask, f64::NEG_INFINITY)
}
