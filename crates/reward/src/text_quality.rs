//! The components `length`, `repetition` and `abstention`, which score the wording of an answer regardless of its content.

use std::collections::HashSet;

use unveil_core::Component;
use unveil_preprocess::codec::GroundedAnswer;

/// Returns 1 from `min` to `max` characters, falling linearly to 0 over `slack` characters beyond either. Range `[0, 1]`.
///
/// Leading and trailing white space does not count. Detail: `chars`.
pub fn score_length(text: &str, min: usize, max: usize, slack: usize) -> Component {
    let chars = text.trim().chars().count();
    let beyond = min.saturating_sub(chars).max(chars.saturating_sub(max));
    let value = if beyond == 0 { 1.0 } else { (1.0 - beyond as f64 / slack.max(1) as f64).max(0.0) };
    Component::value(value).with_detail("chars", chars as f64)
}

/// Returns the share of distinct word n-grams among all word n-grams; 1 for texts too short to repeat one. Range `(0, 1]`.
///
/// Source: `1 - rep-n` of Welleck et al., arXiv 1908.04319. Words are separated by white space and compared without case.
pub fn score_repetition(text: &str, ngram: usize) -> Component {
    let folded = text.to_lowercase();
    let words: Vec<&str> = folded.split_whitespace().collect();
    let grams: Vec<&[&str]> = words.windows(ngram.max(1)).collect();
    if grams.is_empty() {
        return Component::value(1.0);
    }
    let distinct: HashSet<&&[&str]> = grams.iter().collect();
    Component::value(distinct.len() as f64 / grams.len() as f64)
}

/// Returns 1 if the answer reports no finding where none is expected, or gives at least one box where a finding is expected, else 0.
/// Range `{0, 1}`. Whether the boxes are right is left to localization; an answer that does neither scores 0.
pub fn score_abstention(answer: &GroundedAnswer, finding_expected: bool) -> Component {
    let right = if finding_expected { !answer.boxes.is_empty() } else { answer.no_finding };
    Component::value(f64::from(u8::from(right)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use unveil_core::AnswerReader;
    use unveil_preprocess::codec::{AbsoluteResized, Sizes, read_answer};

    #[test]
    fn length_falls_beyond_both_limits() {
        let l = |n: usize| score_length(&"x".repeat(n), 2, 4, 4).value.unwrap();
        assert_eq!((l(2), l(4), l(0), l(6), l(8), l(1_000_000)), (1.0, 1.0, 0.5, 0.5, 0.0, 0.0));
        assert_eq!(score_length(&" ".repeat(99), 0, 4, 0).value, Some(1.0));
        assert_eq!(score_length("xxxxx", 0, 4, 0).value, Some(0.0));
    }

    #[test]
    fn repetition_counts_distinct_ngrams() {
        let r = |t: &str| score_repetition(t, 2).value.unwrap();
        assert_eq!((r(""), r("a"), r("a b c"), r("a A a")), (1.0, 1.0, 1.0, 0.5));
        assert!(r(&"nodule ".repeat(1000)) < 0.01);
    }

    #[test]
    fn abstention_with_and_without_findings() {
        let a = |t: &str, expected| {
            let sizes = Sizes { original: (9, 9), resized: (9, 9) };
            score_abstention(&read_answer(&AbsoluteResized, &AnswerReader::default(), t, &sizes), expected)
                .value
                .unwrap()
        };
        assert_eq!((a("no finding", false), a("[1,1,2,2] x", false), a("", false)), (1.0, 0.0, 0.0));
        assert_eq!((a("[]", false), a("No abnormality is seen.", false), a("[]", true)), (1.0, 1.0, 0.0));
        assert_eq!((a("no finding", true), a("[1,1,2,2] x", true), a("hmm", true)), (0.0, 1.0, 0.0));
    }
}
