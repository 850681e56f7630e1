//! The entry point of scoring: one group in, one breakdown per response out. Pure, without I/O; no text makes it panic.

use std::collections::BTreeMap;

use unveil_config::schema::{Gate, RelevanceKind, Reward, VisionMode};
use unveil_core::{Attention, BoxForm, Breakdown, Component, KnownClass, MaskReason, Record};
use unveil_preprocess::codec::{GroundedAnswer, Sizes, codec, read_answer};

use crate::compose::{WeightedComponent, apply_gates, compose};
use crate::labels::LabelMatches;
use crate::localization::{OverlapRule, PredictedBoxes, TrueBoxes, score_localization};
use crate::overlong::punish;
use crate::scoring::{Resources, Scoring};
use crate::vision::{AttendedResponse, Region, VisionRule, score_vision_relevance};
use crate::{format, relevance, text_quality};

/// Names of the components that every breakdown has; others are added if they are configured.
pub const COMPONENTS: [&str; 4] = ["localization", "vision_relevance", "format", "category"];

/// Names of the components that score regions; they are masked for records that are answered in text.
pub const REGION_COMPONENTS: [&str; 5] = ["localization", "vision_relevance", "format", "category", "abstention"];

/// The components of one response by name.
pub type Components = BTreeMap<String, Component>;

/// The responses to one image and question.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupInput {
    /// Question, class, true boxes in pixels of the image the policy saw.
    pub record: Record,
    /// Size of that image before and after the processor's resize.
    pub sizes: Sizes,
    /// Form in which answers give boxes.
    pub boxes: BoxForm,
    /// Responses, in the order of the breakdowns.
    pub responses: Vec<ResponseInput>,
}

/// One response.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ResponseInput {
    /// Position within the group.
    pub index: usize,
    /// Text without special tokens.
    pub text: String,
    /// Bytes of `text` that each response token covers; empty if unknown.
    pub spans: Vec<(usize, usize)>,
    /// Attention over the image tokens, if captured.
    pub attention: Option<Attention>,
    /// Newest weight version that generated one of its tokens; 0 if unknown.
    pub version: u64,
    /// Length in tokens, with the end token if it was produced; `None` if unknown.
    pub tokens: Option<usize>,
}

/// Scores a group by all components that need neither files nor other services. The breakdowns are in the order of the responses.
pub fn score_group(scoring: &Scoring, input: &GroupInput) -> Vec<Breakdown> {
    compose_breakdowns(scoring, input, compute_components(scoring, &Resources::default(), input))
}

/// Computes the raw components of this process: before gates, group masks and totals.
pub fn compute_components(scoring: &Scoring, resources: &Resources, input: &GroupInput) -> Vec<Components> {
    let names = scoring.names(&input.record.category);
    let truth = &input.record.boxes;
    let image: [u32; 2] = input.sizes.original.into();
    let r = &scoring.reward;
    let version = input.responses.iter().map(|r| r.version).max().unwrap_or(0);
    let group = GroupContext {
        scoring,
        resources,
        record: &input.record,
        image,
        overlap_rule: OverlapRule::at(&r.localization, version),
        vision_rule: VisionRule::new(&r.vision_relevance),
        relevance: relevance::ReferenceAnswer::new(scoring, resources, &input.record),
        class: scoring.class(&input.record.category),
        names,
    };
    let codec = codec(input.boxes);
    let mut region = Region::new(truth, image);
    let score_response = |response: &ResponseInput| {
        let mut out = if input.record.is_text() {
            group.masked_region_components()
        } else {
            let answer = read_answer(codec, &scoring.reader, &response.text, &input.sizes);
            group.region_components(response, &answer, &mut region)
        };
        group.add_text_components(response, &mut out);
        out
    };
    input.responses.iter().map(score_response).collect()
}

/// Applies gates and group masks to raw components and computes the totals, with the overlong punishment.
pub fn compose_breakdowns(scoring: &Scoring, input: &GroupInput, mut components: Vec<Components>) -> Vec<Breakdown> {
    // A gate on a component that does not apply to text records must not close.
    let applies = |gate: &&Gate| !(input.record.is_text() && REGION_COMPONENTS.contains(&gate.needs.as_str()));
    apply_gates(&mut components, scoring.reward.gates.iter().filter(applies));
    let weighted: Vec<WeightedComponent<'_>> = scoring
        .reward
        .components()
        .into_iter()
        .map(|(name, weight, normalise)| WeightedComponent { name, weight, normalise })
        .collect();
    let mut totals = compose(&mut components, &weighted, scoring.reward.max_eps);
    let lengths: Vec<Option<usize>> = input.responses.iter().map(|r| r.tokens).collect();
    punish(scoring, &lengths, &mut totals, &mut components);
    let responses = input.responses.iter().zip(totals).zip(components);
    responses
        .map(|((r, total), components)| Breakdown { id: input.record.id.clone(), index: r.index, total, components })
        .collect()
}

/// Data shared by the responses of a group.
struct GroupContext<'a> {
    scoring: &'a Scoring,
    resources: &'a Resources,
    record: &'a Record,
    image: [u32; 2],
    names: Vec<String>,
    class: KnownClass,
    overlap_rule: OverlapRule,
    vision_rule: VisionRule,
    relevance: relevance::ReferenceAnswer,
}

impl GroupContext<'_> {
    /// Scores a response by the components that concern regions.
    fn region_components(&self, r: &ResponseInput, answer: &GroundedAnswer, region: &mut Region<'_>) -> Components {
        let reward = &self.scoring.reward;
        let truth = &self.record.boxes;
        let label_aware = reward.localization.label_aware;
        let labels = label_aware.then(|| LabelMatches::new(answer, self.record, |label| self.scoring.names(label)));
        let agree = |predicted, truth| labels.as_ref().is_none_or(|l| l.agree(predicted, truth));
        let predicted = PredictedBoxes { boxes: &answer.boxes, says_no_finding: answer.no_finding };
        let localization =
            score_localization(predicted, TrueBoxes { boxes: truth, image: self.image }, self.overlap_rule, agree);
        let reader = &self.scoring.reader;
        let attended = AttendedResponse { text: &r.text, reader, spans: &r.spans, attention: r.attention.as_ref() };
        let vision = score_vision_relevance(attended, &self.names, region, self.vision_rule);
        let mut out = Components::new();
        let mut add = |name: &str, component: Component| out.insert(name.to_owned(), component);
        add(COMPONENTS[0], localization.with_version(localization_version(reward)));
        add(COMPONENTS[1], vision.with_version(vision_version(self.vision_rule)));
        add(COMPONENTS[2], format::score_format(answer).with_version("format-3"));
        add(COMPONENTS[3], format::score_category(answer, &self.class, !truth.is_empty()).with_version("category-2"));
        if reward.abstention.weight > 0.0 {
            add("abstention", text_quality::score_abstention(answer, !truth.is_empty()).with_version("abstention-2"));
        }
        out
    }

    /// Returns the region components of a record that is answered in text: all masked as not applicable.
    fn masked_region_components(&self) -> Components {
        let configured =
            REGION_COMPONENTS.iter().filter(|n| **n != "abstention" || self.scoring.reward.abstention.weight > 0.0);
        configured.map(|n| ((*n).to_owned(), Component::masked(MaskReason::NotApplicable))).collect()
    }

    /// Adds the components that score the text itself, for any task.
    fn add_text_components(&self, r: &ResponseInput, out: &mut Components) {
        let reward = &self.scoring.reward;
        let mut add = |name: &str, component: Component| out.insert(name.to_owned(), component);
        if reward.relevance.weight > 0.0 && reward.relevance.kind != RelevanceKind::Judge {
            let span = self.scoring.answer_span(&r.text);
            add("relevance", self.relevance.score(span.as_deref(), self.resources));
        }
        let l = &reward.length;
        if l.weight > 0.0 {
            add(
                "length",
                text_quality::score_length(&r.text, l.min_chars, l.max_chars, l.slack_chars).with_version("length-1"),
            );
        }
        if reward.repetition.weight > 0.0 {
            add(
                "repetition",
                text_quality::score_repetition(&r.text, reward.repetition.ngram).with_version("repetition-1"),
            );
        }
        if reward.symbolic.weight > 0.0 {
            let masked = || Component::masked(MaskReason::Failed("no rule table is loaded".to_owned()));
            let table = self.resources.symbolic.as_ref();
            let answer = self.scoring.reader.span(&r.text).map_or("", |span| &r.text[span]);
            let scored = table.map(|t| t.score(answer, self.record).with_version(t.version().to_owned()));
            add("symbolic", scored.unwrap_or_else(masked));
        }
    }
}

fn localization_version(reward: &Reward) -> &'static str {
    use unveil_config::schema::Overlap::{Ciou, Giou, Iou};
    match (reward.localization.overlap, reward.localization.label_aware) {
        (Iou, false) => "localization-2:iou",
        (Giou, false) => "localization-2:giou",
        (Ciou, false) => "localization-2:ciou",
        (Iou, true) => "localization-3:iou+labels",
        (Giou, true) => "localization-3:giou+labels",
        (Ciou, true) => "localization-3:ciou+labels",
    }
}

fn vision_version(rule: VisionRule) -> &'static str {
    match (rule.mode, rule.sink > 0.0) {
        (VisionMode::AllTokens, false) => "vision_relevance-2",
        (VisionMode::AllTokens, true) => "vision_relevance-3:sinks",
        (VisionMode::PaperLiteral, false) => "vision_relevance-2:literal",
        (VisionMode::PaperLiteral, true) => "vision_relevance-3:literal+sinks",
    }
}

#[cfg(test)]
mod tests {
    use unveil_core::{AnswerReader, ClassMatch};

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
    fn boxes_are_mapped_back_and_absent_attention_masks_the_group() {
        let b = score_group(&Scoring::default(), &input(&["[10,5,30,15] nodule", "no finding"]));
        let v = |i: usize, n: &str| b[i].components[n].value;
        assert_eq!((v(0, "localization"), v(0, "format"), v(0, "category")), (Some(1.0), Some(1.0), Some(1.0)));
        assert_eq!((v(1, "localization"), v(1, "format"), v(1, "category")), (Some(0.0), Some(1.0), Some(0.0)));
        assert!(b.iter().all(|b| b.components["vision_relevance"].masked));
        let w = 1.0 + 0.5 + 0.1 + 0.2;
        assert!((b[0].total.unwrap() - w).abs() < 1e-9, "all remaining components are perfect: the whole weight");
        assert!((b[1].total.unwrap() - 0.1 * w / 1.3).abs() < 1e-9);
    }

    #[test]
    fn every_box_form_scores_alike() {
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
        // Numbers written in one form are boxes elsewhere when they are read in another.
        group.boxes = BoxForm::Absolute;
        group.responses[0].text = "[100,100,300,300] nodule".into();
        let value = |g: &GroupInput| score_group(&Scoring::default(), g)[0].components["localization"].value;
        assert_eq!(value(&group), Some(0.0));
        group.boxes = BoxForm::PerMille;
        assert_eq!(value(&group), Some(1.0));
    }

    #[test]
    fn labels_curriculum_and_versions_of_localization() {
        let mut s = Scoring::default();
        s.reward.localization.label_aware = true;
        s.reward.localization.curriculum = vec![(3, 0.9)];
        let mut group = input(&["[10,5,30,14] nodule", "[10,5,30,14] mass"]);
        let value = |g: &GroupInput, i: usize| score_group(&s, g)[i].components["localization"].value.unwrap();
        assert!((value(&group, 0) - 0.9).abs() < 1e-6 && value(&group, 1) == 0.0);
        group.record.labels = vec!["mass".into()];
        assert!(value(&group, 0) == 0.0 && value(&group, 1) > 0.8);
        group.record.boxes[0].y2 = 31.0;
        group.responses[0].version = 3;
        assert_eq!(value(&group, 1), 0.0, "the group's newest token decides");
        let b = score_group(&s, &group);
        assert_eq!(b[0].components["localization"].version, "localization-3:iou+labels");
        assert!(b[0].components.values().all(|c| !c.version.is_empty()));
    }

    #[test]
    fn optional_components_appear_with_a_weight() {
        let mut s = Scoring::default();
        s.reward.length.weight = 1.0;
        s.reward.repetition.weight = 1.0;
        s.reward.abstention.weight = 1.0;
        s.reward.symbolic.weight = 1.0;
        s.reward.relevance =
            unveil_config::schema::Relevance { weight: 1.0, kind: RelevanceKind::TokenF1, ..Default::default() };
        let mut group = input(&["[10,5,30,15] nodule"]);
        group.record.answer = "1053015 mass".into();
        let b = &score_group(&s, &group)[0];
        for name in ["length", "repetition", "abstention"] {
            assert_eq!(b.components[name].value, Some(1.0), "{name}");
        }
        assert!(b.components["symbolic"].masked, "its table is not loaded");
        assert_eq!(b.components["relevance"].value, Some(0.5), "numbers without spaces are one token");
        let marks = Some(["<answer>".to_owned(), "</answer>".to_owned()]);
        s.reader = AnswerReader::new(marks, &["no finding"], ClassMatch::Equal);
        group.record.answer = "10,5,30,15".into();
        group.responses[0].text = "nodule <answer>10,5,30,15</answer>".into();
        assert_eq!(score_group(&s, &group)[0].components["relevance"].value, Some(1.0));
        group.responses[0].text = "nodule".into();
        let c = &score_group(&s, &group)[0].components["relevance"];
        assert_eq!((c.value, c.detail["no_span"]), (Some(0.0), 1.0));
    }

    #[test]
    fn text_records_have_no_mention() {
        let mut record = input(&["x"]).record;
        let mention = |record: &Record| Scoring::default().find_mention(record, "[10,5,30,15] nodule");
        assert!(mention(&record).is_some());
        record.task = unveil_core::Task::Vqa;
        assert_eq!(mention(&record), None);
    }

    #[test]
    fn synonyms_count() {
        let mut s = Scoring::default();
        s.synonyms.insert("Nodule".into(), vec!["tumour".into()]);
        let b = score_group(&s, &input(&["[10,5,30,15] Tumour"]));
        assert_eq!(b[0].components["category"].value, Some(1.0));
    }
}
