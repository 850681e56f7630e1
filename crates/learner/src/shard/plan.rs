//! Where parameters lie in flat buffers: blocks that are reduced and gathered as one, and the part of each that a rank owns. State
//! is keyed by parameter name; the plan is only how a rank holds it.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::error::{LearnerError, Result};

/// One parameter and its place in its block.
pub(crate) struct Slot {
    pub name: String,
    pub tensor: Tensor,
    pub shape: Vec<i64>,
    pub begin: i64,
    pub count: i64,
}

/// Parameters one behind another, filled up so that all shards are of one size.
pub(crate) struct Block {
    /// The decoder layer that they belong to; none: everything that belongs to no layer.
    pub layer: Option<usize>,
    pub slots: Vec<Slot>,
    /// Kind of the parameters; fp32 where there are several.
    pub kind: Kind,
    /// Numbers of the block, filling included.
    pub padded: i64,
    /// What this rank owns of the block.
    pub own: Range<i64>,
    /// Where that lies among all that this rank owns.
    pub at: i64,
}

/// A parameter's numbers that this rank owns.
pub(crate) struct Piece {
    /// Which parameter, counted over all blocks.
    pub slot: usize,
    /// Where they lie among all that this rank owns.
    pub own: Range<i64>,
    /// Whether the parameter has two dimensions or more.
    pub matrix: bool,
}

/// Numbers of a parameter on this rank.
pub(crate) struct Stretch {
    pub name: String,
    /// Shape of the parameter.
    pub shape: Vec<i64>,
    /// The first number, counted over the parameter row by row.
    pub begin: i64,
    /// The numbers, flat, where they are.
    pub numbers: Tensor,
}

/// All blocks.
pub(crate) struct Plan {
    pub blocks: Vec<Block>,
    /// Numbers that this rank owns, filling included.
    pub numel: i64,
    pub pieces: Vec<Piece>,
}

/// The layer of the decoder that a parameter belongs to.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

impl Plan {
    /// Divides `parameters` into `shards`; this rank owns `shard`. Undivided (`by_layer` false) they are one block in the given
    /// order.
    ///
    /// # Errors
    /// A parameter is given twice.
    pub fn new(parameters: &[(String, Tensor)], by_layer: bool, (shard, shards): (usize, usize)) -> Result<Self> {
        let mut blocks: Vec<Block> = Vec::new();
        for (name, tensor) in parameters {
            if blocks.iter().any(|b| b.slots.iter().any(|s| s.name == *name)) {
                return Err(LearnerError::Setting(format!("parameter `{name}` is given twice")));
            }
            let layer = layer_of(name).filter(|_| by_layer);
            let index = blocks.iter().position(|b| b.layer == layer).unwrap_or_else(|| {
                let kind = tensor.kind();
                blocks.push(Block { layer, slots: Vec::new(), kind, padded: 0, own: 0..0, at: 0 });
                blocks.len() - 1
            });
            let (block, count) = (&mut blocks[index], tensor.numel() as i64);
            let (begin, shape) = (block.padded, tensor.size());
            if tensor.kind() != block.kind {
                block.kind = Kind::Float;
            }
            block.slots.push(Slot { name: name.clone(), tensor: tensor.shallow_clone(), shape, begin, count });
            block.padded += count;
        }
        let (shard, shards) = (shard as i64, shards.max(1) as i64);
        let mut plan = Self { blocks, numel: 0, pieces: Vec::new() };
        let mut first = 0;
        for block in &mut plan.blocks {
            let size = (block.padded + shards - 1) / shards;
            block.padded = size * shards;
            (block.own, block.at) = (shard * size..(shard + 1) * size, plan.numel);
            for (i, s) in block.slots.iter().enumerate() {
                let (begin, end) = (s.begin.max(block.own.start), (s.begin + s.count).min(block.own.end));
                if begin < end {
                    let shift = block.at - block.own.start;
                    let own = begin + shift..end + shift;
                    plan.pieces.push(Piece { slot: first + i, own, matrix: s.shape.len() >= 2 });
                }
            }
            first += block.slots.len();
            plan.numel += size;
        }
        Ok(plan)
    }

    /// What this rank owns of the tensors that `of` gives for the parameters, flat, in `kind`.
    ///
    /// # Errors
    /// That of `of`, or a tensor that does not have its parameter's number of elements.
    pub fn owned(&self, kind: Kind, of: impl Fn(&Slot) -> Result<Tensor>) -> Result<Tensor> {
        tch::no_grad(|| {
            let part = |b: &Block| -> Result<Tensor> {
                Ok(b.join(kind, |s| of(s).map(Some))?.f_narrow(0, b.own.start, b.size())?)
            };
            Ok(Tensor::f_cat(&self.blocks.iter().map(part).collect::<Result<Vec<_>>>()?, 0)?)
        })
    }

    /// Part `part` of `parts` of what this rank owns, by parameter: of `flat`, or of the parameters themselves where they are undivided.
    ///
    /// # Errors
    /// A parameter is not contiguous.
    pub fn stretches(&self, flat: Option<&Tensor>, (part, parts): (usize, usize)) -> Result<Vec<Stretch>> {
        let (part, parts) = (part as i64, parts.max(1) as i64);
        let mut out = Vec::new();
        for block in &self.blocks {
            let of = |i: i64| block.own.start + block.size() * i / parts;
            let (low, high) = (of(part), of(part + 1));
            for s in &block.slots {
                let (begin, end) = (s.begin.max(low), (s.begin + s.count).min(high));
                if begin >= end {
                    continue;
                }
                let numbers = match flat {
                    Some(flat) => flat.f_narrow(0, block.at + begin - block.own.start, end - begin)?,
                    None => s.tensor.f_detach()?.f_view([-1])?.f_narrow(0, begin - s.begin, end - begin)?,
                };
                let (name, shape) = (s.name.clone(), s.shape.clone());
                out.push(Stretch { name, shape, begin: begin - s.begin, numbers });
            }
        }
        Ok(out)
    }

    /// Layers of the decoder, up to the last that has parameters here.
    pub fn layers(&self) -> usize {
        self.blocks.iter().filter_map(|b| b.layer).max().map_or(0, |l| l + 1)
    }

    /// All parameters, block by block.
    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.blocks.iter().flat_map(|b| &b.slots)
    }
}

impl Block {
    /// How many numbers of the block this rank owns.
    pub fn size(&self) -> i64 {
        self.own.end - self.own.start
    }

    /// The block of the parameters that `of` gives for each, flat, in `kind`.
    ///
    /// # Errors
    /// A tensor does not have its parameter's number of elements.
    pub fn join(&self, kind: Kind, of: impl Fn(&Slot) -> Result<Option<Tensor>>) -> Result<Tensor> {
        let (mut parts, mut end) = (Vec::with_capacity(self.slots.len() + 1), 0);
        let device = self.slots[0].tensor.device();
        for s in &self.slots {
            parts.push(match of(s)? {
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

    /// A parameter's part of the whole block, in its shape.
    pub fn part(&self, whole: &Tensor, s: &Slot) -> Result<Tensor> {
        Ok(whole.f_narrow(0, s.begin, s.count)?.f_view(s.shape.as_slice())?)
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
    fn shards_cover_every_number_once() {
        let named = parameters();
        for shards in [1, 2, 3, 4, 7] {
            let plans: Vec<Plan> = (0..shards).map(|r| Plan::new(&named, true, (r, shards)).unwrap()).collect();
            let layers: Vec<_> = plans[0].blocks.iter().map(|b| (b.layer, b.slots.len())).collect();
            assert_eq!(layers, [(None, 2), (Some(0), 2), (Some(10), 1)]);
            for (b, block) in plans[0].blocks.iter().enumerate() {
                let whole = block.join(Kind::Float, |s| Ok(Some(s.tensor.shallow_clone()))).unwrap();
                assert_eq!(whole.size(), [block.padded]);
                let own: Vec<Tensor> =
                    plans.iter().map(|p| whole.narrow(0, p.blocks[b].own.start, block.size())).collect();
                assert_eq!(Tensor::cat(&own, 0), whole);
                for s in &block.slots {
                    assert_eq!(block.part(&whole, s).unwrap(), s.tensor, "{}", s.name);
                }
            }
            let mut owned = vec![0; 5];
            for plan in &plans {
                assert_eq!(plan.numel, plans[0].numel);
                plan.pieces.iter().for_each(|p| owned[p.slot] += p.own.end - p.own.start);
                assert!(plan.pieces.iter().all(|p| p.own.end <= plan.numel));
            }
            let counts: Vec<i64> = plans[0].slots().map(|s| s.count).collect();
            assert_eq!(owned, counts);
        }
        let whole = Plan::new(&named, false, (0, 1)).unwrap();
        assert_eq!((whole.blocks.len(), whole.numel), (1, 20));
        assert!(whole.slots().map(|s| &s.name).eq(named.iter().map(|(n, _)| n)));
    }

    #[test]
    fn stretches_cover_every_number_once() {
        let named = parameters();
        for (shards, parts) in [(1, 1), (1, 3), (2, 1), (3, 2), (7, 2)] {
            let mut found: std::collections::BTreeMap<String, Vec<(i64, Vec<f32>)>> = Default::default();
            for (shard, part) in (0..shards).flat_map(|s| (0..parts).map(move |p| (s, p))) {
                let plan = Plan::new(&named, true, (shard, shards)).unwrap();
                let flat = plan.owned(Kind::Float, |s| Ok(s.tensor.shallow_clone())).unwrap();
                let flat = (shards > 1).then_some(&flat);
                for s in plan.stretches(flat, (part, parts)).unwrap() {
                    let own = found.entry(s.name).or_default();
                    own.push((s.begin, Vec::try_from(s.numbers).unwrap()));
                }
            }
            for (name, t) in &named {
                let own = found.get_mut(name).unwrap();
                own.sort_by_key(|(begin, _)| *begin);
                let joined: Vec<f32> = own.iter().flat_map(|(_, n)| n.clone()).collect();
                assert_eq!(joined, Vec::<f32>::try_from(t.view([-1])).unwrap(), "{name}, {shards} shards, {parts}");
                let mut end = 0;
                for (begin, n) in own {
                    assert_eq!(*begin, end);
                    end += n.len() as i64;
                }
            }
        }
    }

    #[test]
    fn a_name_is_there_once() {
        let mut named = parameters();
        named.push(("visual.x".into(), Tensor::from_slice(&[1.0f32])));
        assert!(Plan::new(&named, true, (0, 1)).is_err_and(|e| e.to_string().contains("`visual.x` is given twice")));
    }
}
