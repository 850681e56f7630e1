//! Choice letters of closed answers.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use regex::Regex;

use super::overlap::normalised;

/// A letter that leads the answer (`B`, `(B)`, `B.`, `B: …`), or that is called the answer (`the answer is B`).
static FORMS: LazyLock<Option<[Regex; 2]>> = LazyLock::new(|| {
    Some([
        Regex::new(r"^\s*[(\[]?([A-Za-z])(?:[)\].:,]|\s*$)").ok()?,
        Regex::new(r"\b(?i:answer|option|choice)(?i:\s+is|\s*:)?\s*[(\[]?([A-Z])(?:[)\].:,;]|\s*$)").ok()?,
    ])
});

/// Index of the option that an answer chooses: by letter (A = 0), or by saying the option and nothing else. None when it chooses
/// none, several, or one that is not there.
pub fn chosen(answer: &str, options: &[String]) -> Option<usize> {
    let said = normalised(answer);
    if let Some(i) = options.iter().position(|o| normalised(o) == said && !said.is_empty()) {
        return Some(i);
    }
    let mut letters = BTreeSet::new();
    for form in FORMS.iter().flatten() {
        for c in form.captures_iter(answer) {
            letters.extend(c.get(1).and_then(|m| m.as_str().bytes().next()).map(|b| b.to_ascii_uppercase()));
        }
    }
    let mut letters = letters.into_iter();
    let (letter, None) = (letters.next()?, letters.next()) else { return None };
    Some(usize::from(letter - b'A')).filter(|i| *i < options.len())
}

/// Index of the right option: `truth` is its text, else its letter.
pub fn right(truth: &str, options: &[String]) -> Option<usize> {
    let said = normalised(truth);
    options.iter().position(|o| normalised(o) == said && !said.is_empty()).or_else(|| chosen(truth, options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_and_texts() {
        assert!(FORMS.is_some());
        let options: Vec<String> = ["Lung nodule", "Polyp", "No finding"].map(str::to_owned).into();
        let c = |t: &str| chosen(t, &options);
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
        assert_eq!((right("C", &options), right("polyp", &options), right("cyst", &options)), (Some(2), Some(1), None));
    }
}
