//! Symbolic checks of multi-step answers: every field is read by its keywords, compared with the record, and the fields have to go
//! together.
//!
//! Source: Dr-LLaVA (arXiv 2405.19567) rewards right answers to a chain of questions and answers that are clinically consistent
//! with each other, both read by keyword parsers. The table and the formula here are our own.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use unveil_core::{Component, MaskReason, Record};

use crate::RewardError;

/// A rule table as its file holds it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Share of the score that consistency makes, 0 to 1; the rest is correctness.
    #[serde(default)]
    consistency: f64,
    /// The fields.
    field: Vec<Field>,
    /// Combinations that can be, as field -> value; a field that is left out may have any value. None = any combination.
    #[serde(default)]
    valid: Vec<BTreeMap<String, String>>,
}

/// One field of an answer.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Field {
    /// Its name in `valid`.
    name: String,
    /// Key of the record that holds the true value: `category`, `modality`, `answer`, or an extra key.
    truth: String,
    /// Weight among the fields.
    #[serde(default = "one")]
    weight: f64,
    /// Value -> keywords that say it.
    values: BTreeMap<String, Vec<String>>,
}

fn one() -> f64 {
    1.0
}

/// A rule table, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct RuleTable {
    file: File,
    version: String,
}

impl RuleTable {
    /// Reads a table.
    ///
    /// # Errors
    /// The file cannot be read, or its rules cannot work.
    pub fn load(path: &Path) -> Result<Self, RewardError> {
        let text = std::fs::read_to_string(path).map_err(|source| RewardError::Io { path: path.to_owned(), source })?;
        let fail = |why| RewardError::Named { what: format!("reward.symbolic.table {}", path.display()), why };
        Self::parse(&text).map_err(fail)
    }

    /// A table from its text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut file: File = toml::from_str(text).map_err(|e| e.to_string().trim().to_owned())?;
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

    /// Name of the rules, by their content.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// `(1 - c) * correct + c * consistent` in `[0, 1]`: `correct` = weighted share of the fields whose value is read and is the
    /// record's; `consistent` = 1 when every field is read and the combination is valid, else 0; c = `consistency` of the table.
    ///
    /// A field is read when the keywords of exactly one of its values stand in the text, on word boundaries, without regard to
    /// case; a keyword inside a longer one of the same field does not count. Fields without a true value in the record count for
    /// consistency only; masked when no field has one.
    ///
    /// Detail: `correct`, `consistent`, `read` (fields read), `fields`.
    pub fn score(&self, text: &str, record: &Record) -> Component {
        let folded = text.to_lowercase();
        let said: Vec<Option<&str>> = self.file.field.iter().map(|f| f.read(&folded)).collect();
        let (mut right, mut weights) = (0.0, 0.0);
        for (f, said) in self.file.field.iter().zip(&said) {
            if let Some(truth) = f.truth(record) {
                weights += f.weight;
                right += if said.is_some_and(|s| s.to_lowercase() == truth) { f.weight } else { 0.0 };
            }
        }
        if weights == 0.0 {
            return Component::masked(MaskReason::NotApplicable);
        }
        let holds = |rule: &BTreeMap<String, String>| {
            let value = |name: &str| self.file.field.iter().position(|f| f.name == name).and_then(|i| said[i]);
            rule.iter().all(|(name, v)| value(name) == Some(v))
        };
        let possible = self.file.valid.is_empty() || self.file.valid.iter().any(holds);
        let consistent = f64::from(u8::from(possible && said.iter().all(Option::is_some)));
        let correct = right / weights;
        let c = self.file.consistency;
        Component::value(((1.0 - c) * correct + c * consistent).clamp(0.0, 1.0))
            .with("correct", correct)
            .with("consistent", consistent)
            .with("read", said.iter().flatten().count() as f64)
            .with("fields", said.len() as f64)
    }
}

impl Field {
    fn read(&self, folded: &str) -> Option<&str> {
        let keywords = self.values.iter().flat_map(|(v, k)| k.iter().map(move |k| (v.as_str(), k.as_str())));
        let hits: Vec<(&str, Range<usize>)> =
            keywords.flat_map(|(v, k)| places(folded, k).map(move |at| (v, at))).collect();
        let inside = |a: &Range<usize>, b: &Range<usize>| a.start >= b.start && a.end <= b.end && a.len() < b.len();
        // The longest hit that covers each byte decides; with word boundaries there are few hits per text.
        let mut longest: Vec<&(&str, Range<usize>)> = Vec::new();
        let mut sorted: Vec<&(&str, Range<usize>)> = hits.iter().collect();
        sorted.sort_by_key(|(_, at)| (at.start, std::cmp::Reverse(at.end)));
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

/// Where `keyword` stands in `text` with no letter or digit right before or after it.
fn places<'a>(text: &'a str, keyword: &'a str) -> impl Iterator<Item = Range<usize>> + 'a {
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
    fn correctness_consistency_and_partial_credit() {
        let t = RuleTable::parse(TABLE).unwrap();
        let s = |text: &str| t.score(text, &record("good", "Leukaemia")).value.unwrap();
        assert_eq!(s("The quality is good. It is leukemia."), 1.0);
        assert_eq!(s("It is leukemia."), 0.375, "three of four, and not consistent");
        assert_eq!(s("Adequate; no diagnosis."), 0.125 + 0.5);
        assert_eq!(s("Poor quality, leukaemia"), 0.375, "right, but the two cannot be together");
        assert_eq!(s("not good; no diagnosis"), 0.5, "consistent and wrong");
        assert_eq!((s(""), s("good poor leukaemia, no diagnosis")), (0.0, 0.0), "saying everything says nothing");
        assert_eq!(s("goodness leukaemias"), 0.0, "words are matched whole");
        let masked = t.score("good", &record("", ""));
        assert_eq!(masked.reason, Some(MaskReason::NotApplicable));
    }

    #[test]
    fn tables_that_cannot_work_are_named() {
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
    fn megabytes_of_keywords_stay_quick() {
        let t = RuleTable::parse(TABLE).unwrap();
        let start = std::time::Instant::now();
        t.score(&"good poor ".repeat(200_000), &record("good", "x"));
        assert!(start.elapsed().as_secs() < 5);
    }
}
