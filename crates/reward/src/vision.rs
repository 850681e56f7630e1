//! Vision relevance: how much the tokens that name the abnormal class attend to the abnormal region.
//!
//! Source: arXiv 2501.01377, reward `r_att`, in a form that repeating the class name does not raise; the printed form is
//! available as [`VisionMode::PaperLiteral`].

use std::collections::BTreeMap;

use unveil_config::schema::{self, VisionMode};
use unveil_core::mention::{find_mention, overlapping_tokens};
use unveil_core::{AnswerReader, Attention, BBox, Component, Grid, MaskReason};

use crate::rows::{RowSums, entropy, row_sums};
use crate::sinks::{is_wordless, sinks, without_sinks};

/// Largest deviation of a row's sum from 1; beyond it, the row is not a softmax over the image tokens.
const ROW_SUM_SLACK: f64 = 0.05;
/// Boxes whose share of the image is closer to 1 than this cover the whole image.
const WHOLE_IMAGE_SLACK: f64 = 1e-6;

/// The abnormal region of one image: the true boxes and the cells that they cover in any token grid.
#[derive(Debug)]
pub struct Region<'a> {
    boxes: &'a [BBox],
    image: [f32; 2],
    share: f64,
    coverage: BTreeMap<[usize; 2], Vec<f32>>,
}

impl<'a> Region<'a> {
    /// Creates the region of `boxes` in pixels of an image of size `image` = `[width, height]`.
    pub fn new(boxes: &'a [BBox], image: [u32; 2]) -> Self {
        let image = image.map(|v| v as f32);
        let share = Grid { rows: 1, cols: 1 }.coverage(boxes, image[0], image[1]);
        Self { boxes, image, share: share.first().copied().unwrap_or(0.0).into(), coverage: BTreeMap::new() }
    }

    /// Returns `a`, the share of the image that the union of the boxes covers.
    pub fn share(&self) -> f64 {
        self.share
    }

    /// Whether vision relevance is defined: the boxes cover some of the image, but not all of it.
    pub fn is_applicable(&self) -> bool {
        self.share > 0.0 && self.share < 1.0 - WHOLE_IMAGE_SLACK
    }

    /// Returns the covered share of each cell of `grid`, row-major.
    fn coverage(&mut self, grid: [usize; 2]) -> &[f32] {
        let (boxes, [w, h]) = (self.boxes, self.image);
        self.coverage.entry(grid).or_insert_with(|| Grid { rows: grid[0], cols: grid[1] }.coverage(boxes, w, h))
    }
}

/// Rule by which attention rows are scored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VisionRule {
    /// Form of the reward.
    pub mode: VisionMode,
    /// Factor of the sink filter: cells that draw this multiple of their fair share from every wordless token are left out ([`sinks`]).
    /// With 0 no cell is left out.
    pub sink: f64,
}

impl VisionRule {
    /// Reads the rule from the configuration.
    pub fn new(config: &schema::VisionRelevance) -> Self {
        Self { mode: config.mode, sink: config.sink }
    }
}

/// Scores vision relevance as [`score_vision_relevance`], without a sink filter.
pub fn score_vision_relevance_unfiltered(
    response: AttendedResponse<'_>,
    names: &[String],
    region: &mut Region<'_>,
    mode: VisionMode,
) -> Component {
    score_vision_relevance(response, names, region, VisionRule { mode, sink: 0.0 })
}

/// A response and the attention of its tokens.
#[derive(Debug, Clone, Copy)]
pub struct AttendedResponse<'a> {
    /// The whole response.
    pub text: &'a str,
    /// Reader that finds the answer in the text.
    pub reader: &'a AnswerReader,
    /// Bytes of the text that each token covers.
    pub spans: &'a [(usize, usize)],
    /// Attention rows, if they were captured.
    pub attention: Option<&'a Attention>,
}

/// Returns the tokens whose rows [`score_vision_relevance`] may read, the most important first: those that name the class (`named`) and,
/// with a sink filter, the wordless ones. No other row has to be sent; the list is empty if no token names the class.
pub fn rows_needed(named: Vec<usize>, text: &str, spans: &[(usize, usize)], rule: VisionRule) -> Vec<usize> {
    let mut tokens = named;
    if rule.sink > 0.0 && !tokens.is_empty() {
        let wordless = |t: &usize| is_wordless(text, spans, *t) && !tokens.contains(t);
        let others: Vec<usize> = (0..spans.len()).filter(wordless).collect();
        tokens.extend(others);
    }
    tokens
}

/// Scores the vision relevance of one answer.
///
/// N = tokens that overlap the first mention of one of `names` in the answer; M_j = share of cell j covered by the true boxes; a = mean of
/// M; p_ij = attention of token i, softmax over all image tokens; s = mean over N of sum_j M_j p_ij.
/// [`VisionMode::AllTokens`]: `clip((s - a) / (1 - a), 0, 1)`, range `[0, 1]`, 0 at chance.
/// [`VisionMode::PaperLiteral`]: softmax over the abnormal cells only, summed over N: identically |N|, range `[0, |N|]`.
///
/// With a sink filter, the cells of [`sinks`] are left out of p, M and a, and p is normalised over the rest; a token that attends to
/// sinks only has no attention on the lesion.
///
/// Without a mention the value is 0. Masked: no true box, the boxes cover the whole image or all of it but sinks, or the record has no
/// class name (`NotApplicable`); rows of the mention absent, misshapen, not finite, or not a distribution (`NoAttention`).
///
/// Detail: `a`, and if the rows were read `s` (the energy inside the boxes), `lift` = s/a, `tokens` = |N|, `entropy` (mean over
/// N, as a share of ln |V|; 1 = uniform), and with a filter `sinks` = number of cells left out.
pub fn score_vision_relevance(
    response: AttendedResponse<'_>,
    names: &[String],
    region: &mut Region<'_>,
    rule: VisionRule,
) -> Component {
    if !region.is_applicable() || names.iter().all(|n| n.trim().is_empty()) {
        return Component::masked(MaskReason::NotApplicable);
    }
    let Some(named) = find_mention(response.reader, response.text, names) else {
        return Component::value(0.0).with_detail("a", region.share());
    };
    let tokens = overlapping_tokens(&named, response.spans);
    let rows = response.attention.and_then(|a| select_rows(a, &tokens));
    let (Some(attention), Some(rows)) = (response.attention, rows) else {
        return Component::masked(MaskReason::NoAttention).with_detail("a", region.share());
    };
    let m = region.coverage(attention.grid);
    let sinks =
        if rule.sink > 0.0 { sinks(response.text, response.spans, attention, m, rule.sink) } else { Vec::new() };
    let n = tokens.len() as f64;
    let (a, row_totals): (f64, Vec<RowSums>) = if sinks.is_empty() {
        (mean(m), rows.iter().map(|row| row_sums(row, m)).collect())
    } else {
        let m = without_sinks(m, &sinks);
        (mean(&m), rows.iter().map(|row| row_sums(&without_sinks(row, &sinks), &m)).collect())
    };
    if !(a > 0.0 && a < 1.0 - WHOLE_IMAGE_SLACK) {
        return Component::masked(MaskReason::NotApplicable).with_detail("a", region.share());
    }
    let share = |r: &RowSums| if r.total > 0.0 { r.inside / r.total } else { 0.0 };
    let s = row_totals.iter().map(share).sum::<f64>() / n;
    let value = match rule.mode {
        VisionMode::AllTokens => ((s - a) / (1.0 - a)).clamp(0.0, 1.0),
        VisionMode::PaperLiteral => rows.iter().map(|row| literal_value(row, m)).sum(),
    };
    let spread = rows.iter().map(|row| entropy(row)).sum::<f64>() / n;
    let mut out = Component::value(value)
        .with_detail("s", s)
        .with_detail("a", a)
        .with_detail("lift", s / a)
        .with_detail("tokens", n);
    out = out.with_detail("entropy", spread);
    if rule.sink > 0.0 { out.with_detail("sinks", sinks.len() as f64) } else { out }
}

fn mean(m: &[f32]) -> f64 {
    m.iter().map(|&v| f64::from(v)).sum::<f64>() / m.len() as f64
}

/// Sums the softmax restricted to the cells with M > 0 over these cells. The result is 1 by construction, also if all mass is outside
/// them and the remainder has vanished in f32.
fn literal_value(row: &[f32], m: &[f32]) -> f64 {
    let abnormal: Vec<f64> = row.iter().zip(m).filter(|(_, m)| **m > 0.0).map(|(&p, _)| f64::from(p)).collect();
    let total: f64 = abnormal.iter().sum();
    if total > 0.0 { abnormal.iter().map(|p| p / total).sum() } else { 1.0 }
}

/// Returns the rows of `tokens` in that order; `None` unless all are present, have the grid's shape, and are distributions.
fn select_rows<'a>(attention: &'a Attention, tokens: &[usize]) -> Option<Vec<&'a [f32]>> {
    let cells = attention.grid[0].checked_mul(attention.grid[1]).filter(|&c| c > 0)?;
    if tokens.is_empty() || attention.tokens.len() != attention.rows.len() {
        return None;
    }
    let row = |token: &usize| {
        let index = attention.tokens.iter().position(|t| t == token)?;
        let is_distribution = |r: &&[f32]| crate::rows::is_distribution(r, ROW_SUM_SLACK);
        attention.rows.get(index).map(Vec::as_slice).filter(|r| r.len() == cells).filter(is_distribution)
    };
    tokens.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scores a text without a sink filter.
    fn relevance(text: &str, spans: &[(usize, usize)], a: Option<&Attention>, region: &mut Region<'_>) -> Component {
        let response = AttendedResponse { text, reader: &AnswerReader::default(), spans, attention: a };
        score_vision_relevance_unfiltered(response, &["nodule".into()], region, VisionMode::AllTokens)
    }

    // A grid of 4 x 4 cells of 10 pixels, and a text of four tokens: "[1]" " nod" "ule" " nodule".
    const SPANS: [(usize, usize); 4] = [(0, 3), (3, 7), (7, 10), (10, 17)];
    const TEXT: &str = "[1] nodule nodule";

    fn score(row: Vec<f32>, boxes: &[[f32; 4]], mode: VisionMode) -> Component {
        let boxes: Vec<BBox> = boxes.iter().map(|&b| b.into()).collect();
        let attention = Attention { grid: [4, 4], tokens: vec![0, 1, 2, 3], rows: vec![row; 4] };
        let mut region = Region::new(&boxes, [40, 40]);
        let response = AttendedResponse {
            text: TEXT,
            reader: &AnswerReader::default(),
            spans: &SPANS,
            attention: Some(&attention),
        };
        score_vision_relevance_unfiltered(response, &["Nodule".into()], &mut region, mode)
    }

    fn one(cell: usize) -> Vec<f32> {
        (0..16).map(|j| if j == cell { 1.0 } else { 0.0 }).collect()
    }

    #[test]
    fn uniform_scores_zero_and_inside_scores_one() {
        let b = [[10.0, 10.0, 20.0, 20.0]];
        let c = score(vec![1.0 / 16.0; 16], &b, VisionMode::AllTokens);
        assert!(c.value.unwrap() < 1e-9 && (c.detail["lift"] - 1.0).abs() < 1e-6);
        assert_eq!(score(one(5), &b, VisionMode::AllTokens).value, Some(1.0));
        assert_eq!(score(one(6), &b, VisionMode::AllTokens).value, Some(0.0));
    }

    #[test]
    fn literal_form_is_the_number_of_tokens() {
        let b = [[10.0, 10.0, 30.0, 20.0]];
        for row in [one(5), one(0), vec![1.0 / 16.0; 16]] {
            let v = score(row, &b, VisionMode::PaperLiteral).value.unwrap();
            assert!((v - 2.0).abs() < 1e-9, "{v}");
        }
    }

    #[test]
    fn box_smaller_than_a_cell_scores() {
        let v = score(one(0), &[[1.0, 1.0, 2.0, 2.0]], VisionMode::AllTokens).value.unwrap();
        assert!(v > 0.0 && v.is_finite(), "{v}");
    }

    #[test]
    fn masked_without_boxes_or_with_the_whole_image() {
        for boxes in [vec![], vec![[0.0, 0.0, 40.0, 40.0]]] {
            let c = score(one(0), &boxes, VisionMode::AllTokens);
            assert_eq!(c.reason, Some(MaskReason::NotApplicable));
        }
    }

    #[test]
    fn no_mention_is_zero_even_without_attention() {
        let boxes = [BBox::from([0.0, 0.0, 5.0, 5.0])];
        let mut region = Region::new(&boxes, [40, 40]);
        let c = relevance("[1] mass", &[], None, &mut region);
        assert_eq!(c.value, Some(0.0));
        let c = relevance("<think>nodule</think> mass", &[], None, &mut region);
        assert_eq!(c.value, Some(0.0), "reasoning names nothing");
    }

    #[test]
    fn entropy_and_energy_are_reported() {
        let b = [[10.0, 10.0, 20.0, 20.0]];
        let even = score(vec![1.0 / 16.0; 16], &b, VisionMode::AllTokens);
        assert!((even.detail["entropy"] - 1.0).abs() < 1e-6 && (even.detail["s"] - 1.0 / 16.0).abs() < 1e-6);
        assert!(score(one(5), &b, VisionMode::AllTokens).detail["entropy"].abs() < 1e-6);
    }

    #[test]
    fn needed_rows_score_like_all_rows() {
        let text = "[1, 2] nodule; (3) a nodule, no mass. Nodule [4]";
        let ends = [1, 2, 3, 4, 5, 6, 9, 13, 15, 16, 17, 18, 20, 23, 27, 28, 31, 36, 37, 44, 45, 46, 47, 48];
        let spans: Vec<(usize, usize)> = [0].iter().chain(&ends).copied().zip(ends).collect();
        let row = |t: usize| -> Vec<f32> {
            let raw: Vec<f32> = (0..16).map(|j| ((t * 7 + j * 3) % 11) as f32 + 1.0).collect();
            let sum: f32 = raw.iter().sum();
            raw.into_iter().map(|v| v / sum).collect()
        };
        let whole =
            Attention { grid: [4, 4], tokens: (0..spans.len()).collect(), rows: (0..spans.len()).map(row).collect() };
        let boxes = [BBox::from([0.0, 0.0, 20.0, 20.0])];
        for (sink, name, most) in [(0.0, "Nodule", 2), (1.2, "Nodule", 14), (1.2, "mass", 13), (1.2, "cyst", 0)] {
            let rule = VisionRule { mode: VisionMode::AllTokens, sink };
            let names = [name.to_owned()];
            let reader = AnswerReader::default();
            let named =
                find_mention(&reader, text, &names).map(|at| overlapping_tokens(&at, &spans)).unwrap_or_default();
            let needed = rows_needed(named, text, &spans, rule);
            assert!(needed.len() <= most && needed.len() < spans.len(), "{needed:?}");
            let mut sent = needed.clone();
            sent.sort_unstable();
            sent.dedup();
            assert_eq!(sent.len(), needed.len());
            let part = Attention { grid: [4, 4], rows: sent.iter().map(|t| row(*t)).collect(), tokens: sent };
            let score = |a: &Attention| {
                let response = AttendedResponse { text, reader: &reader, spans: &spans, attention: Some(a) };
                score_vision_relevance(response, &names, &mut Region::new(&boxes, [40, 40]), rule)
            };
            assert_eq!(score(&part), score(&whole), "{name} {sink}");
        }
    }

    #[test]
    fn inconsistent_attention_is_masked() {
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
            let c = relevance(TEXT, &SPANS, a.as_ref(), &mut region);
            assert_eq!(c.reason, Some(MaskReason::NoAttention), "{a:?}");
        }
        let mut region = Region::new(&boxes, [40, 40]);
        let c = relevance(TEXT, &[], Some(&good), &mut region);
        assert_eq!(c.reason, Some(MaskReason::NoAttention), "no spans");
    }
}
