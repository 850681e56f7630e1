//! Keys and values of generation. A group's prefix is stored once; its n responses keep suffixes of their own.
//! Row r = group * n + index. Knows no sampling and no scheduling.

use tch::{Device, Kind, Tensor};

use crate::{ModelError, Result};

/// A prompt batch that has been run: keys and values per layer, and what predicts the first response token.
pub struct Prefill {
    /// Hidden state at each prompt's last token `[G, D]`.
    pub last_hidden: Tensor,
    /// Image tokens of each prompt.
    pub image_tokens: Vec<usize>,
    /// Per layer (K, V) `[G, Hkv, P, d]`, padded at the end.
    pub(crate) layers: Vec<(Tensor, Tensor)>,
    pub(crate) lengths: Vec<i64>,
    pub(crate) next: Vec<i64>,
    pub(crate) image_index: Tensor,
    pub(crate) image_valid: Tensor,
}

impl Prefill {
    /// Prompts in the batch.
    pub fn groups(&self) -> usize {
        self.lengths.len()
    }
}

/// What a decode step returns.
pub struct DecodeOut {
    /// Hidden states that predict the next token `[R, D]`.
    pub hidden: Tensor,
    /// Attention rows `[R, V]` (fp32) of the tokens just fed, if asked for.
    pub attention: Option<Tensor>,
}

pub(crate) struct LayerStore {
    pub prefix_k: Tensor,
    pub prefix_v: Tensor,
    pub suffix_k: Tensor,
    pub suffix_v: Tensor,
}

/// Where the tokens of one step go.
pub(crate) struct Place {
    /// Suffix length after this step (the longest row's).
    pub used: i64,
    /// Additive mask `[R, 1, 1, used]` where rows differ in length.
    pub bias: Option<Tensor>,
    /// Row and slot of each new token where rows differ in length.
    scatter: Option<(Tensor, Tensor)>,
}

/// Caches of G groups with n responses each.
pub struct GroupCache {
    n: usize,
    capacity: i64,
    layers: Vec<LayerStore>,
    prefix_lengths: Vec<i64>,
    next: Vec<i64>,
    lengths: Vec<i64>,
    image_tokens: Vec<usize>,
    pub(crate) image_index: Tensor,
    pub(crate) image_valid: Tensor,
    /// Additive mask `[G, 1, 1, P]`, fp32, where prefixes differ in length.
    pub(crate) prefix_bias: Option<Tensor>,
}

impl GroupCache {
    /// Caches for n responses of up to `max_new_tokens` behind each prompt of `prefill`.
    pub fn new(prefill: Prefill, n: usize, max_new_tokens: usize) -> Result<Self> {
        if n == 0 || max_new_tokens == 0 || prefill.layers.is_empty() {
            return Err(ModelError::input("a group cache needs at least one response of at least one token"));
        }
        let capacity = max_new_tokens as i64;
        let rows = (prefill.groups() * n) as i64;
        let mut layers = Vec::with_capacity(prefill.layers.len());
        for (k, v) in prefill.layers {
            let (suffix_k, suffix_v) = (empty_suffix(&k, rows, capacity)?, empty_suffix(&v, rows, capacity)?);
            layers.push(LayerStore { prefix_k: k, prefix_v: v, suffix_k, suffix_v });
        }
        let mut cache = Self {
            n,
            capacity,
            layers,
            prefix_lengths: prefill.lengths,
            next: prefill.next,
            lengths: vec![0; rows as usize],
            image_tokens: prefill.image_tokens,
            image_index: prefill.image_index,
            image_valid: prefill.image_valid,
            prefix_bias: None,
        };
        cache.refresh_bias();
        Ok(cache)
    }

    /// Groups held.
    pub fn groups(&self) -> usize {
        self.prefix_lengths.len()
    }

    /// Responses per group.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Groups times responses.
    pub fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// Response tokens fed so far, per row.
    pub fn lengths(&self) -> &[i64] {
        &self.lengths
    }

    /// Image tokens per group.
    pub fn image_tokens(&self) -> &[usize] {
        &self.image_tokens
    }

    /// Keeps the named groups, in the order given, and frees the rest.
    pub fn keep_groups(&mut self, keep: &[usize]) -> Result<()> {
        if let Some(bad) = keep.iter().find(|g| **g >= self.groups()) {
            return Err(ModelError::input(format!("group {bad} is not among the {} of the cache", self.groups())));
        }
        let device = self.image_index.device();
        let n = self.n;
        let rows: Vec<i64> = keep.iter().flat_map(|g| (g * n..(g + 1) * n).map(|r| r as i64)).collect();
        let groups: Vec<i64> = keep.iter().map(|g| *g as i64).collect();
        self.lengths = rows.iter().map(|r| self.lengths[*r as usize]).collect();
        let (rows, groups) =
            (Tensor::from_slice(&rows).to_device(device), Tensor::from_slice(&groups).to_device(device));
        let width = |lengths: &[i64], all: i64| lengths.iter().copied().max().unwrap_or(1).min(all);
        self.prefix_lengths = keep.iter().map(|g| self.prefix_lengths[*g]).collect();
        self.next = keep.iter().map(|g| self.next[*g]).collect();
        self.image_tokens = keep.iter().map(|g| self.image_tokens[*g]).collect();
        for layer in &mut self.layers {
            let p = width(&self.prefix_lengths, layer.prefix_k.size()[2]);
            layer.prefix_k = layer.prefix_k.narrow(2, 0, p).f_index_select(0, &groups)?;
            layer.prefix_v = layer.prefix_v.narrow(2, 0, p).f_index_select(0, &groups)?;
            layer.suffix_k = layer.suffix_k.f_index_select(0, &rows)?;
            layer.suffix_v = layer.suffix_v.f_index_select(0, &rows)?;
        }
        self.image_index = self.image_index.f_index_select(0, &groups)?;
        self.image_valid = self.image_valid.f_index_select(0, &groups)?;
        self.refresh_bias();
        Ok(())
    }

    /// Admits more groups behind those that are there.
    pub fn append(&mut self, prefill: Prefill) -> Result<()> {
        if prefill.layers.len() != self.layers.len() {
            return Err(ModelError::input("the prefill comes from a model with another number of layers"));
        }
        let added = (prefill.groups() * self.n) as i64;
        for (layer, (k, v)) in self.layers.iter_mut().zip(prefill.layers) {
            layer.suffix_k = Tensor::f_cat(&[&layer.suffix_k, &empty_suffix(&k, added, self.capacity)?], 0)?;
            layer.suffix_v = Tensor::f_cat(&[&layer.suffix_v, &empty_suffix(&v, added, self.capacity)?], 0)?;
            layer.prefix_k = join_padded(&layer.prefix_k, &k, 2)?;
            layer.prefix_v = join_padded(&layer.prefix_v, &v, 2)?;
        }
        self.image_index = join_padded(&self.image_index, &prefill.image_index, 1)?;
        self.image_valid = join_padded(&self.image_valid, &prefill.image_valid, 1)?;
        self.lengths.extend(std::iter::repeat_n(0, added as usize));
        self.prefix_lengths.extend(prefill.lengths);
        self.next.extend(prefill.next);
        self.image_tokens.extend(prefill.image_tokens);
        self.refresh_bias();
        Ok(())
    }

    /// Checks that every active row has room for one more token.
    pub(crate) fn check_room(&self, active: Option<&[bool]>) -> Result<()> {
        if active.is_some_and(|a| a.len() != self.rows()) {
            return Err(ModelError::input(format!("`active` must have one entry per row ({})", self.rows())));
        }
        let full = (0..self.rows()).find(|r| self.lengths[*r] >= self.capacity && active.is_none_or(|a| a[*r]));
        match full {
            Some(row) => {
                Err(ModelError::input(format!("row {row} already holds {} tokens, its capacity", self.capacity)))
            }
            None => Ok(()),
        }
    }

    /// Counts the step's token in for active rows.
    pub(crate) fn advance(&mut self, active: Option<&[bool]>) {
        for (row, length) in self.lengths.iter_mut().enumerate() {
            *length += i64::from(active.is_none_or(|a| a[row]));
        }
    }

    /// Positions of the tokens of this step `[3, R]`.
    pub(crate) fn positions(&self, device: Device) -> Tensor {
        let positions: Vec<i64> = self.lengths.iter().enumerate().map(|(r, len)| self.next[r / self.n] + len).collect();
        let rows = positions.len() as i64;
        Tensor::from_slice(&positions).to_device(device).unsqueeze(0).expand([3, rows], false)
    }

    /// Where the tokens of this step go.
    pub(crate) fn place(&self, device: Device) -> Place {
        let slots: Vec<i64> = self.lengths.iter().map(|len| (*len).min(self.capacity - 1)).collect();
        let used = slots.iter().copied().max().unwrap_or(0) + 1;
        if slots.iter().all(|s| s + 1 == used) {
            return Place { used, bias: None, scatter: None };
        }
        let rows = Tensor::arange(slots.len() as i64, (Kind::Int64, device));
        let slots = Tensor::from_slice(&slots).to_device(device);
        let ahead = Tensor::arange(used, (Kind::Int64, device)).unsqueeze(0).gt_tensor(&slots.unsqueeze(1));
        let bias = minus_infinity_where(&ahead).view([-1, 1, 1, used]);
        Place { used, bias: Some(bias), scatter: Some((rows, slots)) }
    }

    /// Stores keys and values `[R, Hkv, 1, d]` of this step.
    pub(crate) fn write(&mut self, layer: usize, place: &Place, k: &Tensor, v: &Tensor) {
        let store = &mut self.layers[layer];
        for (target, new) in [(&mut store.suffix_k, k), (&mut store.suffix_v, v)] {
            match &place.scatter {
                None => target.narrow(2, place.used - 1, 1).copy_(new),
                Some((rows, slots)) => {
                    let index = [Some(rows), None, Some(slots)];
                    let _ = target.index_put_(&index, &new.squeeze_dim(2), false);
                }
            }
        }
    }

    pub(crate) fn layer(&self, layer: usize) -> &LayerStore {
        &self.layers[layer]
    }

    fn refresh_bias(&mut self) {
        let width = self.layers.first().map_or(0, |l| l.prefix_k.size()[2]);
        self.prefix_bias = self.prefix_lengths.iter().any(|len| *len != width).then(|| {
            let device = self.image_index.device();
            let lengths = Tensor::from_slice(&self.prefix_lengths).to_device(device).unsqueeze(1);
            let beyond = Tensor::arange(width, (Kind::Int64, device)).unsqueeze(0).ge_tensor(&lengths);
            minus_infinity_where(&beyond).view([-1, 1, 1, width])
        });
    }
}

fn minus_infinity_where(mask: &Tensor) -> Tensor {
    Tensor::zeros(mask.size().as_slice(), (Kind::Float, mask.device())).masked_fill(mask, f64::NEG_INFINITY)
}

/// Room for `capacity` tokens in each of `rows` rows, like a prefix tensor `[G, Hkv, P, d]`.
fn empty_suffix(like: &Tensor, rows: i64, capacity: i64) -> Result<Tensor> {
    let size = like.size();
    Ok(Tensor::f_zeros([rows, size[1], capacity, size[3]], (like.kind(), like.device()))?)
}

/// Concatenates along dimension 0 after padding `dim` at the end with zeros to the wider of both.
fn join_padded(a: &Tensor, b: &Tensor, dim: i64) -> Result<Tensor> {
    let width = a.size()[dim as usize].max(b.size()[dim as usize]);
    let pad = |t: &Tensor| -> Result<Tensor> {
        let mut size = t.size();
        let short = width - size[dim as usize];
        if short == 0 {
            return Ok(t.shallow_clone());
        }
        size[dim as usize] = short;
        Ok(Tensor::f_cat(&[t, &Tensor::f_zeros(size.as_slice(), (t.kind(), t.device()))?], dim)?)
    };
    Ok(Tensor::f_cat(&[pad(a)?, pad(b)?], 0)?)
}
