//! Phrases by which an answer says that nothing is there.

use super::class::fold;

/// Phrases that say so where a configuration names none of its own; compared after folding case, blanks, emphasis and punctuation.
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

/// What may stand before a phrase, and behind it.
const BEFORE: [&str; 14] = [
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
const BEHIND: [&str; 30] = [
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
const PLACES: [&str; 9] = [
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

/// Phrases that say that nothing is there, folded.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Phrases {
    all: Vec<String>,
    /// Bytes of the longest.
    longest: usize,
}

impl Phrases {
    pub(super) fn new<S: AsRef<str>>(phrases: &[S]) -> Self {
        let folded = phrases.iter().map(|p| fold(p.as_ref())).chain([super::NO_FINDING.to_owned()]);
        let mut all: Vec<String> = folded.filter(|p| !p.is_empty()).collect();
        all.sort_unstable();
        all.dedup();
        let longest = all.iter().map(String::len).max().unwrap_or(0);
        Self { all, longest }
    }

    /// Whether `text` is one of the phrases, alone or after "there is" and before "is seen" and their like.
    pub(super) fn hold(&self, text: &str) -> bool {
        // What may stand around a phrase is short; a long text is not one, and is not folded.
        if text.trim().len() > self.longest + 160 {
            return false;
        }
        let folded = fold(text);
        let known = |t: &str| self.all.binary_search_by(|p| p.as_str().cmp(t)).is_ok();
        let bare = BEFORE.iter().find_map(|b| folded.strip_prefix(b)?.strip_prefix(' ')).unwrap_or(&folded);
        [folded.as_str(), bare].into_iter().any(|mut t| {
            loop {
                if known(t) {
                    return true;
                }
                let shorter = PLACES.iter().chain(&BEHIND).find_map(|b| t.strip_suffix(b)?.strip_suffix(' '));
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
    fn phrases_and_what_stands_around_them() {
        let p = Phrases::new(&NO_FINDING_PHRASES);
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
            assert!(p.hold(yes), "{yes}");
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
            assert!(!p.hold(no), "{no}");
        }
        let own = Phrases::new(&["All CLEAR."]);
        assert!(own.hold("all clear") && own.hold("no finding") && !own.hold("no abnormality"));
    }
}
