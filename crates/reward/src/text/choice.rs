//! Options that answers to closed questions choose, by letter or by text.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use regex::Regex;

use super::overlap::normalise_text;

/// Patterns of a choice letter: it leads the answer (`B`, `(B)`, `B.`, `B: …`), or is called the answer (`the answer is B`).
static LETTER_PATTERNS: LazyLock<Option<[Regex; 2]>> = LazyLock::new(|| {
    Some([
        Regex::new(r"^\s*[(\[]?([A-Za-z])(?:[)\].:,]|\s*$)").ok()?,
        Regex::new(r"\b(?i:answer|option|choice)(?i:\s+is|\s*:)?\s*[(\[]?([A-Z])(?:[)\].:,;]|\s*$)").ok()?,
    ])
});

/// Returns the index of the option that an answer chooses: by letter (A = 0), or by repeating the option and nothing else. `None` if it
/// chooses no option, several, or one that does not exist.
pub fn chosen_option(answer: &str, options: &[String]) -> Option<usize> {
    let normalised_answer = normalise_text(answer);
    let is_answer = |o: &String| normalise_text(o) == normalised_answer && !normalised_answer.is_empty();
    if let Some(i) = options.iter().position(is_answer) {
        return Some(i);
    }
    let mut letters = BTreeSet::new();
    for pattern in LETTER_PATTERNS.iter().flatten() {
        for c in pattern.captures_iter(answer) {
            letters.extend(c.get(1).and_then(|m| m.as_str().bytes().next()).map(|b| b.to_ascii_uppercase()));
        }
    }
    let mut letters = letters.into_iter();
    let (letter, None) = (letters.next()?, letters.next()) else { return None };
    Some(usize::from(letter - b'A')).filter(|i| *i < options.len())
}

/// Returns the index of the right option; `truth` is its text or its letter.
pub fn right_option(truth: &str, options: &[String]) -> Option<usize> {
    let normalised_truth = normalise_text(truth);
    let is_truth = |o: &String| normalise_text(o) == normalised_truth && !normalised_truth.is_empty();
    options.iter().position(is_truth).or_else(|| chosen_option(truth, options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_chosen_by_letter_or_text() {
        assert!(LETTER_PATTERNS.is_some());
        let options: Vec<String> = ["Lung nodule", "Polyp", "No finding"].map(str::to_owned).into();
        let c = |t: &str| chosen_option(t, &options);
        for text in [
            "B",
            " (b) polyp",
            "B. because",
            "B: polyp",
            "The answer is B.",
            "Answer: (B)",
            "polyp",
            "I see it. Option B",
        ] {
            assert_eq!(c(text), Some(1), "{text}");
        }
        for text in
            ["", "A nodule is seen", "A. or the answer is B.", "Z", "D.", "the answer is a polyp", "polyp or nodule"]
        {
            assert_eq!(c(text), None, "{text}");
        }
        assert_eq!(
            (right_option("C", &options), right_option("polyp", &options), right_option("cyst", &options)),
            (Some(2), Some(1), None)
        );
    }
}
