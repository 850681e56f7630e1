//! Whether a configuration can reward the records of a run at all; asked before anything is trained.
//!
//! Must not know: responses, other processes.

use std::collections::HashSet;

use unveil_config::Config;
use unveil_config::schema::RelevanceKind;
use unveil_core::answer::fold;
use unveil_core::{BoxForm, ClassMatch, MaskReason, Record};
use unveil_data::codec::Sizes;

use crate::RewardError;
use crate::relevance::reference;
use crate::score::{GroupInput, OF_REGIONS, Resources, ResponseInput, Scoring, components, finish};

/// Sides of an image whose size is not known: wider than any box.
const WIDE: u32 = 1 << 20;

/// Requires that every one of `records` has a component with a weight that applies to it, and, where categories are looked for in words,
/// that its class is among those that are known.
///
/// # Errors
/// The first record that nothing of the configuration speaks of, with what to configure.
pub fn require<'a>(config: &Config, records: impl IntoIterator<Item = &'a Record>) -> Result<(), RewardError> {
    let scoring = Scoring::new(config);
    let known: HashSet<String> = config.data.synonyms.keys().map(|k| fold(k)).collect();
    for record in records {
        let refuse = |why: String| RewardError::Named { what: format!("record \"{}\"", record.id), why };
        if !applies(&scoring, record) {
            return Err(refuse(why(&scoring, record)));
        }
        let looked_for =
            scoring.reading.matching == ClassMatch::Contains && !record.is_text() && !record.boxes.is_empty();
        if looked_for && !record.category.trim().is_empty() && !known.contains(&fold(&record.category)) {
            return Err(refuse(format!(
                "its class `{}` is not in data.synonyms, which answer.match = \"contains\" takes the known classes from: add it, with [] \
                 where it has no synonym",
                record.category.trim()
            )));
        }
    }
    Ok(())
}

/// Whether some component with a weight is left for a record: the scorers themselves are asked, with an empty answer. What needs files
/// or other services is taken to apply.
fn applies(scoring: &Scoring, record: &Record) -> bool {
    let [w, h] = record.image_size.unwrap_or([WIDE, WIDE]);
    let sizes = Sizes { original: (w, h), resized: (w, h) };
    let responses = vec![ResponseInput::default()];
    let input = GroupInput { record: record.clone(), sizes, boxes: BoxForm::default(), responses };
    let scored = finish(scoring, &input, components(scoring, &Resources::default(), &input));
    let judged = |name: &str| name == "relevance" && scoring.reward.relevance.kind == RelevanceKind::Judge;
    scoring.reward.components().into_iter().filter(|(_, weight, _)| *weight > 0.0).any(|(name, ..)| {
        match scored.first().and_then(|b| b.components.get(name)).and_then(|c| c.reason.as_ref()) {
            _ if judged(name) => reference(record).is_some(),
            Some(MaskReason::NotApplicable) => false,
            _ => true,
        }
    })
}

fn why(scoring: &Scoring, record: &Record) -> String {
    let weighted = scoring.reward.components().into_iter().filter(|(_, weight, _)| *weight > 0.0);
    let names: Vec<&str> = weighted.map(|(name, ..)| name).collect();
    let relevance = scoring.reward.relevance.weight > 0.0;
    if !record.is_text() {
        return format!(
            "no reward component with a weight ({}) applies to it: give another one a weight, or leave the record out of data.train_split",
            names.join(", ")
        );
    }
    let of_regions: Vec<&str> = names.into_iter().filter(|n| OF_REGIONS.contains(n)).collect();
    let silent = if of_regions.is_empty() {
        String::new()
    } else {
        format!(", and {} speak of regions only", of_regions.join(", "))
    };
    let help = if relevance {
        "reward.relevance finds nothing to compare with in it: give it an `answer` (and `options`, where the kind is choice or options)"
    } else {
        "set reward.relevance.weight, and reward.relevance.kind to judge it by (`exact`, `token_f1`, `judge`, …)"
    };
    format!("it is answered in text{silent}; {help}, or leave the record out of data.train_split")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(json: &str) -> Record {
        serde_json::from_str(json).unwrap()
    }

    fn fault(c: &Config, json: &str) -> String {
        require(c, &[record(json)]).err().map_or_else(String::new, |e| e.to_string())
    }

    #[test]
    fn a_record_that_nothing_speaks_of_is_named() {
        let mut c = Config::default();
        let text = r#"{"id":"q7","task":"vqa","answer":"MRI"}"#;
        for fine in [r#"{"id":"a","category":"nodule","boxes":[[1,2,3,4]]}"#, r#"{"id":"a","boxes":[]}"#] {
            assert_eq!(fault(&c, fine), "");
        }
        let e = fault(&c, text);
        assert!(
            ["q7", "localization", "reward.relevance.weight", "data.train_split"].iter().all(|w| e.contains(w)),
            "{e}"
        );
        c.reward.relevance.weight = 1.0;
        for kind in [RelevanceKind::Judge, RelevanceKind::Exact, RelevanceKind::Embedding] {
            c.reward.relevance.kind = kind;
            assert_eq!(fault(&c, text), "", "{kind:?}");
            let e = fault(&c, r#"{"id":"q8","task":"vqa"}"#);
            assert!(e.contains("q8") && e.contains("`answer`"), "{kind:?} {e}");
        }
        c.reward.relevance.kind = RelevanceKind::Choice;
        assert!(fault(&c, text).contains("options"));
        assert_eq!(fault(&c, r#"{"id":"q","task":"vqa","answer":"B","options":["CT","MRI"]}"#), "");
        // A gate on what does not apply holds nothing back.
        c.reward.relevance.kind = RelevanceKind::Exact;
        c.reward.gates = vec![serde_json::from_str(r#"{"component":"relevance","needs":"localization"}"#).unwrap()];
        assert_eq!(fault(&c, text), "");
        (c.reward.relevance.weight, c.reward.length.weight) = (0.0, 0.1);
        assert_eq!(fault(&c, text), "", "its length is judged");
    }

    #[test]
    fn a_grounding_record_may_have_nothing_left_either() {
        let mut c = Config::default();
        (c.reward.localization.weight, c.reward.format.weight) = (0.0, 0.0);
        let e = fault(&c, r#"{"id":"a","boxes":[[1,2,3,4]]}"#);
        assert!(e.contains("vision_relevance, category") && e.contains("another one"), "no class to look for: {e}");
        assert_eq!(fault(&c, r#"{"id":"a","category":"x","boxes":[[1,2,3,4]]}"#), "");
    }

    #[test]
    fn classes_that_are_looked_for_are_known() {
        let mut c = Config::default();
        c.answer.matching = ClassMatch::Contains;
        c.data.synonyms.insert("Mass".into(), vec![]);
        let e = fault(&c, r#"{"id":"a","category":"nodule","boxes":[[1,2,3,4]]}"#);
        assert!(e.contains("`nodule`") && e.contains("data.synonyms"), "{e}");
        assert_eq!(fault(&c, r#"{"id":"a","category":"mass","boxes":[[1,2,3,4]]}"#), "");
        assert_eq!(fault(&c, r#"{"id":"a","category":"nodule","boxes":[]}"#), "");
    }
}
