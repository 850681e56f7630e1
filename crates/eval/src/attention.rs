//! Attention of an answer: the rows of the tokens that name a class, averaged and compared with the lesion.

use std::ops::Range;

use unveil_core::mention::overlapping_tokens;
use unveil_core::{Attention, BBox, Grid};

/// Attention of one answer to the lesion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LesionAttention {
    /// There is no lesion, or it fills the image.
    NotApplicable,
    /// The class is named, but the rows of its tokens are unknown.
    NoRows,
    /// The class is not named, so there is no attention to compare.
    Unnamed,
    /// Measures of the averaged rows of the tokens that name the class.
    Measured(AttentionMeasures),
}

/// Measures of one averaged attention row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionMeasures {
    /// The cell with most attention (the first of several) touches a true box: the pointing game of Zhang et al. 2018
    /// (arXiv 1608.00507) with half a cell of tolerance.
    pub hit: bool,
    /// Share of the attention inside the true boxes, in `[0, 1]`: the energy-based pointing game of Wang et al. 2020
    /// (Score-CAM, arXiv 1910.01279). A cell counts by the share that the union of the boxes covers.
    pub energy: f64,
    /// Share of cells that touch a true box: the hit rate of random pointing.
    pub hit_chance: f64,
    /// Share of the image that the true boxes cover: the energy of uniform attention.
    pub energy_chance: f64,
}

impl AttentionMeasures {
    /// Computes the measures of an averaged row over `grid`; boxes in pixels of an image of `size` = `[width, height]`.
    pub(crate) fn new(row: &[f64], grid: Grid, boxes: &[BBox], size: [u32; 2]) -> Self {
        let covered = grid.coverage(boxes, size[0] as f32, size[1] as f32);
        let cells = covered.len().max(1) as f64;
        let mut peak = 0;
        for (j, p) in row.iter().enumerate() {
            if *p > row[peak] {
                peak = j;
            }
        }
        Self {
            hit: covered.get(peak).is_some_and(|m| *m > 0.0),
            energy: row.iter().zip(&covered).map(|(p, m)| p * f64::from(*m)).sum(),
            hit_chance: covered.iter().filter(|m| **m > 0.0).count() as f64 / cells,
            energy_chance: covered.iter().map(|m| f64::from(*m)).sum::<f64>() / cells,
        }
    }
}

/// Averages the rows of the tokens that `mention` covers, each scaled to sum 1; `None` if there is no token, or a row is missing or not a
/// distribution over the grid.
pub(crate) fn mean_row(attention: &Attention, mention: &Range<usize>, spans: &[(usize, usize)]) -> Option<Vec<f64>> {
    let tokens = overlapping_tokens(mention, spans);
    let cells = attention.grid[0].checked_mul(attention.grid[1])?;
    if tokens.is_empty() || cells == 0 {
        return None;
    }
    let mut mean = vec![0.0; cells];
    for token in &tokens {
        let index = attention.tokens.iter().position(|t| t == token)?;
        let row = attention.rows.get(index).filter(|r| r.len() == cells)?;
        let total: f64 = row.iter().map(|p| f64::from(*p)).sum();
        if !(total > 0.0 && total.is_finite()) || row.iter().any(|p| *p < 0.0) {
            return None;
        }
        mean.iter_mut().zip(row).for_each(|(m, p)| *m += f64::from(*p) / total / tokens.len() as f64);
    }
    Some(mean)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid { rows: 2, cols: 2 };

    #[test]
    fn measures_match_by_hand() {
        let boxes = [BBox::from([0.0, 0.0, 5.0, 10.0])];
        let rows = |row: &[f64]| AttentionMeasures::new(row, GRID, &boxes, [20, 20]);
        let r = rows(&[0.4, 0.4, 0.1, 0.1]);
        assert_eq!((r.hit, r.energy, r.hit_chance, r.energy_chance), (true, 0.2, 0.25, 0.125));
        assert!(!rows(&[0.3, 0.4, 0.2, 0.1]).hit);
    }

    #[test]
    fn rows_of_a_mention_are_averaged() {
        let good = Attention { grid: [1, 2], tokens: vec![1, 2], rows: vec![vec![1.0, 0.0], vec![0.5, 0.5]] };
        let spans = [(0, 2), (2, 5), (5, 8), (8, 15)];
        assert_eq!(mean_row(&good, &(2..8), &spans), Some(vec![0.75, 0.25]));
        assert_eq!(mean_row(&good, &(20..22), &spans), None);
        for change in [
            (|a: &mut Attention| a.tokens[1] = 7) as fn(&mut Attention),
            |a| a.rows[0] = vec![1.0],
            |a| a.rows[0] = vec![0.0, 0.0],
            |a| a.rows[0] = vec![f32::NAN, 0.0],
            |a| a.rows[0] = vec![2.0, -1.0],
            |a| a.grid = [usize::MAX, 2],
        ] {
            let mut bad = good.clone();
            change(&mut bad);
            assert_eq!(mean_row(&bad, &(2..8), &spans), None, "{bad:?}");
        }
    }
}
