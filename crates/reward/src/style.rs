//! How an answer is said, whatever it says: length, repetition, and the right to say "no finding".

use std::collections::HashSet;

use unveil_core::Component;
use unveil_data::codec::GroundedAnswer;

/// 1 from `min` to `max` characters, falling linearly to 0 over `slack` characters beyond either. Range `[0, 1]`.
///
/// White space around the text does not count. Detail: `chars`.
pub fn length(text: &str, min: usize, max: usize, slack: usize) -> Component {
    let chars = text.trim().chars().count();
    let beyond = min.saturating_sub(chars).max(chars.saturating_sub(max));
    let value = if beyond == 0 { 1.0 } else { (1.0 - beyond as f64 / slack.max(1) as f64).max(0.0) };
    Component::value(value).with("chars", chars as f64)
}

/// Distinct word n-grams over all word n-grams; 1 for texts that are too short to repeat one. Range `(0, 1]`.
///
/// Source: `1 - rep-n` of Welleck et al., arXiv 1908.04319. Words are separated by white space, case does not count.
pub fn repetition(text: &str, ngram: usize) -> Component {
    let folded = text.to_lowercase();
    let words: Vec<&str> = folded.split_whitespace().collect();
    let grams: Vec<&[&str]> = words.windows(ngram.max(1)).collect();
    if grams.is_empty() {
        return Component::value(1.0);
    }
    let distinct: HashSet<&&[&str]> = grams.iter().collect();
    Component::value(distinct.len() as f64 / grams.len() as f64)
}

/// 1 when it is said that nothing is there and nothing is to be found, or when at least one box is given and something is; else 0. Range
/// `{0, 1}`. Whether the boxes are right is localization's matter; an answer that is neither scores 0.
pub fn abstention(answer: &GroundedAnswer, finding_expected: bool) -> Component {
    let right = if finding_expected { !answer.boxes.is_empty() } else { answer.no_finding };
    Component::value(f64::from(u8::from(right)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use unveil_core::Reading;
    use unveil_data::codec::{AbsoluteResized, Sizes, read_answer};

    #[test]
    fn lengths() {
        let l = |n: usize| length(&"x".repeat(n), 2, 4, 4).value.unwrap();
        assert_eq!((l(2), l(4), l(0), l(6), l(8), l(1_000_000)), (1.0, 1.0, 0.5, 0.5, 0.0, 0.0));
        assert_eq!(length(&" ".repeat(99), 0, 4, 0).value, Some(1.0));
        assert_eq!(length("xxxxx", 0, 4, 0).value, Some(0.0));
    }

    #[test]
    fn repetitions() {
        let r = |t: &str| repetition(t, 2).value.unwrap();
        assert_eq!((r(""), r("a"), r("a b c"), r("a A a")), (1.0, 1.0, 1.0, 0.5));
        assert!(r(&"nodule ".repeat(1000)) < 0.01);
    }

    #[test]
    fn abstentions() {
        let a = |t: &str, expected| {
            let sizes = Sizes { original: (9, 9), resized: (9, 9) };
            abstention(&read_answer(&AbsoluteResized, &Reading::default(), t, &sizes), expected).value.unwrap()
        };
        assert_eq!((a("no finding", false), a("[1,1,2,2] x", false), a("", false)), (1.0, 0.0, 0.0));
        assert_eq!((a("[]", false), a("No abnormality is seen.", false), a("[]", true)), (1.0, 1.0, 0.0));
        assert_eq!((a("no finding", true), a("[1,1,2,2] x", true), a("hmm", true)), (0.0, 1.0, 0.0));
    }
}
