//! The facade: one group in, one breakdown per response out. Pure, no I/O, never panics on what a text holds.

use std::collections::BTreeMap;

use unveil_config::Config;
use unveil_config::schema::{Normalise, Reward};
use unveil_core::{Attention, BoxForm, Breakdown, Record};
use unveil_data::codec::{Sizes, codec, read_answer};

use crate::compose::{Part, compose};
use crate::form;
use crate::localization::localization;
use crate::vision::{Region, vision_relevance};

/// Names of the components, as in the configuration and in every breakdown.
pub const COMPONENTS: [&str; 4] = ["localization", "vision_relevance", "format", "category"];

/// What scoring needs to know of the configuration.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Scoring {
    /// Weights, normalisation, modes.
    pub reward: Reward,
    /// Category in words -> synonyms that count as the same.
    pub synonyms: BTreeMap<String, Vec<String>>,
}

impl Scoring {
    /// The part of a run's configuration that enters scores.
    pub fn new(config: &Config) -> Self {
        Self { reward: config.reward.clone(), synonyms: config.data.synonyms.clone() }
    }

    /// The category and its synonyms (looked up without regard to case).
    pub fn names(&self, category: &str) -> Vec<String> {
        let same = |a: &str| a.trim().to_lowercase() == category.trim().to_lowercase();
        let synonyms = self.synonyms.iter().filter(|(k, _)| same(k)).flat_map(|(_, v)| v.iter().cloned());
        std::iter::once(category.to_owned()).chain(synonyms).collect()
    }

    fn parts(&self) -> [Part; 4] {
        let r = &self.reward;
        let part = |name, weight: f64, normalise: Normalise| Part { name, weight, normalise };
        [
            part(COMPONENTS[0], r.localization.weight, r.localization.normalise),
            part(COMPONENTS[1], r.vision_relevance.weight, r.vision_relevance.normalise),
            part(COMPONENTS[2], r.format.weight, r.format.normalise),
            part(COMPONENTS[3], r.category.weight, r.category.normalise),
        ]
    }
}

/// The responses to one image and question.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupInput {
    /// Question, class, true boxes in pixels of the image the policy saw.
    pub record: Record,
    /// Size of that image, and its size after the processor's resize.
    pub sizes: Sizes,
    /// How answers give boxes.
    pub boxes: BoxForm,
    /// In the order of the breakdowns.
    pub responses: Vec<ResponseInput>,
}

/// One response.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ResponseInput {
    /// Position within the group.
    pub index: usize,
    /// Text without special tokens.
    pub text: String,
    /// Per response token, the bytes of `text` it covers; empty when not known.
    pub spans: Vec<(usize, usize)>,
    /// Attention over the image tokens, when captured.
    pub attention: Option<Attention>,
}

/// Scores a group: every component, masks, totals. Same order as the responses.
pub fn score_group(scoring: &Scoring, input: &GroupInput) -> Vec<Breakdown> {
    let names = scoring.names(&input.record.category);
    let truth = &input.record.boxes;
    let image: [u32; 2] = input.sizes.original.into();
    let codec = codec(input.boxes);
    let mut region = Region::new(truth, image);
    let mut components: Vec<BTreeMap<String, _>> = input
        .responses
        .iter()
        .map(|r| {
            let answer = read_answer(codec, &r.text, &input.sizes);
            let mode = scoring.reward.vision_relevance.mode;
            let attention = r.attention.as_ref();
            let scores = [
                localization(&answer.boxes, answer.no_finding, truth, image),
                vision_relevance(&r.text, &names, &r.spans, attention, &mut region, mode),
                form::format(&answer),
                form::category(&answer, &names, !truth.is_empty()),
            ];
            COMPONENTS.iter().map(|n| (*n).to_owned()).zip(scores).collect()
        })
        .collect();
    let totals = compose(&mut components, &scoring.parts(), scoring.reward.max_eps);
    input
        .responses
        .iter()
        .zip(totals)
        .zip(components)
        .map(|((r, total), components)| Breakdown { id: input.record.id.clone(), index: r.index, total, components })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(texts: &[&str]) -> GroupInput {
        let record = serde_json::from_str(
            r#"{"id":"a","image_size":[200,100],"category":"nodule","boxes":[[20.0,10.0,60.0,30.0]]}"#,
        )
        .unwrap();
        let responses = texts
            .iter()
            .enumerate()
            .map(|(index, t)| ResponseInput { index, text: (*t).to_owned(), ..Default::default() })
            .collect();
        let sizes = Sizes { original: (200, 100), resized: (100, 50) };
        GroupInput { record, sizes, boxes: BoxForm::Absolute, responses }
    }

    #[test]
    fn boxes_are_mapped_back_and_missing_attention_masks_the_group() {
        let b = score_group(&Scoring::default(), &input(&["[10,5,30,15] nodule", "no finding"]));
        let v = |i: usize, n: &str| b[i].components[n].value;
        assert_eq!((v(0, "localization"), v(0, "format"), v(0, "category")), (Some(1.0), Some(1.0), Some(1.0)));
        assert_eq!((v(1, "localization"), v(1, "format"), v(1, "category")), (Some(0.0), Some(1.0), Some(0.0)));
        assert!(b.iter().all(|b| b.components["vision_relevance"].masked));
        let w = 1.0 + 0.5 + 0.1 + 0.2;
        assert!((b[0].total.unwrap() - w).abs() < 1e-9, "all that is left is perfect: the whole weight");
        assert!((b[1].total.unwrap() - 0.1 * w / 1.3).abs() < 1e-9);
    }

    #[test]
    fn every_form_scores_alike() {
        let mut group = input(&[]);
        for form in BoxForm::ALL {
            let truth = group.record.boxes[0];
            let right = codec(form).write(&[codec(form).encode(&truth, &group.sizes)], "nodule");
            group.boxes = form;
            group.responses = vec![ResponseInput { text: right, ..Default::default() }];
            let b = &score_group(&Scoring::default(), &group)[0];
            for name in ["localization", "format", "category"] {
                assert_eq!(b.components[name].value, Some(1.0), "{form} {name}");
            }
        }
        // Numbers of one form are no boxes of the right place in another.
        group.boxes = BoxForm::Absolute;
        group.responses[0].text = "[100,100,300,300] nodule".into();
        let value = |g: &GroupInput| score_group(&Scoring::default(), g)[0].components["localization"].value;
        assert_eq!(value(&group), Some(0.0));
        group.boxes = BoxForm::PerMille;
        assert_eq!(value(&group), Some(1.0));
    }

    #[test]
    fn synonyms_count() {
        let mut s = Scoring::default();
        s.synonyms.insert("Nodule".into(), vec!["tumour".into()]);
        let b = score_group(&s, &input(&["[10,5,30,15] Tumour"]));
        assert_eq!(b[0].components["category"].value, Some(1.0));
    }
}
