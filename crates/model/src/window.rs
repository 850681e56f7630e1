//! Index and rotary tables of the vision tower for one image size. Pure bookkeeping, computed once per size.
//!
//! Images are cut into windows of `cells x cells` merged tokens; at the right and bottom edge windows are smaller.
//! The tower computes in a token order in which windows of equal size stand together, so that window attention is
//! one batched call per size (at most four). Any order inside a window gives the same result.

use tch::{Device, Kind, Tensor};

use crate::VisionConfig;
use crate::config::Reach;
use crate::ops::inverse_frequencies;

/// Tables for frames of `h x w` patches.
pub(crate) struct FrameTables {
    /// Patch order of the computation: `permute[i]` is the processor's index of patch i. `[h*w]`
    pub permute: Tensor,
    /// Where each merged token of the processor's order stands in the computation's order. `[h*w/m^2]`
    pub restore: Tensor,
    /// (number of windows, patches per window) in the order of computation.
    pub windows: Vec<(i64, i64)>,
    /// Half-dimension rotary tables in the order of computation, fp32. `[h*w, d/2]`
    pub cos: Tensor,
    /// See `cos`.
    pub sin: Tensor,
    /// Where each patch (in the processor's order) reads a learned position grid, and with which weights, fp32:
    /// `[h*w*4]` and `[h*w, 4]`.
    pub positions: Option<(Tensor, Tensor)>,
}

impl FrameTables {
    pub(crate) fn new(config: &VisionConfig, h: i64, w: i64, device: Device) -> Self {
        let m = config.spatial_merge_size;
        let unit = config.merge_unit();
        let (rows, cols) = (h / m, w / m);
        let side = match &config.reach {
            Reach::Windows { window_size, .. } => window_size / m / config.patch_size,
            Reach::Whole { .. } => rows.max(cols),
        };
        let (windows, order) = window_order(rows, cols, side);
        let permute: Vec<i64> = order.iter().flat_map(|cell| (0..unit).map(move |u| cell * unit + u)).collect();
        let mut restore = vec![0i64; order.len()];
        for (place, cell) in order.iter().enumerate() {
            restore[*cell as usize] = place as i64;
        }
        let freqs = inverse_frequencies(config.rope_theta, config.hidden_size / config.num_heads / 2);
        let mut angles = Vec::with_capacity(permute.len() * freqs.len() * 2);
        for patch in &permute {
            let (row, col) = place(*patch, m, cols);
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
            positions: match &config.reach {
                Reach::Windows { .. } => None,
                Reach::Whole { positions, .. } => {
                    let (index, weights) = interpolation(h, w, m, positions.isqrt());
                    let weights = Tensor::from_slice(&weights).view([-1, 4]);
                    Some((Tensor::from_slice(&index).to_device(device), weights.to_device(device)))
                }
            },
        }
    }

    /// Another handle on the same tables.
    pub(crate) fn share(&self) -> Self {
        Self {
            permute: self.permute.shallow_clone(),
            restore: self.restore.shallow_clone(),
            windows: self.windows.clone(),
            cos: self.cos.shallow_clone(),
            sin: self.sin.shallow_clone(),
            positions: self.positions.as_ref().map(|(i, w)| (i.shallow_clone(), w.shallow_clone())),
        }
    }

    /// Whether one window covers the whole frame.
    pub(crate) fn single_window(&self) -> bool {
        matches!(self.windows.as_slice(), [(1, _)])
    }
}

/// Row and column of a patch. The processor orders patches cell by cell, row-major inside a cell; `cols` counts cells.
fn place(patch: i64, m: i64, cols: i64) -> (i64, i64) {
    let (cell, inner) = (patch / (m * m), patch % (m * m));
    ((cell / cols) * m + inner / m, (cell % cols) * m + inner % m)
}

/// Bilinear taps of every patch into a learned grid of `side x side` whose corners lie on the image's corner patches.
fn interpolation(h: i64, w: i64, m: i64, side: i64) -> (Vec<i64>, Vec<f32>) {
    let axis = |at: i64, length: i64| {
        let source = (at * (side - 1)) as f32 / (length - 1).max(1) as f32;
        let low = source.floor();
        let share = source - low;
        [(low as i64, 1.0 - share), ((low as i64 + 1).min(side - 1), share)]
    };
    let (mut index, mut weights) = (Vec::new(), Vec::new());
    for patch in 0..h * w {
        let (row, col) = place(patch, m, w / m);
        for (r, a) in axis(row, h) {
            for (c, b) in axis(col, w) {
                index.push(r * side + c);
                weights.push(a * b);
            }
        }
    }
    (index, weights)
}

/// Windows of a grid of merged cells, equal sizes together: (count, cells per window) runs and the cell order.
fn window_order(rows: i64, cols: i64, side: i64) -> (Vec<(i64, i64)>, Vec<i64>) {
    let mut windows: Vec<Vec<i64>> = Vec::new();
    for top in (0..rows).step_by(side as usize) {
        for left in (0..cols).step_by(side as usize) {
            let (bottom, right) = ((top + side).min(rows), (left + side).min(cols));
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
