//! Index and rotary tables of the vision tower, computed once per image size.
//!
//! Images are divided into windows of `cells x cells` merged tokens; windows at the right and bottom edges are smaller. The tower computes
//! in a token order in which windows of equal size are adjacent, so that window attention is one batched call per size (at most four).
//! The order inside a window does not affect the result.

use tch::{Device, Kind, Tensor};

use crate::VisionConfig;
use crate::config::VisionAttention;
use crate::layers::ops::inverse_frequencies;

/// Tables for frames of `h x w` patches.
#[derive(Debug)]
pub(crate) struct FrameTables {
    /// Patch order of the computation: `permute[i]` is the index of patch i in the processor's order. `[h*w]`
    pub permute: Tensor,
    /// Index in the computation's order of each merged token in the processor's order. `[h*w/m^2]`
    pub restore: Tensor,
    /// (number of windows, patches per window) in the computation's order.
    pub windows: Vec<(i64, i64)>,
    /// Half-dimension rotary cosines in the computation's order, fp32. `[h*w, d/2]`
    pub cos: Tensor,
    /// Half-dimension rotary sines, like `cos`.
    pub sin: Tensor,
    /// Interpolation of a learned position grid for each patch in the processor's order: indices `[h*w*4]` and fp32 weights `[h*w, 4]`.
    pub positions: Option<(Tensor, Tensor)>,
}

impl FrameTables {
    pub(crate) fn new(config: &VisionConfig, h: i64, w: i64, device: Device) -> Self {
        let m = config.spatial_merge_size;
        let unit = config.merge_unit();
        let rows = h / m;
        let cols = w / m;
        let side = match &config.attention {
            VisionAttention::Windows { window_size, .. } => window_size / m / config.patch_size,
            VisionAttention::Whole { .. } => rows.max(cols),
        };
        let (windows, order) = window_order(rows, cols, side);
        let permute: Vec<i64> = order.iter().flat_map(|cell| (0..unit).map(move |u| cell * unit + u)).collect();
        let mut restore = vec![0i64; order.len()];
        for (position, cell) in order.iter().enumerate() {
            restore[*cell as usize] = position as i64;
        }
        let freqs = inverse_frequencies(config.rope_theta, config.hidden_size / config.num_heads / 2);
        let mut angles = Vec::with_capacity(permute.len() * freqs.len() * 2);
        for patch in &permute {
            let (row, col) = patch_position(*patch, m, cols);
            angles.extend(freqs.iter().map(|f| row as f32 * f));
            angles.extend(freqs.iter().map(|f| col as f32 * f));
        }
        let angles =
            Tensor::from_slice(&angles).view([permute.len() as i64, 2 * freqs.len() as i64]).to_kind(Kind::Float);
        Self {
            permute: Tensor::from_slice(&permute).to_device(device),
            restore: Tensor::from_slice(&restore).to_device(device),
            windows: windows.into_iter().map(|(count, cells)| (count, cells * unit)).collect(),
            cos: angles.cos().to_device(device),
            sin: angles.sin().to_device(device),
            positions: match &config.attention {
                VisionAttention::Windows { .. } => None,
                VisionAttention::Whole { positions, .. } => {
                    let (index, weights) = interpolation(h, w, m, positions.isqrt());
                    let weights = Tensor::from_slice(&weights).view([-1, 4]);
                    Some((Tensor::from_slice(&index).to_device(device), weights.to_device(device)))
                }
            },
        }
    }

    /// Returns a copy that shares the tensors.
    pub(crate) fn shallow_clone(&self) -> Self {
        Self {
            permute: self.permute.shallow_clone(),
            restore: self.restore.shallow_clone(),
            windows: self.windows.clone(),
            cos: self.cos.shallow_clone(),
            sin: self.sin.shallow_clone(),
            positions: self.positions.as_ref().map(|(i, w)| (i.shallow_clone(), w.shallow_clone())),
        }
    }

    /// Returns whether one window covers the whole frame.
    pub(crate) fn single_window(&self) -> bool {
        matches!(self.windows.as_slice(), [(1, _)])
    }
}

/// Returns row and column of a patch. The processor orders patches cell by cell, row-major inside a cell; `cols` counts cells.
fn patch_position(patch: i64, m: i64, cols: i64) -> (i64, i64) {
    let cell = patch / (m * m);
    let inner = patch % (m * m);
    ((cell / cols) * m + inner / m, (cell % cols) * m + inner % m)
}

/// Returns the bilinear interpolation of a learned `side x side` grid at every patch; the corners of the grid are at the corner patches.
fn interpolation(h: i64, w: i64, m: i64, side: i64) -> (Vec<i64>, Vec<f32>) {
    let axis = |at: i64, length: i64| {
        let source = (at * (side - 1)) as f32 / (length - 1).max(1) as f32;
        let low = source.floor();
        let weight = source - low;
        [(low as i64, 1.0 - weight), ((low as i64 + 1).min(side - 1), weight)]
    };
    let mut index = Vec::new();
    let mut weights = Vec::new();
    for patch in 0..h * w {
        let (row, col) = patch_position(patch, m, w / m);
        for (r, a) in axis(row, h) {
            for (c, b) in axis(col, w) {
                index.push(r * side + c);
                weights.push(a * b);
            }
        }
    }
    (index, weights)
}

/// Divides a grid of merged cells into windows, ordered by size. Returns runs of (count, cells per window) and the order of the cells.
fn window_order(rows: i64, cols: i64, side: i64) -> (Vec<(i64, i64)>, Vec<i64>) {
    let mut windows: Vec<Vec<i64>> = Vec::new();
    for top in (0..rows).step_by(side as usize) {
        for left in (0..cols).step_by(side as usize) {
            let bottom = (top + side).min(rows);
            let right = (left + side).min(cols);
            windows.push((top..bottom).flat_map(|r| (left..right).map(move |c| r * cols + c)).collect());
        }
    }
    windows.sort_by_key(|w| std::cmp::Reverse(w.len()));
    let mut runs: Vec<(i64, i64)> = Vec::new();
    for window in &windows {
        let cells = window.len() as i64;
        match runs.last_mut() {
            Some((count, size)) if *size == cells => *count += 1,
            _ => runs.push((1, cells)),
        }
    }
    (runs, windows.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_every_cell_once() {
        for (rows, cols, side) in [(6, 6, 3), (7, 5, 3), (1, 9, 4), (2, 2, 4), (8, 6, 2)] {
            let (runs, order) = window_order(rows, cols, side);
            assert_eq!(runs.iter().map(|(n, c)| n * c).sum::<i64>(), rows * cols);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..rows * cols).collect::<Vec<_>>());
            assert!(runs.len() <= 4);
        }
    }
}
