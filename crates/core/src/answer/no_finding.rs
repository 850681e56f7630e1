//! Phrases that mean "no finding".

use super::class::fold_class_name;

/// Default phrases that mean "no finding"; compared after folding case, white space, emphasis and punctuation.
pub const NO_FINDING_PHRASES: [&str; 24] = [
    "no finding",
    "no findings",
    "no abnormality",
    "no abnormalities",
    "no abnormal finding",
    "no abnormal findings",
    "no abnormal region",
    "no abnormal regions",
    "no abnormal area",
    "no abnormal areas",
    "no significant finding",
    "no significant findings",
    "no significant abnormality",
    "no significant abnormalities",
    "no acute finding",
    "no acute findings",
    "no acute abnormality",
    "no acute abnormalities",
    "no lesion",
    "no lesions",
    "no evidence of abnormality",
    "nothing abnormal",
    "nothing",
    "normal",
];

/// Introductions allowed before a phrase.
const INTRODUCTIONS: [&str; 14] = [
    "there is",
    "there are",
    "there's",
    "there was",
    "there were",
    "i see",
    "i can see",
    "i find",
    "we see",
    "the image shows",
    "this image shows",
    "the image is",
    "the answer is",
    "answer:",
];
/// Predicates allowed after a phrase.
const PREDICATES: [&str; 30] = [
    "is seen",
    "are seen",
    "was seen",
    "were seen",
    "can be seen",
    "seen",
    "is present",
    "are present",
    "present",
    "is visible",
    "are visible",
    "visible",
    "is found",
    "are found",
    "was found",
    "were found",
    "found",
    "is detected",
    "are detected",
    "was detected",
    "were detected",
    "detected",
    "is identified",
    "are identified",
    "was identified",
    "were identified",
    "identified",
    "is noted",
    "are noted",
    "is there",
];
/// Locations allowed after a phrase or a predicate.
const LOCATIONS: [&str; 9] = [
    "in the image",
    "in this image",
    "on the image",
    "on this image",
    "in the picture",
    "in this picture",
    "in the scan",
    "in this scan",
    "here",
];

/// Set of folded phrases that mean "no finding".
#[derive(Debug, Clone, PartialEq)]
pub(super) struct NoFindingPhrases {
    /// Sorted.
    phrases: Vec<String>,
    /// Length of the longest phrase in bytes.
    max_bytes: usize,
}

impl NoFindingPhrases {
    pub(super) fn new<S: AsRef<str>>(phrases: &[S]) -> Self {
        let folded = phrases.iter().map(|p| fold_class_name(p.as_ref())).chain([super::NO_FINDING.to_owned()]);
        let mut phrases: Vec<String> = folded.filter(|p| !p.is_empty()).collect();
        phrases.sort_unstable();
        phrases.dedup();
        let max_bytes = phrases.iter().map(String::len).max().unwrap_or(0);
        Self { phrases, max_bytes }
    }

    /// Returns whether `text` is one of the phrases, alone or with an introduction ("there is") or a predicate ("is seen").
    pub(super) fn matches(&self, text: &str) -> bool {
        // Introductions and predicates are short: a long text cannot match and need not be folded.
        if text.trim().len() > self.max_bytes + 160 {
            return false;
        }
        let folded = fold_class_name(text);
        let known = |t: &str| self.phrases.binary_search_by(|p| p.as_str().cmp(t)).is_ok();
        let bare = INTRODUCTIONS.iter().find_map(|b| folded.strip_prefix(b)?.strip_prefix(' ')).unwrap_or(&folded);
        [folded.as_str(), bare].into_iter().any(|mut t| {
            loop {
                if known(t) {
                    return true;
                }
                let shorter = LOCATIONS.iter().chain(&PREDICATES).find_map(|b| t.strip_suffix(b)?.strip_suffix(' '));
                match shorter {
                    Some(s) => t = s.trim_end_matches([',', ' ']),
                    None => return false,
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrases_match_with_introductions_and_predicates() {
        let phrases = NoFindingPhrases::new(&NO_FINDING_PHRASES);
        for yes in [
            "no finding",
            " No Finding. ",
            "No findings",
            "**no finding**",
            "\"No finding\"",
            "`no finding`",
            "no  finding\n",
            "No abnormality is seen.",
            "There are no abnormalities in this image.",
            "There is no abnormal finding visible here!",
            "I see nothing abnormal.",
            "The image is normal.",
            "_No lesions were found in the scan._",
            "Nothing is there.",
        ] {
            assert!(phrases.matches(yes), "{yes}");
        }
        let long = "no finding ".repeat(100);
        for no in [
            "",
            ".",
            "no",
            "finding",
            "no finding nodule",
            "no finding of note but a nodule",
            "is seen",
            "There is",
            "there is a nodule",
            "no finding, nodule",
            "not normal",
            "no finding. no finding.",
            &long,
        ] {
            assert!(!phrases.matches(no), "{no}");
        }
        let custom = NoFindingPhrases::new(&["All CLEAR."]);
        assert!(custom.matches("all clear") && custom.matches("no finding") && !custom.matches("no abnormality"));
    }
}
