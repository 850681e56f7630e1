//! The facade: one group in, one breakdown per response out. Pure, no I/O, never panics on what a text holds.

use std::collections::BTreeMap;

use unveil_config::Config;
use unveil_config::schema::{Gate, RelevanceKind, Reward, VisionMode};
use unveil_core::answer::fold;
use unveil_core::{Attention, BoxForm, Breakdown, ClassMatch, Component, KnownClass, MaskReason, Reading, Record};
use unveil_data::codec::{GroundedAnswer, Sizes, codec, read_answer};

use crate::compose::{Part, apply_gates, compose};
use crate::embed::Embedder;
use crate::labels::Labels;
use crate::localization::{Claim, Rule, Truth, localize};
use crate::mention::mention;
use crate::symbolic::RuleTable;
use crate::text::clean::visible;
use crate::vision::{Region, Seen, VisionRule, look};
use crate::{form, relevance, style};

/// Names of the components that every breakdown has; the others are there where they are configured.
pub const COMPONENTS: [&str; 4] = ["localization", "vision_relevance", "format", "category"];

/// Names of the components that speak of regions; for records that are answered in text they are masked.
pub const OF_REGIONS: [&str; 5] = ["localization", "vision_relevance", "format", "category", "abstention"];

/// What scoring needs to know of the configuration.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Scoring {
    /// Weights, normalisation, modes.
    pub reward: Reward,
    /// Category in words -> synonyms that count as the same.
    pub synonyms: BTreeMap<String, Vec<String>>,
    /// How answers are read.
    pub reading: Reading,
}

impl Scoring {
    /// The part of a run's configuration that enters scores.
    pub fn new(config: &Config) -> Self {
        let (reward, synonyms) = (config.reward.clone(), config.data.synonyms.clone());
        Self { reward, synonyms, reading: config.reading() }
    }

    /// The category and its synonyms (looked up as names are compared, folded).
    pub fn names(&self, category: &str) -> Vec<String> {
        let wanted = fold(category);
        let synonyms = self.synonyms.iter().filter(|(k, _)| fold(k) == wanted).flat_map(|(_, v)| v.iter().cloned());
        std::iter::once(category.to_owned()).chain(synonyms).collect()
    }

    /// The class of a record as answers may name it, told from every other class that has synonyms.
    pub fn class(&self, category: &str) -> KnownClass {
        let others: Vec<String> = match self.reading.matching {
            ClassMatch::Equal => Vec::new(),
            ClassMatch::Contains => self.synonyms.iter().flat_map(|(k, v)| v.iter().chain([k]).cloned()).collect(),
        };
        KnownClass::new(&self.names(category), &others, self.reading.matching)
    }

    /// Bytes of a response that name its record's class first; none where its answer does not, or the record is answered in text. The
    /// same for rewards, gradients, evaluation and pages.
    pub fn mention(&self, record: &Record, text: &str) -> Option<std::ops::Range<usize>> {
        if record.is_text() { None } else { mention(&self.reading, text, &self.names(&record.category)) }
    }

    /// What stands in a text that a relevance scorer may look at: the answer without what hides, cut. None = there is no answer.
    pub fn answer_span(&self, text: &str) -> Option<String> {
        Some(visible(&text[self.reading.span(text)?], self.reward.relevance.max_chars))
    }

    /// Asks an external judge.
    pub(crate) fn asks_judge(&self) -> bool {
        self.reward.relevance.weight > 0.0 && self.reward.relevance.kind == RelevanceKind::Judge
    }
}

/// What is read from files once; empty where nothing is configured.
#[derive(Debug, Default)]
pub struct Resources {
    /// Rule table of the symbolic scorer.
    pub symbolic: Option<RuleTable>,
    /// Model of the embedding similarity.
    pub embedder: Option<Embedder>,
}

/// Components of one response, by name.
pub type Components = BTreeMap<String, Component>;

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
    /// Newest weight version that made one of its tokens; where it is not known, 0.
    pub version: u64,
}

/// Scores a group by what needs neither files nor other services: every such component, masks, totals. Same order as the
/// responses.
pub fn score_group(scoring: &Scoring, input: &GroupInput) -> Vec<Breakdown> {
    finish(scoring, input, components(scoring, &Resources::default(), input))
}

/// The components that are computed in this process, raw: before gates, masks of the group and totals.
pub fn components(scoring: &Scoring, resources: &Resources, input: &GroupInput) -> Vec<Components> {
    let names = scoring.names(&input.record.category);
    let truth = &input.record.boxes;
    let image: [u32; 2] = input.sizes.original.into();
    let r = &scoring.reward;
    let version = input.responses.iter().map(|r| r.version).max().unwrap_or(0);
    let group = Shared {
        scoring,
        resources,
        record: &input.record,
        image,
        rule: Rule::at(&r.localization, version),
        look: VisionRule::new(&r.vision_relevance),
        relevance: relevance::Reference::new(scoring, resources, &input.record),
        class: scoring.class(&input.record.category),
        names,
    };
    let codec = codec(input.boxes);
    let mut region = Region::new(truth, image);
    let one = |response: &ResponseInput| {
        let mut out = if input.record.is_text() {
            group.masked_regions()
        } else {
            let answer = read_answer(codec, &scoring.reading, &response.text, &input.sizes);
            group.regions(response, &answer, &mut region)
        };
        group.texts(response, &mut out);
        out
    };
    input.responses.iter().map(one).collect()
}

/// Gates, masks of the group, totals.
pub fn finish(scoring: &Scoring, input: &GroupInput, mut components: Vec<Components>) -> Vec<Breakdown> {
    // What a text record has no value of cannot hold anything back.
    let speaks = |gate: &&Gate| !(input.record.is_text() && OF_REGIONS.contains(&gate.needs.as_str()));
    apply_gates(&mut components, scoring.reward.gates.iter().filter(speaks));
    let parts: Vec<Part<'_>> = scoring
        .reward
        .components()
        .into_iter()
        .map(|(name, weight, normalise)| Part { name, weight, normalise })
        .collect();
    let totals = compose(&mut components, &parts, scoring.reward.max_eps);
    let responses = input.responses.iter().zip(totals).zip(components);
    responses
        .map(|((r, total), components)| Breakdown { id: input.record.id.clone(), index: r.index, total, components })
        .collect()
}

/// What the responses of a group have in common.
struct Shared<'a> {
    scoring: &'a Scoring,
    resources: &'a Resources,
    record: &'a Record,
    image: [u32; 2],
    names: Vec<String>,
    class: KnownClass,
    rule: Rule,
    look: VisionRule,
    relevance: relevance::Reference,
}

impl Shared<'_> {
    /// Components that speak of regions.
    fn regions(&self, r: &ResponseInput, answer: &GroundedAnswer, region: &mut Region<'_>) -> Components {
        let reward = &self.scoring.reward;
        let truth = &self.record.boxes;
        let aware = reward.localization.label_aware;
        let labels = aware.then(|| Labels::new(answer, self.record, |label| self.scoring.names(label)));
        let agree = |predicted, truth| labels.as_ref().is_none_or(|l| l.agree(predicted, truth));
        let claim = Claim { boxes: &answer.boxes, says_none: answer.no_finding };
        let place = localize(claim, Truth { boxes: truth, image: self.image }, self.rule, agree);
        let reading = &self.scoring.reading;
        let seen = Seen { text: &r.text, reading, spans: &r.spans, attention: r.attention.as_ref() };
        let vision = look(seen, &self.names, region, self.look);
        let mut out = Components::new();
        let mut add = |name: &str, component: Component| out.insert(name.to_owned(), component);
        add(COMPONENTS[0], place.by(localization_version(reward)));
        add(COMPONENTS[1], vision.by(vision_version(self.look)));
        add(COMPONENTS[2], form::format(answer).by("format-2"));
        add(COMPONENTS[3], form::category(answer, &self.class, !truth.is_empty()).by("category-2"));
        if reward.abstention.weight > 0.0 {
            add("abstention", style::abstention(answer, !truth.is_empty()).by("abstention-2"));
        }
        out
    }

    /// The same for a record that is answered in text: none of them applies.
    fn masked_regions(&self) -> Components {
        let configured =
            OF_REGIONS.iter().filter(|n| **n != "abstention" || self.scoring.reward.abstention.weight > 0.0);
        configured.map(|n| ((*n).to_owned(), Component::masked(MaskReason::NotApplicable))).collect()
    }

    /// Components that speak of what is said, whatever was asked for.
    fn texts(&self, r: &ResponseInput, out: &mut Components) {
        let reward = &self.scoring.reward;
        let mut add = |name: &str, component: Component| out.insert(name.to_owned(), component);
        if reward.relevance.weight > 0.0 && reward.relevance.kind != RelevanceKind::Judge {
            let span = self.scoring.answer_span(&r.text);
            add("relevance", self.relevance.score(span.as_deref(), self.resources));
        }
        let l = &reward.length;
        if l.weight > 0.0 {
            add("length", style::length(&r.text, l.min_chars, l.max_chars, l.slack_chars).by("length-1"));
        }
        if reward.repetition.weight > 0.0 {
            add("repetition", style::repetition(&r.text, reward.repetition.ngram).by("repetition-1"));
        }
        if reward.symbolic.weight > 0.0 {
            let masked = || Component::masked(MaskReason::Failed("no rule table is loaded".to_owned()));
            let table = self.resources.symbolic.as_ref();
            let said = self.scoring.reading.span(&r.text).map_or("", |span| &r.text[span]);
            let scored = table.map(|t| t.score(said, self.record).by(t.version().to_owned()));
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
    fn versions_labels_and_the_curriculum() {
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
    fn optional_components_are_there_when_they_have_a_weight() {
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
        s.reading = Reading::new(marks, &["no finding"], ClassMatch::Equal);
        group.record.answer = "10,5,30,15".into();
        group.responses[0].text = "nodule <answer>10,5,30,15</answer>".into();
        assert_eq!(score_group(&s, &group)[0].components["relevance"].value, Some(1.0));
        group.responses[0].text = "nodule".into();
        let c = &score_group(&s, &group)[0].components["relevance"];
        assert_eq!((c.value, c.detail["no_span"]), (Some(0.0), 1.0));
    }

    #[test]
    fn what_is_answered_in_text_mentions_no_class() {
        let mut record = input(&["x"]).record;
        let said = |record: &Record| Scoring::default().mention(record, "[10,5,30,15] nodule");
        assert!(said(&record).is_some());
        record.task = unveil_core::Task::Vqa;
        assert_eq!(said(&record), None);
    }

    #[test]
    fn synonyms_count() {
        let mut s = Scoring::default();
        s.synonyms.insert("Nodule".into(), vec!["tumour".into()]);
        let b = score_group(&s, &input(&["[10,5,30,15] Tumour"]));
        assert_eq!(b[0].components["category"].value, Some(1.0));
    }
}
