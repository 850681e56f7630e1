//! Layout of parameters in flat buffers: buckets that are reduced and gathered as one, and the shard of each that a rank owns. State
//! is keyed by parameter name; the layout only says how a rank holds it.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::error::{Result, TrainerError};

/// A parameter and its position in its bucket.
#[derive(Debug)]
pub(crate) struct ParameterSlot {
    pub name: String,
    pub tensor: Tensor,
    pub shape: Vec<i64>,
    /// First element within the bucket.
    pub begin: i64,
    /// Number of elements.
    pub count: i64,
}

/// Parameters one after another, padded so that all shards have the same size.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// The decoder layer of the parameters; `None` for everything outside the layers.
    pub layer: Option<usize>,
    pub slots: Vec<ParameterSlot>,
    /// Dtype of the parameters; fp32 if they have several.
    pub kind: Kind,
    /// Number of elements, padding included.
    pub padded: i64,
    /// The elements of the bucket that this rank owns.
    pub owned: Range<i64>,
    /// Position of these elements in the flat buffer of everything that this rank owns.
    pub offset: i64,
}

/// The elements of one parameter that this rank owns.
#[derive(Debug)]
pub(crate) struct OwnedRange {
    /// Index of the parameter, counted over all buckets.
    pub slot: usize,
    /// Their position in the flat buffer of everything that this rank owns.
    pub range: Range<i64>,
    /// Whether the parameter has two dimensions or more.
    pub matrix: bool,
}

/// Consecutive elements of a parameter on this rank.
#[derive(Debug)]
pub struct ParameterSlice {
    /// Name of the parameter.
    pub name: String,
    /// Shape of the whole parameter.
    pub shape: Vec<i64>,
    /// Index of the first element in the parameter, row-major.
    pub begin: i64,
    /// The elements, flat: a view of the memory that holds them.
    pub values: Tensor,
}

/// The layout of all parameters on this rank.
#[derive(Debug)]
pub(crate) struct ShardLayout {
    pub buckets: Vec<Bucket>,
    /// Number of elements that this rank owns, padding included.
    pub numel: i64,
    pub owned_ranges: Vec<OwnedRange>,
}

/// Returns the decoder layer that a parameter belongs to.
pub(crate) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

impl ShardLayout {
    /// Lays out `parameters` over `shards` shards; this rank owns `shard`. They form one bucket per layer, or, if `by_layer` is
    /// false, a single bucket in the given order.
    ///
    /// # Errors
    /// Returns [`TrainerError::Setting`] if a parameter is given twice.
    pub(crate) fn new(
        parameters: &[(String, Tensor)],
        by_layer: bool,
        (shard, shards): (usize, usize),
    ) -> Result<Self> {
        let mut buckets: Vec<Bucket> = Vec::new();
        for (name, tensor) in parameters {
            if buckets.iter().any(|b| b.slots.iter().any(|s| s.name == *name)) {
                return Err(TrainerError::Setting(format!("parameter `{name}` is given twice")));
            }
            let layer = layer_of(name).filter(|_| by_layer);
            let index = buckets.iter().position(|b| b.layer == layer).unwrap_or_else(|| {
                let kind = tensor.kind();
                buckets.push(Bucket { layer, slots: Vec::new(), kind, padded: 0, owned: 0..0, offset: 0 });
                buckets.len() - 1
            });
            let bucket = &mut buckets[index];
            let begin = bucket.padded;
            let count = tensor.numel() as i64;
            let shape = tensor.size();
            if tensor.kind() != bucket.kind {
                bucket.kind = Kind::Float;
            }
            bucket.slots.push(ParameterSlot {
                name: name.clone(),
                tensor: tensor.shallow_clone(),
                shape,
                begin,
                count,
            });
            bucket.padded += count;
        }
        let shard = shard as i64;
        let shards = shards.max(1) as i64;
        let mut layout = Self { buckets, numel: 0, owned_ranges: Vec::new() };
        let mut first_slot = 0;
        for bucket in &mut layout.buckets {
            let size = (bucket.padded + shards - 1) / shards;
            bucket.padded = size * shards;
            bucket.owned = shard * size..(shard + 1) * size;
            bucket.offset = layout.numel;
            for (i, s) in bucket.slots.iter().enumerate() {
                let begin = s.begin.max(bucket.owned.start);
                let end = (s.begin + s.count).min(bucket.owned.end);
                if begin < end {
                    let shift = bucket.offset - bucket.owned.start;
                    let range = begin + shift..end + shift;
                    layout.owned_ranges.push(OwnedRange { slot: first_slot + i, range, matrix: s.shape.len() >= 2 });
                }
            }
            first_slot += bucket.slots.len();
            layout.numel += size;
        }
        Ok(layout)
    }

    /// Returns the elements that this rank owns of the tensors that `tensor_of` gives for the parameters, flat, as dtype `kind`.
    ///
    /// # Errors
    /// Returns the error of `tensor_of`, or [`TrainerError::Torch`] if a tensor has not the number of elements of its parameter.
    pub(crate) fn owned_values(
        &self,
        kind: Kind,
        tensor_of: impl Fn(&ParameterSlot) -> Result<Tensor>,
    ) -> Result<Tensor> {
        tch::no_grad(|| {
            let shard = |b: &Bucket| -> Result<Tensor> {
                Ok(b.flatten(kind, |s| tensor_of(s).map(Some))?.f_narrow(0, b.owned.start, b.size())?)
            };
            Ok(Tensor::f_cat(&self.buckets.iter().map(shard).collect::<Result<Vec<_>>>()?, 0)?)
        })
    }

    /// Returns part `part` of `parts` of what this rank owns, as slices of parameters: views of `flat`, or of the parameters
    /// themselves where they are not sharded.
    ///
    /// # Errors
    /// Returns [`TrainerError::Torch`] if a parameter is not contiguous.
    pub(crate) fn owned_slices(
        &self,
        flat: Option<&Tensor>,
        (part, parts): (usize, usize),
    ) -> Result<Vec<ParameterSlice>> {
        let part = part as i64;
        let parts = parts.max(1) as i64;
        let mut out = Vec::new();
        for bucket in &self.buckets {
            let boundary = |i: i64| bucket.owned.start + bucket.size() * i / parts;
            let low = boundary(part);
            let high = boundary(part + 1);
            for s in &bucket.slots {
                let begin = s.begin.max(low);
                let end = (s.begin + s.count).min(high);
                if begin >= end {
                    continue;
                }
                let values = match flat {
                    Some(flat) => flat.f_narrow(0, bucket.offset + begin - bucket.owned.start, end - begin)?,
                    None => s.tensor.f_detach()?.f_view([-1])?.f_narrow(0, begin - s.begin, end - begin)?,
                };
                let name = s.name.clone();
                let shape = s.shape.clone();
                out.push(ParameterSlice { name, shape, begin: begin - s.begin, values });
            }
        }
        Ok(out)
    }

    /// Returns the number of decoder layers, up to the last one with parameters in this layout.
    pub(crate) fn layers(&self) -> usize {
        self.buckets.iter().filter_map(|b| b.layer).max().map_or(0, |l| l + 1)
    }

    /// Iterates over all parameters, bucket by bucket.
    pub(crate) fn slots(&self) -> impl Iterator<Item = &ParameterSlot> {
        self.buckets.iter().flat_map(|b| &b.slots)
    }
}

impl Bucket {
    /// Returns the number of elements of the bucket that this rank owns.
    pub(crate) fn size(&self) -> i64 {
        self.owned.end - self.owned.start
    }

    /// Concatenates the tensors that `tensor_of` gives for the parameters into the flat bucket, as dtype `kind`; zeros where it gives
    /// `None`.
    ///
    /// # Errors
    /// Returns the error of `tensor_of`, or [`TrainerError::Torch`] if a tensor has not the number of elements of its parameter.
    pub(crate) fn flatten(
        &self,
        kind: Kind,
        tensor_of: impl Fn(&ParameterSlot) -> Result<Option<Tensor>>,
    ) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(self.slots.len() + 1);
        let mut end = 0;
        let device = self.slots[0].tensor.device();
        for s in &self.slots {
            parts.push(match tensor_of(s)? {
                Some(t) => t.f_to_device(device)?.f_to_kind(kind)?.f_reshape([s.count])?,
                None => Tensor::f_zeros([s.count], (kind, device))?,
            });
            end += s.count;
        }
        if end < self.padded {
            parts.push(Tensor::f_zeros([self.padded - end], (kind, device))?);
        }
        Ok(Tensor::f_cat(&parts, 0)?)
    }

    /// Returns the view of one parameter, in its shape, of the whole flat bucket.
    pub(crate) fn view_of(&self, flat: &Tensor, s: &ParameterSlot) -> Result<Tensor> {
        Ok(flat.f_narrow(0, s.begin, s.count)?.f_view(s.shape.as_slice())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters() -> Vec<(String, Tensor)> {
        let t = |n: i64| Tensor::arange(n, (Kind::Float, tch::Device::Cpu));
        vec![
            ("model.embed_tokens.weight".into(), t(6).view([3, 2])),
            ("model.layers.0.a".into(), t(5)),
            ("model.layers.10.a".into(), t(4)),
            ("model.layers.0.b".into(), t(2).view([1, 2])),
            ("visual.x".into(), t(3)),
        ]
    }

    #[test]
    fn shards_cover_every_element_once() {
        let named = parameters();
        for shards in [1, 2, 3, 4, 7] {
            let layouts: Vec<ShardLayout> =
                (0..shards).map(|r| ShardLayout::new(&named, true, (r, shards)).unwrap()).collect();
            let layers: Vec<_> = layouts[0].buckets.iter().map(|b| (b.layer, b.slots.len())).collect();
            assert_eq!(layers, [(None, 2), (Some(0), 2), (Some(10), 1)]);
            for (b, bucket) in layouts[0].buckets.iter().enumerate() {
                let flat = bucket.flatten(Kind::Float, |s| Ok(Some(s.tensor.shallow_clone()))).unwrap();
                assert_eq!(flat.size(), [bucket.padded]);
                let owned: Vec<Tensor> =
                    layouts.iter().map(|l| flat.narrow(0, l.buckets[b].owned.start, bucket.size())).collect();
                assert_eq!(Tensor::cat(&owned, 0), flat);
                for s in &bucket.slots {
                    assert_eq!(bucket.view_of(&flat, s).unwrap(), s.tensor, "{}", s.name);
                }
            }
            let mut owned = vec![0; 5];
            for layout in &layouts {
                assert_eq!(layout.numel, layouts[0].numel);
                layout.owned_ranges.iter().for_each(|o| owned[o.slot] += o.range.end - o.range.start);
                assert!(layout.owned_ranges.iter().all(|o| o.range.end <= layout.numel));
            }
            let counts: Vec<i64> = layouts[0].slots().map(|s| s.count).collect();
            assert_eq!(owned, counts);
        }
        let single = ShardLayout::new(&named, false, (0, 1)).unwrap();
        assert_eq!((single.buckets.len(), single.numel), (1, 20));
        assert!(single.slots().map(|s| &s.name).eq(named.iter().map(|(n, _)| n)));
    }

    #[test]
    fn owned_slices_cover_every_element_once() {
        let named = parameters();
        for (shards, parts) in [(1, 1), (1, 3), (2, 1), (3, 2), (7, 2)] {
            let mut by_name: std::collections::BTreeMap<String, Vec<(i64, Vec<f32>)>> = Default::default();
            for (shard, part) in (0..shards).flat_map(|s| (0..parts).map(move |p| (s, p))) {
                let layout = ShardLayout::new(&named, true, (shard, shards)).unwrap();
                let flat = layout.owned_values(Kind::Float, |s| Ok(s.tensor.shallow_clone())).unwrap();
                let flat = (shards > 1).then_some(&flat);
                for s in layout.owned_slices(flat, (part, parts)).unwrap() {
                    let slices = by_name.entry(s.name).or_default();
                    slices.push((s.begin, Vec::try_from(s.values).unwrap()));
                }
            }
            for (name, t) in &named {
                let slices = by_name.get_mut(name).unwrap();
                slices.sort_by_key(|(begin, _)| *begin);
                let joined: Vec<f32> = slices.iter().flat_map(|(_, n)| n.clone()).collect();
                assert_eq!(joined, Vec::<f32>::try_from(t.view([-1])).unwrap(), "{name}, {shards} shards, {parts}");
                let mut end = 0;
                for (begin, n) in slices {
                    assert_eq!(*begin, end);
                    end += n.len() as i64;
                }
            }
        }
    }

    #[test]
    fn duplicate_parameter_names_are_rejected() {
        let mut named = parameters();
        named.push(("visual.x".into(), Tensor::from_slice(&[1.0f32])));
        let result = ShardLayout::new(&named, true, (0, 1));
        assert!(result.is_err_and(|e| e.to_string().contains("`visual.x` is given twice")));
    }
}
