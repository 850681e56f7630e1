//! Attention sinks among image cells: cells that draw attention regardless of the text.
//!
//! Large models give some image tokens much attention from any text token, although these are irrelevant to it and mostly in the
//! background ("See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321, section 3). The paper
//! identifies them by massive activations of hidden states, which attention rows do not show; here they are identified by the
//! behaviour that the paper describes, from rows that are captured anyway.

use unveil_core::Attention;

/// Fewest wordless tokens that must agree: one token alone may look at a cell because of its meaning.
const MIN_WITNESSES: usize = 2;

/// Returns the sink cells in ascending order: those outside the true boxes (`m`, the covered share of each cell, is 0) to which every
/// wordless token gives at least `factor` / |V|; at least two such tokens are needed. A token is wordless if its text has neither a
/// letter nor a digit (brackets, commas, blanks). Coordinates and the class are words, and look where they should.
///
/// A cell that touches a true box is never a sink: there, attention from all tokens is desired. No cell is a sink if the rows of the
/// wordless tokens were not sent, or the text of tokens is unknown. Fewer than |V| / `factor` cells are sinks.
pub fn sinks(text: &str, spans: &[(usize, usize)], attention: &Attention, m: &[f32], factor: f64) -> Vec<usize> {
    let wordless = |token: usize| is_wordless(text, spans, token);
    let sent = attention.tokens.iter().zip(&attention.rows);
    let rows: Vec<&Vec<f32>> =
        sent.filter(|(token, row)| wordless(**token) && row.len() == m.len()).map(|(_, row)| row).collect();
    if rows.len() < MIN_WITNESSES {
        return Vec::new();
    }
    let least = (factor / m.len() as f64) as f32;
    (0..m.len()).filter(|&j| m[j] == 0.0 && rows.iter().all(|row| row[j] >= least)).collect()
}

/// Whether a token is wordless: a bracket, a comma, a blank.
pub(crate) fn is_wordless(text: &str, spans: &[(usize, usize)], token: usize) -> bool {
    let token_text = spans.get(token).and_then(|&(b, e)| text.get(b..e));
    token_text.is_some_and(|t| !t.is_empty() && !t.chars().any(char::is_alphanumeric))
}

/// Removes the values of `sinks` (ascending) from one value per cell.
pub(crate) fn without_sinks(values: &[f32], sinks: &[usize]) -> Vec<f32> {
    let mut next = sinks.iter().copied().peekable();
    let is_kept = |j: &usize| next.next_if_eq(j).is_none();
    (0..values.len()).filter(is_kept).map(|j| values[j]).collect()
}

#[cfg(test)]
mod tests {
    use unveil_config::schema::VisionMode;
    use unveil_core::{AnswerReader, BBox, Component, MaskReason};

    use super::*;
    use crate::vision::{AttendedResponse, Region, VisionRule, score_vision_relevance};

    const TEXT: &str = "[1] nodule";
    const SPANS: [(usize, usize); 4] = [(0, 1), (1, 2), (2, 3), (3, 10)];

    /// Returns a row of 16 cells with half of the mass on `cell` and half on cell 15.
    fn half(cell: usize) -> Vec<f32> {
        (0..16).map(|j| f32::from(u8::from(j == cell)) / 2.0 + f32::from(u8::from(j == 15)) / 2.0).collect()
    }

    fn score(tokens: &[usize], rows: &[Vec<f32>], sink: f64, lesion: [f32; 4]) -> Component {
        let attention = Attention { grid: [4, 4], tokens: tokens.to_vec(), rows: rows.to_vec() };
        let response = AttendedResponse {
            text: TEXT,
            reader: &AnswerReader::default(),
            spans: &SPANS,
            attention: Some(&attention),
        };
        let boxes = [BBox::from(lesion)];
        let rule = VisionRule { mode: VisionMode::AllTokens, sink };
        score_vision_relevance(response, &["nodule".into()], &mut Region::new(&boxes, [40, 40]), rule)
    }

    #[test]
    fn cells_that_every_bracket_attends_to_are_left_out() {
        // Besides cell 15, the class token looks at the lesion in cell 5.
        let lesion = [10.0, 10.0, 20.0, 20.0];
        let tokens = [0, 1, 2, 3];
        let rows = [half(3), half(5), half(0), half(5)];
        let all = score(&tokens, &rows, 4.0, lesion);
        assert_eq!((all.value, all.detail["sinks"]), (Some(1.0), 1.0));
        assert!((all.detail["a"] - 1.0 / 15.0).abs() < 1e-6);
        let off = score(&tokens, &rows, 0.0, lesion);
        assert!((off.value.unwrap() - (0.5 - 1.0 / 16.0) / (15.0 / 16.0)).abs() < 1e-6);
        assert!(!off.detail.contains_key("sinks"));
        // No sinks from words, from one wordless token alone, or from too small a share.
        for (tokens, sink) in [(&[1, 3][..], 4.0), (&[0, 1, 3], 4.0), (&[0, 1, 2, 3], 9.0)] {
            let rows: Vec<Vec<f32>> = tokens.iter().map(|t| rows[*t].clone()).collect();
            let c = score(tokens, &rows, sink, lesion);
            assert_eq!((c.value, c.detail["sinks"]), (off.value, 0.0), "{tokens:?} {sink}");
        }
    }

    #[test]
    fn lesion_cells_are_never_sinks() {
        let rows = [half(3), half(5), half(0), half(15)];
        let c = score(&[0, 1, 2, 3], &rows, 4.0, [30.0, 30.0, 40.0, 40.0]);
        assert_eq!((c.value, c.detail["sinks"]), (Some(1.0), 0.0), "all tokens look at the lesion");
        let c = score(&[0, 1, 2, 3], &rows, 4.0, [10.0, 10.0, 20.0, 20.0]);
        assert_eq!((c.value, c.detail["sinks"]), (Some(0.0), 1.0), "the class token looks at the sink alone");
        // The boxes cover everything but the sink, so vision relevance is undefined.
        let attention = Attention { grid: [1, 2], tokens: vec![0, 2, 3], rows: vec![vec![0.1, 0.9]; 3] };
        let response = AttendedResponse {
            text: TEXT,
            reader: &AnswerReader::default(),
            spans: &SPANS,
            attention: Some(&attention),
        };
        let boxes = [BBox::from([0.0, 0.0, 20.0, 40.0])];
        let rule = VisionRule { mode: VisionMode::AllTokens, sink: 1.5 };
        let c = score_vision_relevance(response, &["nodule".into()], &mut Region::new(&boxes, [40, 40]), rule);
        assert_eq!(c.reason, Some(MaskReason::NotApplicable));
    }

    #[test]
    fn values_of_sinks_are_removed() {
        assert_eq!(without_sinks(&[1.0, 2.0, 3.0, 4.0], &[0, 2]), [2.0, 4.0]);
        assert_eq!(without_sinks(&[1.0, 2.0], &[]), [1.0, 2.0]);
    }
}
