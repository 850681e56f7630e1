//! Checks before training whether a configuration can reward the records of a run.

use std::collections::HashSet;

use unveil_config::Config;
use unveil_config::schema::RelevanceKind;
use unveil_core::answer::fold_class_name;
use unveil_core::{BoxForm, ClassMatch, MaskReason, Record};
use unveil_preprocess::codec::Sizes;

use crate::RewardError;
use crate::relevance::reference_text;
use crate::score::{GroupInput, REGION_COMPONENTS, ResponseInput, compose_breakdowns, compute_components};
use crate::scoring::{Resources, Scoring};

/// Side in pixels that is assumed for an image of unknown size: larger than any box.
const ASSUMED_SIDE: u32 = 1 << 20;

/// Checks that a weighted component applies to every one of `records` and, if classes are searched for in words, that the class of
/// each record is known.
///
/// # Errors
/// Returns [`RewardError::Named`] with the first record that no component applies to, or whose class is unknown, and what to configure.
pub fn check_records<'a>(config: &Config, records: impl IntoIterator<Item = &'a Record>) -> Result<(), RewardError> {
    let scoring = Scoring::new(config);
    let known: HashSet<String> = config.data.synonyms.keys().map(|k| fold_class_name(k)).collect();
    for record in records {
        let unusable = |why: String| RewardError::Named { what: format!("record \"{}\"", record.id), why };
        if !applies(&scoring, record) {
            return Err(unusable(advice(&scoring, record)));
        }
        let class_is_searched =
            scoring.reader.matching == ClassMatch::Contains && !record.is_text() && !record.boxes.is_empty();
        if class_is_searched
            && !record.category.trim().is_empty()
            && !known.contains(&fold_class_name(&record.category))
        {
            return Err(unusable(format!(
                "its class `{}` is not in data.synonyms, from which answer.match = \"contains\" takes the known classes: add it, with [] \
                 if it has no synonyms",
                record.category.trim()
            )));
        }
    }
    Ok(())
}

/// Whether any weighted component applies to a record, found by scoring an empty answer. Components that need files or other services
/// are assumed to apply.
fn applies(scoring: &Scoring, record: &Record) -> bool {
    let [w, h] = record.image_size.unwrap_or([ASSUMED_SIDE, ASSUMED_SIDE]);
    let sizes = Sizes { original: (w, h), resized: (w, h) };
    let responses = vec![ResponseInput::default()];
    let input = GroupInput { record: record.clone(), sizes, boxes: BoxForm::default(), responses };
    let scored = compose_breakdowns(scoring, &input, compute_components(scoring, &Resources::default(), &input));
    let judged = |name: &str| name == "relevance" && scoring.reward.relevance.kind == RelevanceKind::Judge;
    scoring.reward.components().into_iter().filter(|(_, weight, _)| *weight > 0.0).any(|(name, ..)| {
        match scored.first().and_then(|b| b.components.get(name)).and_then(|c| c.reason.as_ref()) {
            _ if judged(name) => reference_text(record).is_some(),
            Some(MaskReason::NotApplicable) => false,
            _ => true,
        }
    })
}

/// Explains why no component applies to a record, and what to configure.
fn advice(scoring: &Scoring, record: &Record) -> String {
    let weighted = scoring.reward.components().into_iter().filter(|(_, weight, _)| *weight > 0.0);
    let names: Vec<&str> = weighted.map(|(name, ..)| name).collect();
    let relevance = scoring.reward.relevance.weight > 0.0;
    if !record.is_text() {
        return format!(
            "no reward component with a weight ({}) applies to it: give another one a weight, or leave the record out of data.train_split",
            names.join(", ")
        );
    }
    let region_only: Vec<&str> = names.into_iter().filter(|n| REGION_COMPONENTS.contains(n)).collect();
    let inapplicable = if region_only.is_empty() {
        String::new()
    } else {
        format!(", and {} score regions only", region_only.join(", "))
    };
    let help = if relevance {
        "reward.relevance has no reference to compare with: give the record an `answer` (and `options` if the kind is choice or options)"
    } else {
        "set reward.relevance.weight, and the measure in reward.relevance.kind (`exact`, `token_f1`, `judge`, …)"
    };
    format!("it is answered in text{inapplicable}; {help}, or leave the record out of data.train_split")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(json: &str) -> Record {
        serde_json::from_str(json).unwrap()
    }

    fn problem(c: &Config, json: &str) -> String {
        check_records(c, &[record(json)]).err().map_or_else(String::new, |e| e.to_string())
    }

    #[test]
    fn record_without_an_applicable_component_is_named() {
        let mut c = Config::default();
        let text = r#"{"id":"q7","task":"vqa","answer":"MRI"}"#;
        for fine in [r#"{"id":"a","category":"nodule","boxes":[[1,2,3,4]]}"#, r#"{"id":"a","boxes":[]}"#] {
            assert_eq!(problem(&c, fine), "");
        }
        let e = problem(&c, text);
        assert!(
            ["q7", "localization", "reward.relevance.weight", "data.train_split"].iter().all(|w| e.contains(w)),
            "{e}"
        );
        c.reward.relevance.weight = 1.0;
        for kind in [RelevanceKind::Judge, RelevanceKind::Exact, RelevanceKind::Embedding] {
            c.reward.relevance.kind = kind;
            assert_eq!(problem(&c, text), "", "{kind:?}");
            let e = problem(&c, r#"{"id":"q8","task":"vqa"}"#);
            assert!(e.contains("q8") && e.contains("`answer`"), "{kind:?} {e}");
        }
        c.reward.relevance.kind = RelevanceKind::Choice;
        assert!(problem(&c, text).contains("options"));
        assert_eq!(problem(&c, r#"{"id":"q","task":"vqa","answer":"B","options":["CT","MRI"]}"#), "");
        // A gate on a component that does not apply stays open.
        c.reward.relevance.kind = RelevanceKind::Exact;
        c.reward.gates = vec![serde_json::from_str(r#"{"component":"relevance","needs":"localization"}"#).unwrap()];
        assert_eq!(problem(&c, text), "");
        c.reward.relevance.weight = 0.0;
        c.reward.length.weight = 0.1;
        assert_eq!(problem(&c, text), "", "its length is scored");
    }

    #[test]
    fn grounding_record_without_a_component_is_named() {
        let mut c = Config::default();
        c.reward.localization.weight = 0.0;
        c.reward.format.weight = 0.0;
        let e = problem(&c, r#"{"id":"a","boxes":[[1,2,3,4]]}"#);
        assert!(e.contains("vision_relevance, category") && e.contains("another one"), "no class to look for: {e}");
        assert_eq!(problem(&c, r#"{"id":"a","category":"x","boxes":[[1,2,3,4]]}"#), "");
    }

    #[test]
    fn searched_classes_must_be_known() {
        let mut c = Config::default();
        c.answer.matching = ClassMatch::Contains;
        c.data.synonyms.insert("Mass".into(), vec![]);
        let e = problem(&c, r#"{"id":"a","category":"nodule","boxes":[[1,2,3,4]]}"#);
        assert!(e.contains("`nodule`") && e.contains("data.synonyms"), "{e}");
        assert_eq!(problem(&c, r#"{"id":"a","category":"mass","boxes":[[1,2,3,4]]}"#), "");
        assert_eq!(problem(&c, r#"{"id":"a","category":"nodule","boxes":[]}"#), "");
    }
}
