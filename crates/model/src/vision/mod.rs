//! The vision tower: patch embedding, blocks with windowed or full attention and 2-D rotary positions, mergers. Each family builds its
//! [`TowerWeights`].
//!
//! Frames of equal size are computed as one batch `[N, patches, d]`. A video of t frames counts as t frames, because attention never
//! crosses frames in these families.

mod window;

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use tch::{Device, Tensor};
use unveil_core::{Compute, GridThw};

use crate::layers::linear::Linear;
use crate::layers::ops::{activation_kind, layer_norm, linear, rms_norm, rotate, sdpa, split2};
use crate::training::tape::{Tape, Var};
use crate::vision::window::FrameTables;
use crate::{ModelError, Result, VisionConfig};

const NORM_EPS: f64 = 1e-6;

/// A norm over the hidden size.
#[derive(Debug)]
pub(crate) enum Norm {
    /// RMS norm: weight.
    Rms(Tensor),
    /// Layer norm: weight and bias.
    Layer(Tensor, Tensor),
}

impl Norm {
    fn apply(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Rms(weight) => rms_norm(x, weight, NORM_EPS),
            Self::Layer(weight, bias) => layer_norm(x, weight, bias, NORM_EPS),
        }
    }
}

/// The MLP of a block.
#[derive(Debug)]
pub(crate) enum Mlp {
    /// `down(silu(gate x) * up x)`
    Gated { gate: Linear, up: Linear, down: Linear },
    /// `fc2(gelu_tanh(fc1 x))`
    Plain { fc1: Linear, fc2: Linear },
}

impl Mlp {
    fn apply(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Gated { gate, up, down } => down.apply(&(gate.apply(x).silu() * up.apply(x))),
            Self::Plain { fc1, fc2 } => fc2.apply(&fc1.apply(x).gelu("tanh")),
        }
    }

    fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Gated { gate, up, down } => vec![gate, up, down],
            Self::Plain { fc1, fc2 } => vec![fc1, fc2],
        }
    }
}

/// One block of the tower.
#[derive(Debug)]
pub(crate) struct Block {
    pub norm1: Norm,
    pub qkv: Linear,
    pub proj: Linear,
    pub norm2: Norm,
    pub mlp: Mlp,
    /// Whether the block attends over the whole frame.
    pub full: bool,
}

/// Merges neighbouring patches into one image token of the decoder's width.
#[derive(Debug)]
pub(crate) struct PatchMerger {
    pub norm: Norm,
    /// Whether the norm is over the merged patches.
    pub norm_after_shuffle: bool,
    pub fc1: Linear,
    pub fc2: Linear,
}

impl PatchMerger {
    /// Maps `[N, patches, d]` in cell order to `[N, cells, out]`; `cell_width` is the width of the concatenated patches of a cell.
    fn apply(&self, x: &Tensor, cell_width: i64) -> Tensor {
        let joined = |t: &Tensor| t.reshape([t.size()[0], -1, cell_width]);
        let normed = if self.norm_after_shuffle { self.norm.apply(&joined(x)) } else { joined(&self.norm.apply(x)) };
        self.fc2.apply(&self.fc1.apply(&normed).gelu("none"))
    }
}

/// The tensors of the tower, assembled by the family. They are shared with the model's parameter list.
#[derive(Debug)]
pub(crate) struct TowerWeights {
    /// Patch embedding and its optional bias.
    pub patch: (Tensor, Option<Tensor>),
    /// Learned square grid of positions `[side^2, d]`.
    pub positions: Option<Tensor>,
    pub blocks: Vec<Block>,
    pub merger: PatchMerger,
    /// Indices of blocks whose features go to the first decoder layers, with their mergers.
    pub deepstack: Vec<(usize, PatchMerger)>,
}

/// The vision tower of a model.
#[derive(Debug)]
pub(crate) struct VisionTower {
    config: VisionConfig,
    tower: TowerWeights,
    tables: RefCell<HashMap<(i64, i64), FrameTables>>,
    /// Precision of the patch embedding and of attention; that of other products belongs to the layers.
    pub compute: Compute,
}

/// Number of image sizes whose tables are cached.
const MAX_CACHED_TABLES: usize = 256;

impl VisionTower {
    pub(crate) fn new(config: &VisionConfig, tower: TowerWeights) -> Self {
        Self { config: config.clone(), tower, tables: RefCell::default(), compute: Compute::default() }
    }

    /// Returns all linear layers, in order, without the patch embedding.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let mergers = self.tower.deepstack.iter().map(|(_, merger)| merger);
        let blocks = self.tower.blocks.iter().flat_map(|b| [&b.qkv, &b.proj].into_iter().chain(b.mlp.linears()));
        blocks.chain(std::iter::once(&self.tower.merger).chain(mergers).flat_map(|m| [&m.fc1, &m.fc2]))
    }

    /// Returns the width of a feature row: the decoder's width, once for the placeholder and once per DeepStack level.
    fn width(&self) -> i64 {
        self.config.out_hidden_size * (1 + self.tower.deepstack.len() as i64)
    }

    /// Maps the patches `[sum t*h*w, patch_len]` of images of any sizes to features `[sum merged, (1 + k) out_hidden]`, both in the
    /// processor's order: the features that replace placeholders, then those of each of the k DeepStack levels.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] if there is no image, or if a grid or the shape of the patches is invalid.
    pub(crate) fn forward<'a>(&'a self, tape: &mut Tape<'a>, pixels: &Tensor, grids: &[GridThw]) -> Result<Var> {
        let c = &self.config;
        for grid in grids {
            c.merged_tokens(*grid)?;
        }
        let rows: i64 = grids.iter().map(|[t, h, w]| t * h * w).sum();
        let size = pixels.size();
        if size != [rows, c.patch_len()] {
            return Err(ModelError::input(format!(
                "pixel values have shape {size:?}, but the grids {grids:?} require [{rows}, {}]",
                c.patch_len()
            )));
        }
        if grids.is_empty() {
            return Err(ModelError::input("the vision tower needs at least one image"));
        }
        let pixels =
            pixels.f_to_device(self.tower.patch.0.device())?.f_to_kind(activation_kind(self.tower.patch.0.kind()))?;
        let [_, h0, w0] = grids[0];
        if grids.iter().all(|[_, h, w]| (*h, *w) == (h0, w0)) {
            let out = self.run_frames(tape, pixels.view([-1, h0 * w0, c.patch_len()]), h0, w0);
            return Ok(tape.call1(&[&out], |t| t[0].reshape([-1, self.width()])));
        }
        self.run_mixed_sizes(tape, &pixels, grids)
    }

    /// Runs images of different sizes: one batch per size, with the results in the original order.
    fn run_mixed_sizes<'a>(&'a self, tape: &mut Tape<'a>, pixels: &Tensor, grids: &[GridThw]) -> Result<Var> {
        let c = &self.config;
        let mut sizes: Vec<(i64, i64)> = grids.iter().map(|[_, h, w]| (*h, *w)).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let starts: Vec<i64> = grids
            .iter()
            .scan(0, |at, [t, h, w]| {
                *at += t * h * w;
                Some(*at - t * h * w)
            })
            .collect();
        let mut parts: Vec<Option<Var>> = grids.iter().map(|_| None).collect();
        for (h, w) in sizes {
            let same_size: Vec<usize> = (0..grids.len()).filter(|i| (grids[*i][1], grids[*i][2]) == (h, w)).collect();
            let slices: Vec<Tensor> =
                same_size.iter().map(|i| pixels.narrow(0, starts[*i], grids[*i][0] * h * w)).collect();
            let out = self.run_frames(tape, Tensor::cat(&slices, 0).view([-1, h * w, c.patch_len()]), h, w);
            let counts: Vec<i64> = same_size.iter().map(|i| grids[*i][0]).collect();
            let split = move |t: &[Tensor]| {
                let each = t[0].split_with_sizes(counts.as_slice(), 0);
                each.into_iter().map(|part| part.reshape([-1, self.width()])).collect()
            };
            for (i, part) in same_size.iter().zip(tape.call(&[&out], split)) {
                parts[*i] = Some(part);
            }
        }
        let parts: Vec<&Var> = parts.iter().flatten().collect();
        Ok(tape.call1(&parts, |t| Tensor::cat(t, 0)))
    }

    /// Maps frames of one size `[N, h*w, patch_len]` to `[N, h*w/m^2, width]`, each block a segment of the tape.
    fn run_frames<'a>(&'a self, tape: &mut Tape<'a>, patches: Tensor, h: i64, w: i64) -> Var {
        let c = &self.config;
        let tower = &self.tower;
        let tables = Rc::new(self.tables(h, w, patches.device()));
        let embed_tables = tables.clone();
        let mut x = tape.call1(&[], move |_| self.embed(&patches, &embed_tables));
        let cell_width = c.hidden_size * c.merge_unit();
        let mut levels = Vec::with_capacity(tower.deepstack.len());
        for (index, block) in tower.blocks.iter().enumerate() {
            let block_tables = tables.clone();
            x = tape.call1(&[&x], move |t| {
                let x = &t[0] + self.attention(block, &block.norm1.apply(&t[0]), &block_tables);
                &x + block.mlp.apply(&block.norm2.apply(&x))
            });
            if let Some((_, merger)) = tower.deepstack.iter().find(|(b, _)| *b == index) {
                levels.push(tape.call1(&[&x], move |t| merger.apply(&t[0], cell_width)));
            }
        }
        let inputs: Vec<&Var> = std::iter::once(&x).chain(&levels).collect();
        tape.call1(&inputs, move |t| {
            let mut all = vec![tower.merger.apply(&t[0], cell_width)];
            all.extend(t[1..].iter().map(Tensor::shallow_clone));
            let all = if all.len() == 1 { all.swap_remove(0) } else { Tensor::cat(&all, -1) };
            all.index_select(1, &tables.restore)
        })
    }

    /// Computes patch embeddings with learned positions, in window order `[N, h*w, d]`.
    fn embed(&self, patches: &Tensor, tables: &FrameTables) -> Tensor {
        let c = &self.config;
        let tower = &self.tower;
        let weight = tower.patch.0.view([c.hidden_size, c.patch_len()]);
        let mut x = linear(patches, &weight, tower.patch.1.as_ref(), self.compute);
        if let (Some(grid), Some((index, weights))) = (&tower.positions, &tables.positions) {
            let taps = grid.index_select(0, index).view([-1, weights.size()[1], c.hidden_size]).to_kind(x.kind());
            x += (taps * weights.unsqueeze(-1)).sum_dim_intlist([1i64].as_slice(), false, x.kind());
        }
        x.index_select(1, &tables.permute)
    }

    fn attention(&self, block: &Block, x: &Tensor, tables: &FrameTables) -> Tensor {
        let c = &self.config;
        let heads = c.num_heads;
        let size = x.size();
        let n = size[0];
        let s = size[1];
        let d = c.hidden_size / heads;
        let qkv = block.qkv.apply(x).view([n, s, 3, heads, d]);
        let cos = tables.cos.view([s, 1, 1, d / 2]);
        let sin = tables.sin.view([s, 1, 1, d / 2]);
        let (qk, v) = split2(&qkv, 2, 2, 1);
        let (q, k) = split2(&rotate(&qk, &cos, &sin), 2, 1, 1);
        let attend = |start: i64, count: i64, len: i64| {
            let windows = |t: &Tensor| {
                let t = if count * len == s { t.shallow_clone() } else { t.narrow(1, start, count * len) };
                t.reshape([n * count, len, heads, d]).transpose(1, 2)
            };
            let out = sdpa(&windows(&q), &windows(&k), &windows(&v), None, false, self.compute);
            out.transpose(1, 2).reshape([n, count * len, heads * d])
        };
        let out = if block.full || tables.single_window() {
            attend(0, 1, s)
        } else {
            let mut start = 0;
            let mut parts = Vec::with_capacity(tables.windows.len());
            for (count, len) in &tables.windows {
                parts.push(attend(start, *count, *len));
                start += count * len;
            }
            if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::cat(&parts, 1) }
        };
        block.proj.apply(&out)
    }

    fn tables(&self, h: i64, w: i64, device: Device) -> FrameTables {
        let mut tables = self.tables.borrow_mut();
        if tables.len() >= MAX_CACHED_TABLES && !tables.contains_key(&(h, w)) {
            tables.clear();
        }
        tables.entry((h, w)).or_insert_with(|| FrameTables::new(&self.config, h, w, device)).shallow_clone()
    }
}
