//! Attention of packed groups: prompts causally; each response token over the prompt of its group and over earlier tokens of its response.

use std::rc::Rc;

use tch::{Device, Kind, Tensor};
use unveil_torch_ext::{PackedLayout, packed_attention};

use crate::Result;
use crate::error::or_panic;

/// The attention of a batch `[B, L]` in which each group has a row, or all groups share one row.
#[derive(Debug, Clone)]
pub(crate) struct PackedAttention {
    layout: Rc<PackedLayout>,
    shared: bool,
}

impl PackedAttention {
    /// Creates the attention of groups with these lengths of a prompt and its responses. In a `shared` row, groups follow one another
    /// without padding; else each group has a row of `length` tokens.
    pub(crate) fn new(groups: &[(usize, Vec<usize>)], length: usize, shared: bool, device: Device) -> Result<Self> {
        let layout = match shared {
            true => PackedLayout::single_row(groups, device),
            false => PackedLayout::padded(groups, length, device)?,
        };
        Ok(Self { layout: Rc::new(layout), shared })
    }

    /// Returns whether groups share a row.
    pub(crate) fn is_shared(&self) -> bool {
        self.shared
    }

    /// Computes attention of `q [B, Hq, L, d]` over `k, v [B, Hkv, L, d]` with operands of dtype `operands`: `[B, L, Hq, d]`, 0 at padding.
    pub(crate) fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, operands: Kind) -> Tensor {
        or_panic(packed_attention(q, k, v, &self.layout, operands))
    }
}
