//! Symbolic checks of multi-step answers: fields are read by keywords, compared with the record, and checked for consistency.
//!
//! Source: Dr-LLaVA (arXiv 2405.19567) rewards right answers to a chain of questions and answers that are clinically consistent
//! with each other, both read by keyword parsers. The table and the formula here are our own.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use unveil_core::{Component, MaskReason, Record};

use crate::RewardError;

/// Content of a rule table file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct TableFile {
    /// Share of consistency in the score, 0 to 1; the rest is correctness.
    #[serde(default)]
    consistency: f64,
    /// The fields.
    field: Vec<Field>,
    /// Valid combinations, as field -> value; a field that is left out may have any value. Empty: every combination is valid.
    #[serde(default)]
    valid: Vec<BTreeMap<String, String>>,
}

/// One field of an answer.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Field {
    /// Name of the field in `valid`.
    name: String,
    /// Key of the record with the true value: `category`, `modality`, `answer`, or an extra key.
    truth: String,
    /// Weight among the fields.
    #[serde(default = "one")]
    weight: f64,
    /// Keywords of each value.
    values: BTreeMap<String, Vec<String>>,
}

fn one() -> f64 {
    1.0
}

/// A checked rule table.
#[derive(Debug, Clone, PartialEq)]
pub struct RuleTable {
    file: TableFile,
    version: String,
}

impl RuleTable {
    /// Loads a table.
    ///
    /// # Errors
    /// Returns [`RewardError::Io`] if the file cannot be read, and [`RewardError::Named`] if its rules are invalid.
    pub fn load(path: &Path) -> Result<Self, RewardError> {
        let text = std::fs::read_to_string(path).map_err(|source| RewardError::Io { path: path.to_owned(), source })?;
        let fail = |why| RewardError::Named { what: format!("reward.symbolic.table {}", path.display()), why };
        Self::parse(&text).map_err(fail)
    }

    /// Parses a table.
    ///
    /// # Errors
    /// Returns a message that describes the problem.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut file: TableFile = toml::from_str(text).map_err(|e| e.to_string().trim().to_owned())?;
        if !(0.0..=1.0).contains(&file.consistency) {
            return Err(format!("consistency is {}: use 0 to 1", file.consistency));
        }
        if file.field.is_empty() {
            return Err("it has no field".to_owned());
        }
        for f in &mut file.field {
            if !(f.weight > 0.0 && f.weight.is_finite()) {
                return Err(format!("field `{}`: weight is {}: use a number above 0", f.name, f.weight));
            }
            for (value, keywords) in &mut f.values {
                keywords.iter_mut().for_each(|k| *k = k.trim().to_lowercase());
                if keywords.is_empty() || keywords.iter().any(String::is_empty) {
                    return Err(format!("field `{}`: value `{value}` needs keywords, none of them empty", f.name));
                }
            }
        }
        for rule in &file.valid {
            for (name, value) in rule {
                let Some(f) = file.field.iter().find(|f| f.name == *name) else {
                    return Err(format!("valid: there is no field `{name}`"));
                };
                if !f.values.contains_key(value) {
                    return Err(format!("valid: field `{name}` has no value `{value}`"));
                }
            }
        }
        let version = format!("symbolic-1:{}", &blake3::hash(text.as_bytes()).to_hex()[..12]);
        Ok(Self { file, version })
    }

    /// Returns the version of the rules, a hash of their text.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Scores a text by `(1 - c) * correct + c * consistent` in `[0, 1]`: `correct` = weighted share of the fields whose value is read
    /// and equals the record's; `consistent` = 1 if every field is read and the combination is valid, else 0; c = `consistency`.
    ///
    /// A field is read if the text contains keywords of exactly one of its values, on word boundaries and regardless of case; a keyword
    /// inside a longer one of the same field does not count. Fields without a true value in the record count for consistency only;
    /// masked if no field has one.
    ///
    /// Detail: `correct`, `consistent`, `read` (fields read), `fields`.
    pub fn score(&self, text: &str, record: &Record) -> Component {
        let folded = text.to_lowercase();
        let values: Vec<Option<&str>> = self.file.field.iter().map(|f| f.read(&folded)).collect();
        let mut right = 0.0;
        let mut weights = 0.0;
        for (f, value) in self.file.field.iter().zip(&values) {
            if let Some(truth) = f.truth(record) {
                weights += f.weight;
                right += if value.is_some_and(|s| s.to_lowercase() == truth) { f.weight } else { 0.0 };
            }
        }
        if weights == 0.0 {
            return Component::masked(MaskReason::NotApplicable);
        }
        let is_met = |rule: &BTreeMap<String, String>| {
            let value = |name: &str| self.file.field.iter().position(|f| f.name == name).and_then(|i| values[i]);
            rule.iter().all(|(name, v)| value(name) == Some(v))
        };
        let valid = self.file.valid.is_empty() || self.file.valid.iter().any(is_met);
        let consistent = f64::from(u8::from(valid && values.iter().all(Option::is_some)));
        let correct = right / weights;
        let c = self.file.consistency;
        Component::value(((1.0 - c) * correct + c * consistent).clamp(0.0, 1.0))
            .with_detail("correct", correct)
            .with_detail("consistent", consistent)
            .with_detail("read", values.iter().flatten().count() as f64)
            .with_detail("fields", values.len() as f64)
    }
}

impl Field {
    fn read(&self, folded: &str) -> Option<&str> {
        let keywords = self.values.iter().flat_map(|(v, k)| k.iter().map(move |k| (v.as_str(), k.as_str())));
        let hits: Vec<(&str, Range<usize>)> =
            keywords.flat_map(|(v, k)| word_matches(folded, k).map(move |range| (v, range))).collect();
        let inside = |a: &Range<usize>, b: &Range<usize>| a.start >= b.start && a.end <= b.end && a.len() < b.len();
        // The longest hit over each byte decides; word boundaries keep the number of hits per text small.
        let mut longest: Vec<&(&str, Range<usize>)> = Vec::new();
        let mut sorted: Vec<&(&str, Range<usize>)> = hits.iter().collect();
        sorted.sort_by_key(|(_, range)| (range.start, std::cmp::Reverse(range.end)));
        for hit in sorted {
            if longest.last().is_none_or(|last| !inside(&hit.1, &last.1)) {
                longest.push(hit);
            }
        }
        let (first, _) = longest.first()?;
        longest.iter().all(|(v, _)| v == first).then_some(*first)
    }

    fn truth(&self, record: &Record) -> Option<String> {
        let text = match self.truth.as_str() {
            "category" => record.category.as_str(),
            "modality" => record.modality.as_str(),
            "answer" => record.answer.as_str(),
            key => record.extra.get(key)?.as_str()?,
        };
        Some(text.trim().to_lowercase()).filter(|t| !t.is_empty())
    }
}

/// Finds `keyword` in `text` with no letter or digit directly before or after it, in bytes.
fn word_matches<'a>(text: &'a str, keyword: &'a str) -> impl Iterator<Item = Range<usize>> + 'a {
    text.match_indices(keyword).map(|(at, k)| at..at + k.len()).filter(|r| {
        let word = |c: char| c.is_alphanumeric();
        !text[..r.start].chars().next_back().is_some_and(word) && !text[r.end..].chars().next().is_some_and(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = r#"
        consistency = 0.5
        [[field]]
        name = "quality"
        truth = "quality"
        values = { good = ["good", "adequate"], poor = ["not good", "poor"] }
        [[field]]
        name = "diagnosis"
        truth = "category"
        weight = 3
        values = { leukaemia = ["leukaemia", "leukemia"], none = ["no diagnosis"] }
        [[valid]]
        quality = "good"
        [[valid]]
        quality = "poor"
        diagnosis = "none"
    "#;

    fn record(quality: &str, category: &str) -> Record {
        serde_json::from_value(serde_json::json!({"id": "a", "category": category, "boxes": [], "quality": quality}))
            .unwrap()
    }

    #[test]
    fn score_mixes_correctness_and_consistency() {
        let t = RuleTable::parse(TABLE).unwrap();
        let s = |text: &str| t.score(text, &record("good", "Leukaemia")).value.unwrap();
        assert_eq!(s("The quality is good. It is leukemia."), 1.0);
        assert_eq!(s("It is leukemia."), 0.375, "three of four, and not consistent");
        assert_eq!(s("Adequate; no diagnosis."), 0.125 + 0.5);
        assert_eq!(s("Poor quality, leukaemia"), 0.375, "right, but the combination is invalid");
        assert_eq!(s("not good; no diagnosis"), 0.5, "consistent and wrong");
        assert_eq!((s(""), s("good poor leukaemia, no diagnosis")), (0.0, 0.0), "naming every value names none");
        assert_eq!(s("goodness leukaemias"), 0.0, "words are matched whole");
        let masked = t.score("good", &record("", ""));
        assert_eq!(masked.reason, Some(MaskReason::NotApplicable));
    }

    #[test]
    fn invalid_tables_are_explained() {
        for (from, to, word) in [
            ("consistency = 0.5", "consistency = 2", "consistency"),
            ("weight = 3", "weight = -1", "weight"),
            ("weight = 3", "wieght = 3", "wieght"),
            ("[\"no diagnosis\"]", "[]", "keywords"),
            ("diagnosis = \"none\"", "diagnosis = \"some\"", "no value `some`"),
            ("diagnosis = \"none\"", "dignosis = \"none\"", "no field `dignosis`"),
        ] {
            let e = RuleTable::parse(&TABLE.replace(from, to)).unwrap_err();
            assert!(e.contains(word), "{e}");
        }
        let other = TABLE.replace("0.5", "0.4");
        assert_ne!(RuleTable::parse(TABLE).unwrap().version(), RuleTable::parse(&other).unwrap().version());
    }

    #[test]
    fn megabytes_of_keywords_score_quickly() {
        let t = RuleTable::parse(TABLE).unwrap();
        let start = std::time::Instant::now();
        t.score(&"good poor ".repeat(200_000), &record("good", "x"));
        assert!(start.elapsed().as_secs() < 5);
    }
}
