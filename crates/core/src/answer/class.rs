//! Comparison of class names. Names are folded on both sides for comparing only, never in output.

use std::collections::HashMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Returns whether `c` is white space, a quote or an emphasis mark around a word.
fn is_decoration(c: char) -> bool {
    matches!(c, '*' | '_' | '`' | '~' | '"' | '\'' | '“' | '”' | '„' | '‘' | '’' | '«' | '»') || c.is_whitespace()
}

fn is_end_punctuation(c: char) -> bool {
    matches!(c, '.' | ',' | ';' | ':' | '!' | '?' | '…' | '。')
}

/// Folds a class name for comparison: lower case, single spaces, no emphasis or quotes around words, no punctuation at the end.
pub fn fold_class_name(name: &str) -> String {
    let trimmed =
        name.trim_start_matches(is_decoration).trim_end_matches(|c| is_decoration(c) || is_end_punctuation(c));
    let mut out = String::with_capacity(trimmed.len());
    for word in trimmed.split_whitespace().map(|w| w.trim_matches(is_decoration)).filter(|w| !w.is_empty()) {
        if !out.is_empty() {
            out.push(' ');
        }
        if word.is_ascii() {
            out.extend(word.bytes().map(|b| char::from(b.to_ascii_lowercase())));
        } else {
            out.push_str(&word.to_lowercase());
        }
    }
    out
}

/// Rule for comparing the category of an answer with a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClassMatch {
    /// The category equals the class or a synonym.
    #[default]
    Equal,
    /// The answer contains the class or a synonym as whole words, not negated, and no other known class.
    Contains,
}

/// A class with its synonyms, prepared for matching against answers.
#[derive(Debug, Clone, PartialEq)]
pub struct KnownClass {
    /// Folded names, sorted.
    names: Vec<String>,
    /// Words of each name of every known class and whether it is this class, by first word; empty for [`ClassMatch::Equal`].
    words: HashMap<String, Vec<(Vec<String>, bool)>>,
    matching: ClassMatch,
}

impl KnownClass {
    /// Creates the class with the synonyms `names`; `others` are the names of other classes, which [`ClassMatch::Contains`] excludes.
    pub fn new<S: AsRef<str>>(names: &[S], others: &[S], matching: ClassMatch) -> Self {
        let mut names: Vec<String> =
            names.iter().map(|n| fold_class_name(n.as_ref())).filter(|n| !n.is_empty()).collect();
        names.sort_unstable();
        names.dedup();
        let mut words: HashMap<String, Vec<(Vec<String>, bool)>> = HashMap::new();
        if matching == ClassMatch::Contains {
            let own = names.iter().map(|n| (n.clone(), true));
            let others =
                others.iter().map(|n| fold_class_name(n.as_ref())).filter(|n| !names.contains(n)).map(|n| (n, false));
            for (name, is_own) in own.chain(others) {
                let list: Vec<String> = Word::all(&name).into_iter().map(|w| w.text.to_owned()).collect();
                if let Some(first) = list.first().cloned() {
                    words.entry(first).or_default().push((list, is_own));
                }
            }
        }
        Self { names, words, matching }
    }

    /// Returns whether the class has no name to match.
    pub fn is_unnamed(&self) -> bool {
        self.names.is_empty()
    }

    /// Returns whether an answer names the class: by its `category` for [`ClassMatch::Equal`], by all its `words` for
    /// [`ClassMatch::Contains`].
    pub fn is_named(&self, category: &str, words: &str) -> bool {
        match self.matching {
            ClassMatch::Equal => {
                let category = fold_class_name(category);
                !category.is_empty() && self.names.binary_search(&category).is_ok()
            }
            ClassMatch::Contains => self.is_contained_in(&words.to_lowercase()),
        }
    }

    fn is_contained_in(&self, text: &str) -> bool {
        let words = Word::all(text);
        let mut hits: Vec<(Range<usize>, bool)> = Vec::new();
        for (start, word) in words.iter().enumerate() {
            // Takes the longest name that begins here; a name within another one is not a hit.
            let candidates = self.words.get(word.text).into_iter().flatten().filter(|(name, _)| {
                let window = words.get(start..start + name.len()).unwrap_or_default();
                window.len() == name.len() && window.iter().zip(name).all(|(w, n)| w.text == n)
            });
            let Some((name, own)) = candidates.max_by_key(|(name, _)| name.len()) else { continue };
            let end = start + name.len();
            if hits.last().is_none_or(|(last, _)| end > last.end) {
                hits.push((start..end, *own));
            }
        }
        let negated = negated_before(&words);
        let mut contained = false;
        for (range, own) in hits {
            match (own, negated[range.start] || is_negated_after(&words, range.end)) {
                (true, false) => contained = true,
                (true, true) | (false, false) => return false,
                (false, true) => {}
            }
        }
        contained
    }
}

/// Words that negate the rest of their sentence.
const NEGATIONS: [&str; 22] = [
    "no", "not", "without", "never", "neither", "nor", "none", "free", "absence", "absent", "negative", "unlikely",
    "excluded", "excludes", "isn", "aren", "wasn", "don", "doesn", "didn", "cannot", "rules",
];
/// Words that negate what directly precedes them.
const NEGATIONS_AFTER: [&str; 11] =
    ["not", "absent", "excluded", "ruled", "unlikely", "negative", "isn", "aren", "wasn", "cannot", "never"];
/// Words that start a new clause and so end a negation.
const CLAUSE_STARTS: [&str; 5] = ["but", "however", "though", "although", "yet"];

/// A word and its separation from the previous one.
#[derive(Debug)]
struct Word<'a> {
    text: &'a str,
    /// Whether a comma precedes it.
    after_comma: bool,
    /// Whether it starts a sentence or clause.
    starts_clause: bool,
}

impl<'a> Word<'a> {
    fn all(text: &'a str) -> Vec<Self> {
        let mut out = Vec::new();
        let mut comma = false;
        let mut boundary = true;
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            if c.is_alphanumeric() {
                let end = rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len());
                let word = &rest[..end];
                out.push(Self {
                    text: word,
                    after_comma: comma,
                    starts_clause: boundary || CLAUSE_STARTS.contains(&word),
                });
                comma = false;
                boundary = false;
                rest = &rest[end..];
            } else {
                comma |= c == ',';
                boundary |= matches!(c, '.' | ';' | ':' | '!' | '?' | '\n' | '(');
                rest = &rest[c.len_utf8()..];
            }
        }
        out
    }
}

/// Returns for each word whether it is, or follows, a negation in its clause.
fn negated_before(words: &[Word<'_>]) -> Vec<bool> {
    let mut negated = false;
    let flags = words.iter().map(|w| {
        negated &= !w.starts_clause;
        negated |= NEGATIONS.contains(&w.text);
        negated
    });
    flags.collect()
}

/// Returns whether one of the three words from index `end` negates what precedes them ("is not seen", "absent").
fn is_negated_after(words: &[Word<'_>], end: usize) -> bool {
    let rest = words.get(end..).unwrap_or_default();
    rest.iter().take(3).take_while(|w| !w.after_comma && !w.starts_clause).any(|w| NEGATIONS_AFTER.contains(&w.text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_folded_on_both_sides() {
        for same in [
            "Lung  Nodule",
            "lung nodule.",
            "**Lung nodule**",
            "\"lung nodule\"",
            "“Lung” `nodule`!",
            " _lung nodule_ \n",
            "**\"lung nodule.\"**",
        ] {
            assert_eq!(fold_class_name(same), "lung nodule", "{same}");
        }
        assert_eq!(
            (fold_class_name("Crohn's disease"), fold_class_name("HÖHLE …"), fold_class_name(" *. ")),
            ("crohn's disease".into(), "höhle".into(), String::new())
        );
        assert_eq!(fold_class_name("lung_nodule"), "lung_nodule");
        let c = KnownClass::new(&["Nodule.", "lung nodule"], &[], ClassMatch::Equal);
        for right in ["nodule", "Nodule.", "**lung  nodule**"] {
            assert!(c.is_named(right, ""), "{right}");
        }
        for wrong in ["", ".", "nodule nodule", "nodules", "a nodule", "no nodule"] {
            assert!(!c.is_named(wrong, "nodule"), "{wrong}");
        }
        assert!(KnownClass::new(&[" ."], &[], ClassMatch::Equal).is_unnamed());
    }

    #[test]
    fn containment_is_by_whole_words() {
        let c = KnownClass::new(&["nodule", "tumour"], &["mass", "lung nodule", "cyst"], ClassMatch::Contains);
        let is_named = |words: &str| c.is_named("", words);
        for right in [
            "nodule",
            "A Nodule is seen at .",
            "A nodule, no mass.",
            "There is no mass. But a nodule.",
            "a nodule without a cyst",
            "tumour (nodule)",
            "not clear, but nodule",
            "a nodule, not a mass",
        ] {
            assert!(is_named(right), "{right}");
        }
        for wrong in [
            "",
            "nodules",
            "no nodule",
            "not a nodule",
            "no mass, cyst or nodule",
            "nodule is absent",
            "the nodule is not seen",
            "nodule and mass",
            "nodule, mass, cyst",
            "lung nodule",
            "nodule. No nodule.",
            "free of nodule",
        ] {
            assert!(!is_named(wrong), "{wrong}");
        }
        let c = KnownClass::new(&["lung nodule"], &["nodule"], ClassMatch::Contains);
        assert!(c.is_named("", "a lung-nodule") && !c.is_named("", "a nodule"));
    }
}
