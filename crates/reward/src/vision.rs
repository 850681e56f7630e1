//! Vision relevance: how much the tokens that name the abnormal class look at the abnormal region.
//!
//! Source: arXiv 2501.01377, reward `r_att`, in the form that cannot be won by repeating the class name; the printed form is
//! kept as [`VisionMode::PaperLiteral`].

use std::collections::BTreeMap;

use unveil_config::schema::VisionMode;
use unveil_core::{Attention, BBox, Component, Grid, MaskReason};

use crate::mention::{first_mention, tokens_of};

/// How far a row's sum may be from 1 before it is not a softmax over the image tokens.
const ROW_SUM_SLACK: f64 = 0.05;
/// Shares closer to 1 than this leave nothing to look away from.
const WHOLE_IMAGE_SLACK: f64 = 1e-6;

/// The abnormal region of one image: true boxes, and what they cover in any token grid.
#[derive(Debug)]
pub struct Region<'a> {
    boxes: &'a [BBox],
    image: [f32; 2],
    share: f64,
    coverage: BTreeMap<[usize; 2], Vec<f32>>,
}

impl<'a> Region<'a> {
    /// `boxes` in pixels of an image of `image` = `[width, height]`.
    pub fn new(boxes: &'a [BBox], image: [u32; 2]) -> Self {
        let image = image.map(|v| v as f32);
        let share = Grid { rows: 1, cols: 1 }.coverage(boxes, image[0], image[1]);
        Self { boxes, image, share: share.first().copied().unwrap_or(0.0).into(), coverage: BTreeMap::new() }
    }

    /// `a`: the share of the image that the union of the boxes covers.
    pub fn share(&self) -> f64 {
        self.share
    }

    /// There is something to look at, and something to look away from.
    pub fn is_applicable(&self) -> bool {
        self.share > 0.0 && self.share < 1.0 - WHOLE_IMAGE_SLACK
    }

    fn coverage(&mut self, grid: [usize; 2]) -> &[f32] {
        let (boxes, [w, h]) = (self.boxes, self.image);
        self.coverage.entry(grid).or_insert_with(|| Grid { rows: grid[0], cols: grid[1] }.coverage(boxes, w, h))
    }
}

/// Vision relevance of one answer.
///
/// N = tokens that overlap the first mention of one of `names`; M_j = share of cell j covered by the true boxes; a = mean of
/// M; p_ij = attention of token i, softmax over all image tokens; s = mean over N of sum_j M_j p_ij.
/// [`VisionMode::AllTokens`]: `clip((s - a) / (1 - a), 0, 1)`, range `[0, 1]`, 0 at chance.
/// [`VisionMode::PaperLiteral`]: softmax over the abnormal cells only, summed over N: identically |N|, range `[0, |N|]`.
///
/// No mention -> 0. Masked: no true box, the boxes cover the whole image, or no class name to look for (`NotApplicable`);
/// rows of the mention absent, misshapen, not finite, or no distribution (`NoAttention`).
///
/// Detail: `a`, and where the rows were read `s`, `lift` = s/a, `tokens` = |N|.
pub fn vision_relevance(
    text: &str,
    names: &[String],
    spans: &[(usize, usize)],
    attention: Option<&Attention>,
    region: &mut Region<'_>,
    mode: VisionMode,
) -> Component {
    if !region.is_applicable() || names.iter().all(|n| n.trim().is_empty()) {
        return Component::masked(MaskReason::NotApplicable);
    }
    let Some(mention) = first_mention(text, names) else {
        return Component::value(0.0).with("a", region.share());
    };
    let tokens = tokens_of(&mention, spans);
    let Some(rows) = attention.and_then(|a| rows_of(a, &tokens)) else {
        return Component::masked(MaskReason::NoAttention).with("a", region.share());
    };
    let grid = attention.map_or([0, 0], |a| a.grid);
    let m = region.coverage(grid);
    let a = m.iter().map(|&v| f64::from(v)).sum::<f64>() / m.len() as f64;
    let n = tokens.len() as f64;
    let inside = |row: &[f32]| {
        let (mass, total) = row
            .iter()
            .zip(m)
            .fold((0.0, 0.0), |(mass, total), (&p, &m)| (mass + f64::from(m) * f64::from(p), total + f64::from(p)));
        mass / total
    };
    let s = rows.iter().map(|row| inside(row)).sum::<f64>() / n;
    let value = match mode {
        VisionMode::AllTokens => ((s - a) / (1.0 - a)).clamp(0.0, 1.0),
        VisionMode::PaperLiteral => rows.iter().map(|row| literal(row, m)).sum(),
    };
    Component::value(value).with("s", s).with("a", a).with("lift", s / a).with("tokens", n)
}

/// Softmax restricted to the cells with M > 0, summed over them. It is 1 by construction; also where all mass is outside
/// and the ratio of what is left has vanished in f32.
fn literal(row: &[f32], m: &[f32]) -> f64 {
    let abnormal: Vec<f64> = row.iter().zip(m).filter(|(_, m)| **m > 0.0).map(|(&p, _)| f64::from(p)).collect();
    let total: f64 = abnormal.iter().sum();
    if total > 0.0 { abnormal.iter().map(|p| p / total).sum() } else { 1.0 }
}

/// The rows of `tokens`, in that order; `None` unless all are there, have the grid's shape, and are distributions.
fn rows_of<'a>(attention: &'a Attention, tokens: &[usize]) -> Option<Vec<&'a [f32]>> {
    let cells = attention.grid[0].checked_mul(attention.grid[1]).filter(|&c| c > 0)?;
    if tokens.is_empty() || attention.tokens.len() != attention.rows.len() {
        return None;
    }
    let is_distribution = |row: &[f32]| {
        row.iter().all(|p| p.is_finite() && *p >= 0.0)
            && (row.iter().map(|&p| f64::from(p)).sum::<f64>() - 1.0).abs() <= ROW_SUM_SLACK
    };
    let row = |token: &usize| {
        let at = attention.tokens.iter().position(|t| t == token)?;
        attention.rows.get(at).map(Vec::as_slice).filter(|r| r.len() == cells && is_distribution(r))
    };
    tokens.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // 4 x 4 cells of 10 pixels; text of four tokens: "[1]" " nod" "ule" " nodule".
    const SPANS: [(usize, usize); 4] = [(0, 3), (3, 7), (7, 10), (10, 17)];
    const TEXT: &str = "[1] nodule nodule";

    fn score(row: Vec<f32>, boxes: &[[f32; 4]], mode: VisionMode) -> Component {
        let boxes: Vec<BBox> = boxes.iter().map(|&b| b.into()).collect();
        let attention = Attention { grid: [4, 4], tokens: vec![0, 1, 2, 3], rows: vec![row; 4] };
        let mut region = Region::new(&boxes, [40, 40]);
        vision_relevance(TEXT, &["Nodule".into()], &SPANS, Some(&attention), &mut region, mode)
    }

    fn one(cell: usize) -> Vec<f32> {
        (0..16).map(|j| if j == cell { 1.0 } else { 0.0 }).collect()
    }

    #[test]
    fn uniform_is_zero_and_inside_is_one() {
        let b = [[10.0, 10.0, 20.0, 20.0]];
        let c = score(vec![1.0 / 16.0; 16], &b, VisionMode::AllTokens);
        assert!(c.value.unwrap() < 1e-9 && (c.detail["lift"] - 1.0).abs() < 1e-6);
        assert_eq!(score(one(5), &b, VisionMode::AllTokens).value, Some(1.0));
        assert_eq!(score(one(6), &b, VisionMode::AllTokens).value, Some(0.0));
    }

    #[test]
    fn literal_is_the_number_of_tokens() {
        let b = [[10.0, 10.0, 30.0, 20.0]];
        for row in [one(5), one(0), vec![1.0 / 16.0; 16]] {
            let v = score(row, &b, VisionMode::PaperLiteral).value.unwrap();
            assert!((v - 2.0).abs() < 1e-9, "{v}");
        }
    }

    #[test]
    fn a_box_smaller_than_a_cell() {
        let v = score(one(0), &[[1.0, 1.0, 2.0, 2.0]], VisionMode::AllTokens).value.unwrap();
        assert!(v > 0.0 && v.is_finite(), "{v}");
    }

    #[test]
    fn not_applicable() {
        for boxes in [vec![], vec![[0.0, 0.0, 40.0, 40.0]]] {
            let c = score(one(0), &boxes, VisionMode::AllTokens);
            assert_eq!(c.reason, Some(MaskReason::NotApplicable));
        }
    }

    #[test]
    fn no_mention_is_zero_even_without_attention() {
        let boxes = [BBox::from([0.0, 0.0, 5.0, 5.0])];
        let mut region = Region::new(&boxes, [40, 40]);
        let c = vision_relevance("[1] mass", &["nodule".into()], &[], None, &mut region, VisionMode::AllTokens);
        assert_eq!(c.value, Some(0.0));
    }

    #[test]
    fn attention_that_does_not_hold_together_is_masked() {
        let good = Attention { grid: [4, 4], tokens: vec![0, 1, 2, 3], rows: vec![one(0); 4] };
        let mut cases = vec![None];
        for change in [
            (|a: &mut Attention| a.grid = [4, 5]) as fn(&mut Attention),
            |a| a.grid = [usize::MAX, usize::MAX],
            |a| a.grid = [0, 0],
            |a| a.tokens[1] = 9,
            |a| {
                a.rows.pop();
            },
            |a| a.rows[1][0] = f32::NAN,
            |a| a.rows[2][3] = f32::INFINITY,
            |a| a.rows[2][3] = -1.0,
            |a| a.rows[2][3] = 1e8,
        ] {
            let mut a = good.clone();
            change(&mut a);
            cases.push(Some(a));
        }
        let boxes = [BBox::from([0.0, 0.0, 5.0, 5.0])];
        for a in cases {
            let mut region = Region::new(&boxes, [40, 40]);
            let c = vision_relevance(TEXT, &["nodule".into()], &SPANS, a.as_ref(), &mut region, VisionMode::AllTokens);
            assert_eq!(c.reason, Some(MaskReason::NoAttention), "{a:?}");
        }
        let mut region = Region::new(&boxes, [40, 40]);
        let c = vision_relevance(TEXT, &["nodule".into()], &[], Some(&good), &mut region, VisionMode::AllTokens);
        assert_eq!(c.reason, Some(MaskReason::NoAttention), "no spans");
    }
}
