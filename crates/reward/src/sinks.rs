//! Attention sinks among image cells: which cells draw attention whatever is said.
//!
//! Large models give some image tokens much attention from any text token, though they say nothing of it and lie mostly in the
//! background ("See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321, section 3). The paper
//! tells them by massive activations of hidden states. Rows do not show these; so they are told here by what the paper finds them
//! to do, from rows that are captured anyway. Must not know: how rows are captured, rewards.

use unveil_core::Attention;

use crate::vision::Seen;

/// Tokens that must agree: what one token looks at may be what it means.
const WITNESSES: usize = 2;

/// Cells that are sinks, ascending: outside the true boxes (`m`, the share that they cover of each cell, is 0), and given at least
/// `factor` / |V| by every token that carries no word, of which there must be two. A token carries no word when its text has neither
/// a letter nor a digit (brackets, commas, blanks). Coordinates and the class are words, and look where they should.
///
/// A cell that touches a true box is none: much attention from all tokens is what is wanted there. Nothing is a sink where the rows of
/// such tokens were not sent, or the text of tokens is not known. Fewer than |V| / `factor` cells are sinks.
pub fn sinks(seen: Seen<'_>, attention: &Attention, m: &[f32], factor: f64) -> Vec<usize> {
    let wordless = |token: usize| is_wordless(seen.text, seen.spans, token);
    let sent = attention.tokens.iter().zip(&attention.rows);
    let rows: Vec<&Vec<f32>> =
        sent.filter(|(token, row)| wordless(**token) && row.len() == m.len()).map(|(_, row)| row).collect();
    if rows.len() < WITNESSES {
        return Vec::new();
    }
    let least = (factor / m.len() as f64) as f32;
    (0..m.len()).filter(|&j| m[j] == 0.0 && rows.iter().all(|row| row[j] >= least)).collect()
}

/// Whether a token carries no word: a bracket, a comma, a blank.
pub(crate) fn is_wordless(text: &str, spans: &[(usize, usize)], token: usize) -> bool {
    let own = spans.get(token).and_then(|&(b, e)| text.get(b..e));
    own.is_some_and(|t| !t.is_empty() && !t.chars().any(char::is_alphanumeric))
}

/// What is left of a value per cell without `sinks` (ascending).
pub(crate) fn kept(values: &[f32], sinks: &[usize]) -> Vec<f32> {
    let mut next = sinks.iter().copied().peekable();
    let is_kept = |j: &usize| next.next_if_eq(j).is_none();
    (0..values.len()).filter(is_kept).map(|j| values[j]).collect()
}

#[cfg(test)]
mod tests {
    use unveil_config::schema::VisionMode;
    use unveil_core::{BBox, Component, MaskReason, Reading};

    use super::*;
    use crate::vision::{Region, VisionRule, look};

    const TEXT: &str = "[1] nodule";
    const SPANS: [(usize, usize); 4] = [(0, 1), (1, 2), (2, 3), (3, 10)];

    /// Half on `cell`, half on cell 15, of 16.
    fn half(cell: usize) -> Vec<f32> {
        (0..16).map(|j| f32::from(u8::from(j == cell)) / 2.0 + f32::from(u8::from(j == 15)) / 2.0).collect()
    }

    fn score(tokens: &[usize], rows: &[Vec<f32>], sink: f64, lesion: [f32; 4]) -> Component {
        let attention = Attention { grid: [4, 4], tokens: tokens.to_vec(), rows: rows.to_vec() };
        let seen = Seen { text: TEXT, reading: &Reading::default(), spans: &SPANS, attention: Some(&attention) };
        let boxes = [BBox::from(lesion)];
        let rule = VisionRule { mode: VisionMode::AllTokens, sink };
        look(seen, &["nodule".into()], &mut Region::new(&boxes, [40, 40]), rule)
    }

    #[test]
    fn what_every_bracket_looks_at_is_left_out() {
        // What the class token looks at beyond cell 15 is the lesion in cell 5.
        let lesion = [10.0, 10.0, 20.0, 20.0];
        let (tokens, rows) = ([0, 1, 2, 3], [half(3), half(5), half(0), half(5)]);
        let all = score(&tokens, &rows, 4.0, lesion);
        assert_eq!((all.value, all.detail["sinks"]), (Some(1.0), 1.0));
        assert!((all.detail["a"] - 1.0 / 15.0).abs() < 1e-6);
        let off = score(&tokens, &rows, 0.0, lesion);
        assert!((off.value.unwrap() - (0.5 - 1.0 / 16.0) / (15.0 / 16.0)).abs() < 1e-6);
        assert!(!off.detail.contains_key("sinks"));
        // Words tell nothing, nor does one token alone, nor too small a share.
        for (tokens, sink) in [(&[1, 3][..], 4.0), (&[0, 1, 3], 4.0), (&[0, 1, 2, 3], 9.0)] {
            let rows: Vec<Vec<f32>> = tokens.iter().map(|t| rows[*t].clone()).collect();
            let c = score(tokens, &rows, sink, lesion);
            assert_eq!((c.value, c.detail["sinks"]), (off.value, 0.0), "{tokens:?} {sink}");
        }
    }

    #[test]
    fn the_lesion_is_no_sink_and_sinks_alone_are_nothing() {
        let rows = [half(3), half(5), half(0), half(15)];
        let c = score(&[0, 1, 2, 3], &rows, 4.0, [30.0, 30.0, 40.0, 40.0]);
        assert_eq!((c.value, c.detail["sinks"]), (Some(1.0), 0.0), "all tokens look at the lesion");
        let c = score(&[0, 1, 2, 3], &rows, 4.0, [10.0, 10.0, 20.0, 20.0]);
        assert_eq!((c.value, c.detail["sinks"]), (Some(0.0), 1.0), "the class token looks at the sink alone");
        // The boxes cover all but the sink: there is nothing to look away from.
        let attention = Attention { grid: [1, 2], tokens: vec![0, 2, 3], rows: vec![vec![0.1, 0.9]; 3] };
        let seen = Seen { text: TEXT, reading: &Reading::default(), spans: &SPANS, attention: Some(&attention) };
        let boxes = [BBox::from([0.0, 0.0, 20.0, 40.0])];
        let rule = VisionRule { mode: VisionMode::AllTokens, sink: 1.5 };
        let c = look(seen, &["nodule".into()], &mut Region::new(&boxes, [40, 40]), rule);
        assert_eq!(c.reason, Some(MaskReason::NotApplicable));
    }

    #[test]
    fn what_is_kept() {
        assert_eq!(kept(&[1.0, 2.0, 3.0, 4.0], &[0, 2]), [2.0, 4.0]);
        assert_eq!(kept(&[1.0, 2.0], &[]), [1.0, 2.0]);
    }
}
