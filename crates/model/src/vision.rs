//! The vision tower: patch embedding, blocks with window and full attention under 2-D rotary positions, merger.
//!
//! Frames of equal size are computed as one batch `[N, patches, d]`; a video of t frames is t frames here, as windows
//! and full attention never cross frames in this family. Knows no text.

use std::cell::RefCell;
use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use crate::ops::{linear, rms_norm, rotate, sdpa, split2};
use crate::window::FrameTables;
use crate::{GridThw, ModelError, Result, VisionConfig};

const NORM_EPS: f64 = 1e-6;

struct Block {
    norm1: Tensor,
    qkv: (Tensor, Tensor),
    proj: (Tensor, Tensor),
    norm2: Tensor,
    gate: (Tensor, Tensor),
    up: (Tensor, Tensor),
    down: (Tensor, Tensor),
    full: bool,
}

/// The tower; shares its tensors with the model's parameter list.
pub(crate) struct Vision {
    config: VisionConfig,
    patch: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    merge0: (Tensor, Tensor),
    merge2: (Tensor, Tensor),
    tables: RefCell<HashMap<(i64, i64), FrameTables>>,
}

/// Image sizes whose tables are kept.
const KEPT_TABLES: usize = 256;

impl Vision {
    pub(crate) fn new(config: &VisionConfig, get: &dyn Fn(&str) -> Result<Tensor>) -> Result<Self> {
        let pair = |name: &str| -> Result<(Tensor, Tensor)> {
            Ok((get(&format!("visual.{name}.weight"))?, get(&format!("visual.{name}.bias"))?))
        };
        let block = |b: usize| -> Result<Block> {
            Ok(Block {
                norm1: get(&format!("visual.blocks.{b}.norm1.weight"))?,
                qkv: pair(&format!("blocks.{b}.attn.qkv"))?,
                proj: pair(&format!("blocks.{b}.attn.proj"))?,
                norm2: get(&format!("visual.blocks.{b}.norm2.weight"))?,
                gate: pair(&format!("blocks.{b}.mlp.gate_proj"))?,
                up: pair(&format!("blocks.{b}.mlp.up_proj"))?,
                down: pair(&format!("blocks.{b}.mlp.down_proj"))?,
                full: config.fullatt_block_indexes.contains(&b),
            })
        };
        Ok(Self {
            config: config.clone(),
            patch: get("visual.patch_embed.proj.weight")?,
            blocks: (0..config.depth).map(block).collect::<Result<Vec<_>>>()?,
            norm: get("visual.merger.ln_q.weight")?,
            merge0: pair("merger.mlp.0")?,
            merge2: pair("merger.mlp.2")?,
            tables: RefCell::default(),
        })
    }

    /// Features of several images of any sizes: patches `[sum t*h*w, patch_len]` to `[sum merged, out_hidden]`, both
    /// in the processor's order.
    pub(crate) fn forward(&self, pixels: &Tensor, grids: &[GridThw]) -> Result<Tensor> {
        let c = &self.config;
        let m = c.spatial_merge_size;
        if let Some(grid) = grids.iter().find(|[t, h, w]| *t < 1 || *h < 1 || *w < 1 || h % m != 0 || w % m != 0) {
            return Err(ModelError::input(format!("image grid {grid:?} is not made of {m}x{m} blocks of patches")));
        }
        let rows: i64 = grids.iter().map(|[t, h, w]| t * h * w).sum();
        let size = pixels.size();
        if size != [rows, c.patch_len()] {
            return Err(ModelError::input(format!(
                "pixel values have shape {size:?}, the grids {grids:?} call for [{rows}, {}]",
                c.patch_len()
            )));
        }
        if grids.is_empty() {
            return Err(ModelError::input("no image was given to the vision tower"));
        }
        let (device, kind) = (self.patch.device(), self.patch.kind());
        let pixels = pixels.f_to_device(device)?.f_to_kind(kind)?;
        let [_, h0, w0] = grids[0];
        if grids.iter().all(|[_, h, w]| (*h, *w) == (h0, w0)) {
            let out = self.frames(&pixels.view([-1, h0 * w0, c.patch_len()]), h0, w0);
            return Ok(out.reshape([-1, c.out_hidden_size]));
        }
        self.mixed(&pixels, grids)
    }

    /// Images of unequal size: one batch per size, results put back in order.
    fn mixed(&self, pixels: &Tensor, grids: &[GridThw]) -> Result<Tensor> {
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
        let mut parts: Vec<Option<Tensor>> = grids.iter().map(|_| None).collect();
        for (h, w) in sizes {
            let members: Vec<usize> = (0..grids.len()).filter(|i| (grids[*i][1], grids[*i][2]) == (h, w)).collect();
            let slices: Vec<Tensor> =
                members.iter().map(|i| pixels.narrow(0, starts[*i], grids[*i][0] * h * w)).collect();
            let frames = Tensor::cat(&slices, 0).view([-1, h * w, c.patch_len()]);
            let out = self.frames(&frames, h, w);
            let counts: Vec<i64> = members.iter().map(|i| grids[*i][0]).collect();
            for (i, part) in members.iter().zip(out.f_split_with_sizes(counts.as_slice(), 0)?) {
                parts[*i] = Some(part.reshape([-1, c.out_hidden_size]));
            }
        }
        let parts: Vec<Tensor> = parts.into_iter().flatten().collect();
        Ok(Tensor::cat(&parts, 0))
    }

    /// Frames of one size `[N, h*w, patch_len]` to `[N, h*w/m^2, out_hidden]`.
    fn frames(&self, patches: &Tensor, h: i64, w: i64) -> Tensor {
        let c = &self.config;
        let tables = self.tables(h, w, patches.device());
        let weight = self.patch.view([c.hidden_size, c.patch_len()]);
        let mut x = linear(patches, &weight, None).index_select(1, &tables.permute);
        for block in &self.blocks {
            x = self.block(block, &x, &tables);
        }
        let merged = rms_norm(&x, &self.norm, NORM_EPS).view([x.size()[0], -1, c.hidden_size * c.merge_unit()]);
        let merged = linear(&merged, &self.merge0.0, Some(&self.merge0.1)).gelu("none");
        linear(&merged, &self.merge2.0, Some(&self.merge2.1)).index_select(1, &tables.restore)
    }

    fn block(&self, block: &Block, x: &Tensor, tables: &FrameTables) -> Tensor {
        let attended = self.attention(block, &rms_norm(x, &block.norm1, NORM_EPS), tables);
        let x = x + attended;
        let normed = rms_norm(&x, &block.norm2, NORM_EPS);
        let gate = linear(&normed, &block.gate.0, Some(&block.gate.1)).silu();
        let up = linear(&normed, &block.up.0, Some(&block.up.1));
        x + linear(&(gate * up), &block.down.0, Some(&block.down.1))
    }

    fn attention(&self, block: &Block, x: &Tensor, tables: &FrameTables) -> Tensor {
        let c = &self.config;
        let (size, heads) = (x.size(), c.num_heads);
        let (n, s, d) = (size[0], size[1], c.hidden_size / heads);
        let qkv = linear(x, &block.qkv.0, Some(&block.qkv.1)).view([n, s, 3, heads, d]);
        let kind = qkv.kind();
        let (cos, sin) = (tables.cos.view([s, 1, 1, d / 2]), tables.sin.view([s, 1, 1, d / 2]));
        let (qk, v) = split2(&qkv, 2, 2, 1);
        let (q, k) = split2(&rotate(&qk.to_kind(Kind::Float), &cos, &sin).to_kind(kind), 2, 1, 1);
        let part = |start: i64, count: i64, len: i64| {
            let cut = |t: &Tensor| {
                let t = if count * len == s { t.shallow_clone() } else { t.narrow(1, start, count * len) };
                t.reshape([n * count, len, heads, d]).transpose(1, 2)
            };
            sdpa(&cut(&q), &cut(&k), &cut(&v), None, false).transpose(1, 2).reshape([n, count * len, heads * d])
        };
        let out = if block.full || tables.single_window() {
            part(0, 1, s)
        } else {
            let mut start = 0;
            let mut parts = Vec::with_capacity(tables.windows.len());
            for (count, len) in &tables.windows {
                parts.push(part(start, *count, *len));
                start += count * len;
            }
            if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::cat(&parts, 1) }
        };
        linear(&out, &block.proj.0, Some(&block.proj.1))
    }

    fn tables(&self, h: i64, w: i64, device: Device) -> FrameTables {
        let mut tables = self.tables.borrow_mut();
        if tables.len() >= KEPT_TABLES && !tables.contains_key(&(h, w)) {
            tables.clear();
        }
        tables.entry((h, w)).or_insert_with(|| FrameTables::new(&self.config, h, w, device)).share()
    }
}
