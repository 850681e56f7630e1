//! Class names as they are compared: folded on both sides, never where they are written.

use std::collections::HashMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Characters that set a word off without being part of it.
fn is_dress(c: char) -> bool {
    matches!(c, '*' | '_' | '`' | '~' | '"' | '\'' | '“' | '”' | '„' | '‘' | '’' | '«' | '»') || c.is_whitespace()
}

fn is_end(c: char) -> bool {
    matches!(c, '.' | ',' | ';' | ':' | '!' | '?' | '…' | '。')
}

/// Folds a class name for comparing: lower case, single blanks, without emphasis and quotes around its words and without punctuation at
/// its end.
pub fn fold(name: &str) -> String {
    let trimmed = name.trim_start_matches(is_dress).trim_end_matches(|c| is_dress(c) || is_end(c));
    let mut out = String::with_capacity(trimmed.len());
    for word in trimmed.split_whitespace().map(|w| w.trim_matches(is_dress)).filter(|w| !w.is_empty()) {
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

/// How the category of an answer is compared with a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClassMatch {
    /// It is the class or a synonym, nothing more and nothing less.
    #[default]
    Equal,
    /// It holds the class or a synonym as whole words, not negated, and no other known class beside it.
    Contains,
}

/// A class under its names, ready to be looked for in answers.
#[derive(Debug, Clone, PartialEq)]
pub struct KnownClass {
    folded: Vec<String>,
    /// Words of every known class by their first; whether it is this one. Empty where names are compared whole.
    words: HashMap<String, Vec<(Vec<String>, bool)>>,
    matching: ClassMatch,
}

impl KnownClass {
    /// The class with these `names`; `others` are the names of other classes, which [`ClassMatch::Contains`] looks for besides.
    pub fn new<S: AsRef<str>>(names: &[S], others: &[S], matching: ClassMatch) -> Self {
        let mut folded: Vec<String> = names.iter().map(|n| fold(n.as_ref())).filter(|n| !n.is_empty()).collect();
        folded.sort_unstable();
        folded.dedup();
        let mut words: HashMap<String, Vec<(Vec<String>, bool)>> = HashMap::new();
        if matching == ClassMatch::Contains {
            let own = folded.iter().map(|n| (n.clone(), true));
            let others = others.iter().map(|n| fold(n.as_ref())).filter(|n| !folded.contains(n)).map(|n| (n, false));
            for (name, is_own) in own.chain(others) {
                let list: Vec<String> = Word::all(&name).into_iter().map(|w| w.text.to_owned()).collect();
                if let Some(first) = list.first().cloned() {
                    words.entry(first).or_default().push((list, is_own));
                }
            }
        }
        Self { folded, words, matching }
    }

    /// It has no name that could be looked for.
    pub fn is_unnamed(&self) -> bool {
        self.folded.is_empty()
    }

    /// Whether an answer names the class: its category is it, or, where that is how it is compared, its words hold it.
    pub fn is_named(&self, category: &str, words: &str) -> bool {
        match self.matching {
            ClassMatch::Equal => {
                let said = fold(category);
                !said.is_empty() && self.folded.binary_search(&said).is_ok()
            }
            ClassMatch::Contains => self.is_held(&words.to_lowercase()),
        }
    }

    fn is_held(&self, text: &str) -> bool {
        let words = Word::all(text);
        let mut hits: Vec<(Range<usize>, bool)> = Vec::new();
        for (at, word) in words.iter().enumerate() {
            // The longest name that begins here; one that lies within another is part of that one.
            let here = self.words.get(word.text).into_iter().flatten().filter(|(name, _)| {
                let there = words.get(at..at + name.len()).unwrap_or_default();
                there.len() == name.len() && there.iter().zip(name).all(|(w, n)| w.text == n)
            });
            let Some((name, own)) = here.max_by_key(|(name, _)| name.len()) else { continue };
            let end = at + name.len();
            if hits.last().is_none_or(|(last, _)| end > last.end) {
                hits.push((at..end, *own));
            }
        }
        let denied = denied(&words);
        let mut found = false;
        for (at, own) in hits {
            match (own, denied[at.start] || denied_behind(&words, at.end)) {
                (true, false) => found = true,
                (true, true) | (false, false) => return false,
                (false, true) => {}
            }
        }
        found
    }
}

/// Words that deny what follows them in their sentence, and what stands right before them.
const DENY: [&str; 22] = [
    "no", "not", "without", "never", "neither", "nor", "none", "free", "absence", "absent", "negative", "unlikely",
    "excluded", "excludes", "isn", "aren", "wasn", "don", "doesn", "didn", "cannot", "rules",
];
const DENY_BEHIND: [&str; 11] =
    ["not", "absent", "excluded", "ruled", "unlikely", "negative", "isn", "aren", "wasn", "cannot", "never"];
/// Words that begin a thought of their own.
const TURN: [&str; 5] = ["but", "however", "though", "although", "yet"];

/// A word, and how it is parted from the one before it.
#[derive(Debug)]
struct Word<'a> {
    text: &'a str,
    /// A comma stands before it.
    comma: bool,
    /// A sentence begins with it.
    begins: bool,
}

impl<'a> Word<'a> {
    fn all(text: &'a str) -> Vec<Self> {
        let mut out = Vec::new();
        let (mut comma, mut begins) = (false, true);
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            if c.is_alphanumeric() {
                let end = rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len());
                let word = &rest[..end];
                out.push(Self { text: word, comma, begins: begins || TURN.contains(&word) });
                (comma, begins) = (false, false);
                rest = &rest[end..];
            } else {
                comma |= c == ',';
                begins |= matches!(c, '.' | ';' | ':' | '!' | '?' | '\n' | '(');
                rest = &rest[c.len_utf8()..];
            }
        }
        out
    }
}

/// For each word, whether one before it in its sentence denies it.
fn denied(words: &[Word<'_>]) -> Vec<bool> {
    let mut denies = false;
    let each = words.iter().map(|w| {
        denies &= !w.begins;
        denies |= DENY.contains(&w.text);
        denies
    });
    each.collect()
}

/// Whether one of the three words from `at` on denies what stands before them ("is not seen", "absent").
fn denied_behind(words: &[Word<'_>], at: usize) -> bool {
    let rest = words.get(at..).unwrap_or_default();
    rest.iter().take(3).take_while(|w| !w.comma && !w.begins).any(|w| DENY_BEHIND.contains(&w.text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folded_on_both_sides() {
        for same in [
            "Lung  Nodule",
            "lung nodule.",
            "**Lung nodule**",
            "\"lung nodule\"",
            "“Lung” `nodule`!",
            " _lung nodule_ \n",
            "**\"lung nodule.\"**",
        ] {
            assert_eq!(fold(same), "lung nodule", "{same}");
        }
        assert_eq!(
            (fold("Crohn's disease"), fold("HÖHLE …"), fold(" *. ")),
            ("crohn's disease".into(), "höhle".into(), String::new())
        );
        assert_eq!(fold("lung_nodule"), "lung_nodule");
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
    fn held_as_whole_words() {
        let c = KnownClass::new(&["nodule", "tumour"], &["mass", "lung nodule", "cyst"], ClassMatch::Contains);
        let is = |words: &str| c.is_named("", words);
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
            assert!(is(right), "{right}");
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
            assert!(!is(wrong), "{wrong}");
        }
        let c = KnownClass::new(&["lung nodule"], &["nodule"], ClassMatch::Contains);
        assert!(c.is_named("", "a lung-nodule") && !c.is_named("", "a nodule"));
    }
}
