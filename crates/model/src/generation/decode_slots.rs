//! Positions and cache offsets of the tokens of one decode step. As tensors, they let steps of equal shape run the same recorded work with
//! new values.

use tch::Tensor;

use crate::Result;

/// Inputs of one decode step as tensors on the device.
#[derive(Debug)]
pub(crate) struct StepTensors {
    /// Rotary positions of the fed tokens `[A]`.
    pub positions: Tensor,
    /// Fed rows `[A]`; `None`: all rows.
    pub rows: Option<Tensor>,
    /// Where the new keys and values are written.
    pub write: CacheWrite,
    /// Attended suffix length in tokens.
    pub used: i64,
    /// Additive mask `[R, 1, 1, used]` of the suffixes; `None` if all have full length.
    pub suffix_bias: Option<Tensor>,
}

/// Where new keys and values are stored.
#[derive(Debug)]
pub(crate) enum CacheWrite {
    /// All rows, at the same offset.
    Column(i64),
    /// Rows `[A]` and offsets `[A]`.
    Scatter(Tensor, Tensor),
}

/// Inputs of one decode step as plain numbers, one per fed row.
pub(crate) struct StepSlots {
    /// Rotary positions.
    pub positions: Vec<i64>,
    /// Cache rows, ascending.
    pub rows: Vec<i64>,
    /// Offsets in the suffixes of the rows.
    pub offsets: Vec<i64>,
}

impl StepTensors {
    /// Copies the values of another step of the same shape.
    pub(crate) fn copy_values_from(&mut self, other: &Self) -> Result<()> {
        self.positions.f_copy_(&other.positions)?;
        if let (Some(bias), Some(new)) = (&mut self.suffix_bias, &other.suffix_bias) {
            bias.f_copy_(new)?;
        }
        if let (CacheWrite::Scatter(rows, offsets), CacheWrite::Scatter(new_rows, new_offsets)) =
            (&mut self.write, &other.write)
        {
            rows.f_copy_(new_rows)?;
            offsets.f_copy_(new_offsets)?;
        }
        Ok(())
    }
}
