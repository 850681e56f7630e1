//! The facade: one group in, one breakdown per response out. Pure, no I/O, never panics on what a text holds.

use std::collections::BTreeMap;

use unveil_config::Config;
use unveil_config::schema::{Normalise, Reward};
use unveil_core::{Attention, BBox, Breakdown, Record, parse_answer};

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
    /// `[width, height]` of that image.
    pub image: [u32; 2],
    /// `[width, height]` after the processor's resize: the pixels in which answers give boxes.
    pub resized: [u32; 2],
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
    let mut region = Region::new(truth, input.image);
    let mut components: Vec<BTreeMap<String, _>> = input
        .responses
        .iter()
        .map(|r| {
            let answer = parse_answer(&r.text);
            let boxes: Vec<BBox> = answer.boxes.iter().map(|b| to_original(*b, input.image, input.resized)).collect();
            let mode = scoring.reward.vision_relevance.mode;
            let attention = r.attention.as_ref();
            let scores = [
                localization(&boxes, answer.no_finding, truth, input.image),
                vision_relevance(&r.text, &names, &r.spans, attention, &mut region, mode),
                form::format(&answer, &boxes),
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

/// A box of an answer (pixels of the resized image) in original-image pixels. What is too large for f32 becomes infinite,
/// and is invalid then.
pub fn to_original(written: [f64; 4], image: [u32; 2], resized: [u32; 2]) -> BBox {
    let scale = |a: usize| f64::from(image[a]) / f64::from(resized[a]);
    let (sx, sy) = (scale(0), scale(1));
    let [x1, y1, x2, y2] = written;
    [(x1 * sx) as f32, (y1 * sy) as f32, (x2 * sx) as f32, (y2 * sy) as f32].into()
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
        GroupInput { record, image: [200, 100], resized: [100, 50], responses }
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
    fn the_scale_is_the_codecs() {
        use unveil_data::codec::{AbsoluteResized, BoxCodec, Sizes};
        let sizes = Sizes { original: (640, 480), resized: (128, 96) };
        for b in [[1.0, 2.0, 3.0, 4.0], [127.0, 95.5, 128.0, 96.0], [-1e300, 0.0, 1e300, 7.0]] {
            assert_eq!(AbsoluteResized.decode(&b, &sizes), to_original(b, [640, 480], [128, 96]), "{b:?}");
        }
    }

    #[test]
    fn synonyms_count() {
        let mut s = Scoring::default();
        s.synonyms.insert("Nodule".into(), vec!["tumour".into()]);
        let b = score_group(&s, &input(&["[10,5,30,15] Tumour"]));
        assert_eq!(b[0].components["category"].value, Some(1.0));
    }
}
