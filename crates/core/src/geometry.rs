//! Boxes in original-image pixels and the grid of image tokens. Owns box validity, IoU and cell coverage.

use serde::{Deserialize, Serialize};

/// An axis-aligned box `[x1, y1, x2, y2]` in pixels of the original image, f32, `x2`/`y2` exclusive.
///
/// A `BBox` may hold any numbers, valid or not: boxes of a model are never repaired. Use [`BBox::fault`] to validate.
///
/// # Examples
/// ```
/// use unveil_core::{BBox, BoxFault};
///
/// let truth = BBox::from([0.0, 0.0, 10.0, 10.0]);
/// let predicted = BBox::from([5.0, 0.0, 15.0, 10.0]);
/// assert_eq!(predicted.intersection(&truth), 50.0);
/// assert!((predicted.iou(&truth) - 1.0 / 3.0).abs() < 1e-9);
///
/// // An invalid box is reported, and overlaps no other.
/// let inverted = BBox::from([9.0, 9.0, 1.0, 1.0]);
/// assert_eq!(inverted.fault(10.0, 10.0), Some(BoxFault::Inverted));
/// assert_eq!(inverted.iou(&truth), 0.0);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(from = "[f32; 4]", into = "[f32; 4]")]
pub struct BBox {
    /// Left edge.
    pub x1: f32,
    /// Top edge.
    pub y1: f32,
    /// Right edge (exclusive).
    pub x2: f32,
    /// Bottom edge (exclusive).
    pub y2: f32,
}

impl From<[f32; 4]> for BBox {
    fn from([x1, y1, x2, y2]: [f32; 4]) -> Self {
        Self { x1, y1, x2, y2 }
    }
}

impl From<BBox> for [f32; 4] {
    fn from(b: BBox) -> Self {
        [b.x1, b.y1, b.x2, b.y2]
    }
}

/// Reason why a box is invalid for an image of a given size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BoxFault {
    /// A coordinate is NaN or infinite.
    #[error("has a coordinate that is not finite")]
    NonFinite,
    /// `x1 > x2` or `y1 > y2`.
    #[error("is inverted")]
    Inverted,
    /// The width or height is zero.
    #[error("has no area")]
    Empty,
    /// Part of the box is outside the image.
    #[error("lies outside the image")]
    Outside,
}

impl BBox {
    /// Returns width times height in square pixels; 0 for inverted or non-finite boxes.
    pub fn area(&self) -> f64 {
        let w = f64::from(self.x2) - f64::from(self.x1);
        let h = f64::from(self.y2) - f64::from(self.y1);
        if w > 0.0 && h > 0.0 && w.is_finite() && h.is_finite() { w * h } else { 0.0 }
    }

    /// Returns the first reason why this box is invalid in an image of `width` x `height` pixels. Overhang of up to one pixel is allowed,
    /// so that the rounding of a codec does not invalidate a true box.
    pub fn fault(&self, width: f32, height: f32) -> Option<BoxFault> {
        let c = [self.x1, self.y1, self.x2, self.y2];
        if c.iter().any(|v| !v.is_finite()) {
            Some(BoxFault::NonFinite)
        } else if self.x1 > self.x2 || self.y1 > self.y2 {
            Some(BoxFault::Inverted)
        } else if self.x1 == self.x2 || self.y1 == self.y2 {
            Some(BoxFault::Empty)
        } else if self.x1 < -1.0 || self.y1 < -1.0 || self.x2 > width + 1.0 || self.y2 > height + 1.0 {
            Some(BoxFault::Outside)
        } else {
            None
        }
    }

    /// Returns the intersection over union in `[0, 1]`; 0 when either box has no area. Same definition as `torchvision.ops.box_iou`.
    pub fn iou(&self, other: &Self) -> f64 {
        let a = self.area();
        let b = other.area();
        if a == 0.0 || b == 0.0 {
            return 0.0;
        }
        let i = self.intersection(other);
        (i / (a + b - i)).clamp(0.0, 1.0)
    }

    /// Returns the generalised IoU in `[-1, 1]`, at most the IoU: `IoU - (C - U) / C` with C the area of the smallest enclosing box; -1
    /// when either box has no area. Source: Rezatofighi et al., arXiv 1902.09630; same as `torchvision.ops.generalized_box_iou`.
    pub fn giou(&self, other: &Self) -> f64 {
        let a = self.area();
        let b = other.area();
        if a == 0.0 || b == 0.0 {
            return -1.0;
        }
        let i = self.intersection(other);
        let union = a + b - i;
        let [w, h] = self.hull_sides(other);
        (i / union - (w * h - union) / (w * h)).clamp(-1.0, 1.0)
    }

    /// Returns the complete IoU in `[-1.5, 1]`, at most the IoU: it also penalises the distance of the centres and the difference of the
    /// aspect ratios; -1.5 when either box has no area. Source: Zheng et al., arXiv 1911.08287, equations 8 to 11; same as
    /// `torchvision.ops.complete_box_iou` with its epsilon of 1e-7.
    pub fn ciou(&self, other: &Self) -> f64 {
        const EPS: f64 = 1e-7;
        if self.area() == 0.0 || other.area() == 0.0 {
            return -1.5;
        }
        let iou = self.iou(other);
        let [w, h] = self.hull_sides(other);
        let [ax, ay, aw, ah] = self.centre_and_sides();
        let [bx, by, bw, bh] = other.centre_and_sides();
        let distance = ((ax - bx).powi(2) + (ay - by).powi(2)) / (w * w + h * h + EPS);
        let v = 4.0 / std::f64::consts::PI.powi(2) * ((bw / bh).atan() - (aw / ah).atan()).powi(2);
        let alpha = v / (1.0 - iou + v + EPS);
        (iou - distance - alpha * v).clamp(-1.5, 1.0)
    }

    /// Returns the sides of the smallest box that encloses both.
    fn hull_sides(&self, other: &Self) -> [f64; 2] {
        let span = |a1: f32, a2: f32, b1: f32, b2: f32| f64::from(a2.max(b2)) - f64::from(a1.min(b1));
        [span(self.x1, self.x2, other.x1, other.x2), span(self.y1, self.y2, other.y1, other.y2)]
    }

    fn centre_and_sides(&self) -> [f64; 4] {
        let [x1, y1, x2, y2] = <[f32; 4]>::from(*self).map(f64::from);
        [(x1 + x2) / 2.0, (y1 + y2) / 2.0, x2 - x1, y2 - y1]
    }

    /// Returns the area shared by the two boxes in square pixels.
    pub fn intersection(&self, other: &Self) -> f64 {
        let w = f64::from(self.x2.min(other.x2)) - f64::from(self.x1.max(other.x1));
        let h = f64::from(self.y2.min(other.y2)) - f64::from(self.y1.max(other.y1));
        if w > 0.0 && h > 0.0 { w * h } else { 0.0 }
    }

    /// Returns the box scaled by `sx`, `sy` (for example from original to resized pixels).
    pub fn scaled(&self, sx: f32, sy: f32) -> Self {
        Self { x1: self.x1 * sx, y1: self.y1 * sy, x2: self.x2 * sx, y2: self.y2 * sy }
    }
}

/// Grid of the merged image tokens of one image: `rows` x `cols` cells, row-major, covering the whole image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grid {
    /// Number of cells from top to bottom.
    pub rows: usize,
    /// Number of cells from left to right.
    pub cols: usize,
}

impl Grid {
    /// Returns the number of image tokens.
    pub fn tokens(&self) -> usize {
        self.rows * self.cols
    }

    /// Returns `M_j`, the fraction of cell `j` covered by the *union* of `boxes`: `rows * cols` values in `[0, 1]`, row-major.
    ///
    /// `width` and `height` are the size in pixels of the original image, in which the boxes are given. Only the part of a box inside the
    /// image counts.
    pub fn coverage(&self, boxes: &[BBox], width: f32, height: f32) -> Vec<f32> {
        let mut out = vec![0.0; self.tokens()];
        if boxes.is_empty() || !(width > 0.0 && height > 0.0) {
            return out;
        }
        let cw = f64::from(width) / self.cols as f64;
        let ch = f64::from(height) / self.rows as f64;
        let mut touched = vec![0_u8; out.len()];
        for b in boxes.iter().filter(|b| b.area() > 0.0) {
            let across = overlaps(f64::from(b.x1), f64::from(b.x2), cw, self.cols);
            let down = overlaps(f64::from(b.y1), f64::from(b.y2), ch, self.rows);
            for &(r, high) in &down {
                for &(c, wide) in &across {
                    let index = r * self.cols + c;
                    out[index] = (wide * high / (cw * ch)).clamp(0.0, 1.0) as f32;
                    touched[index] = touched[index].saturating_add(1);
                }
            }
        }
        // In cells touched by several boxes, overlaps must be counted once.
        for (index, _) in touched.iter().enumerate().filter(|(_, n)| **n > 1) {
            let r = index / self.cols;
            let c = index % self.cols;
            let cell = [c as f64 * cw, r as f64 * ch, (c + 1) as f64 * cw, (r + 1) as f64 * ch];
            out[index] = (union_in_cell(boxes, cell) / (cw * ch)).clamp(0.0, 1.0) as f32;
        }
        out
    }
}

/// Returns the cells of length `size` that `lo..hi` overlaps, with the length of each overlap.
fn overlaps(lo: f64, hi: f64, size: f64, cells: usize) -> Vec<(usize, f64)> {
    let first = ((lo / size).floor().max(0.0) as usize).min(cells);
    let last = ((hi / size).ceil().max(0.0) as usize).min(cells);
    let length = |i: usize| hi.min((i + 1) as f64 * size) - lo.max(i as f64 * size);
    (first..last).map(|i| (i, length(i))).filter(|(_, l)| *l > 0.0).collect()
}

/// Computes the area of the union of `boxes` inside `cell` by coordinate compression (exact up to rounding).
fn union_in_cell(boxes: &[BBox], cell: [f64; 4]) -> f64 {
    let clipped: Vec<[f64; 4]> = boxes
        .iter()
        .filter(|b| b.area() > 0.0)
        .map(|b| {
            [
                f64::from(b.x1).max(cell[0]),
                f64::from(b.y1).max(cell[1]),
                f64::from(b.x2).min(cell[2]),
                f64::from(b.y2).min(cell[3]),
            ]
        })
        .filter(|b| b[2] > b[0] && b[3] > b[1])
        .collect();
    let mut xs: Vec<f64> = clipped.iter().flat_map(|b| [b[0], b[2]]).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let mut area = 0.0;
    for w in xs.windows(2) {
        let mut spans: Vec<(f64, f64)> =
            clipped.iter().filter(|b| b[0] <= w[0] && b[2] >= w[1]).map(|b| (b[1], b[3])).collect();
        spans.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut covered = 0.0;
        let mut end = f64::NEG_INFINITY;
        for (lo, hi) in spans {
            covered += (hi - lo.max(end)).max(0.0);
            end = end.max(hi);
        }
        area += covered * (w[1] - w[0]);
    }
    area
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iou_by_hand() {
        let a = BBox::from([0.0, 0.0, 10.0, 10.0]);
        assert_eq!(a.iou(&a), 1.0);
        assert!((a.iou(&[5.0, 0.0, 15.0, 10.0].into()) - 50.0 / 150.0).abs() < 1e-12);
        assert_eq!(a.iou(&[10.0, 0.0, 20.0, 10.0].into()), 0.0);
        assert_eq!(a.iou(&[9.0, 9.0, 1.0, 1.0].into()), 0.0);
        assert_eq!(a.iou(&[f32::NAN, 0.0, 1.0, 1.0].into()), 0.0);
        assert_eq!(a.iou(&[0.0, 0.0, f32::INFINITY, 1.0].into()), 0.0);
    }

    #[test]
    fn faults() {
        let f = |b: [f32; 4]| BBox::from(b).fault(100.0, 50.0);
        assert_eq!(f([0.0, 0.0, 100.0, 50.0]), None);
        assert_eq!(f([1e6, 1e6, 0.0, 0.0]), Some(BoxFault::Inverted));
        assert_eq!(f([0.0, 0.0, f32::NAN, 1.0]), Some(BoxFault::NonFinite));
        assert_eq!(f([3.0, 0.0, 3.0, 1.0]), Some(BoxFault::Empty));
        assert_eq!(f([0.0, 0.0, 102.0, 50.0]), Some(BoxFault::Outside));
    }

    #[test]
    fn coverage_equals_the_union_in_each_cell() {
        let mut seed = 7_u64;
        let mut next = |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        for _ in 0..200 {
            let g = Grid { rows: 1 + next(9) as usize, cols: 1 + next(9) as usize };
            let boxes: Vec<BBox> = (0..next(5))
                .map(|_| {
                    let x = next(90) as f32 - 5.0;
                    let y = next(90) as f32 - 5.0;
                    [x, y, x + next(60) as f32 + 0.5, y + next(60) as f32 + 0.25].into()
                })
                .collect();
            let cw = 100.0 / g.cols as f64;
            let ch = 80.0 / g.rows as f64;
            for (index, m) in g.coverage(&boxes, 100.0, 80.0).into_iter().enumerate() {
                let r = (index / g.cols) as f64;
                let c = (index % g.cols) as f64;
                let expected = union_in_cell(&boxes, [c * cw, r * ch, (c + 1.0) * cw, (r + 1.0) * ch]) / (cw * ch);
                assert!((f64::from(m) - expected).abs() < 1e-6, "{boxes:?} {index}: {m} {expected}");
            }
        }
    }

    #[test]
    fn giou_and_ciou_by_hand() {
        let a = BBox::from([0.0, 0.0, 10.0, 10.0]);
        assert_eq!((a.giou(&a), a.ciou(&a)), (1.0, 1.0));
        // Ten apart: union 200, hull 300, centres 20 apart, diagonal^2 = 900 + 100.
        let b = BBox::from([20.0, 0.0, 30.0, 10.0]);
        assert!((a.giou(&b) + 100.0 / 300.0).abs() < 1e-12 && (a.ciou(&b) + 0.4).abs() < 1e-9);
        for degenerate in
            [[9.0, 9.0, 1.0, 1.0], [f32::NAN, 0.0, 1.0, 1.0], [0.0, 0.0, f32::INFINITY, 1.0], [3.0, 3.0, 3.0, 9.0]]
        {
            assert_eq!((a.giou(&degenerate.into()), a.ciou(&degenerate.into())), (-1.0, -1.5));
        }
    }

    #[test]
    fn coverage_counts_overlaps_once() {
        let g = Grid { rows: 2, cols: 2 };
        let whole: BBox = [0.0, 0.0, 20.0, 20.0].into();
        assert_eq!(g.coverage(&[whole, whole], 20.0, 20.0), vec![1.0; 4]);
        let m = g.coverage(&[[0.0, 0.0, 5.0, 10.0].into(), [0.0, 0.0, 10.0, 5.0].into()], 20.0, 20.0);
        assert!((m[0] - 0.75).abs() < 1e-6 && m[1..] == [0.0; 3]);
        let tiny = g.coverage(&[[1.0, 1.0, 2.0, 2.0].into()], 20.0, 20.0);
        assert!((tiny[0] - 0.01).abs() < 1e-6);
    }
}
