//! The section `[reward]`: components, their weights and normalisation, and how they make a total.

use serde::{Deserialize, Serialize};

use super::{Judge, RewardService};

/// How a component is normalised over its group before weighting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalise {
    /// As it is.
    #[default]
    None,
    /// Divided by the group's maximum; all below epsilon -> 0 (the paper's form).
    Max,
    /// Minus the group's mean, over its standard deviation; 0 when they are all equal.
    Zscore,
}

/// What every component has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ComponentConfig {
    /// Weight in the total; 0 = off (not computed into the total, still logged).
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
}

impl Default for ComponentConfig {
    fn default() -> Self {
        Self { weight: 1.0, normalise: Normalise::None }
    }
}

/// How two boxes are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// Intersection over union, `[0, 1]`.
    #[default]
    Iou,
    /// Generalised IoU, mapped by (1 + x) / 2: boxes apart still differ by their distance.
    Giou,
    /// Complete IoU, mapped by (1.5 + x) / 2.5: also centres and aspect ratios.
    Ciou,
}

/// Localization.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Localization {
    /// Weight in the total; 0 = only logged.
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
    /// How a box of the answer is compared with a true one.
    pub overlap: Overlap,
    /// Two boxes are matched only where they bear the same label or a synonym. The label of a box is its own, else its side's category.
    pub label_aware: bool,
    /// `[version, IoU]`: from that weight version on, a match below that IoU counts 0. Versions rise from 0; before the first, no threshold.
    pub curriculum: Vec<(u64, f64)>,
}

impl Default for Localization {
    fn default() -> Self {
        Self {
            weight: 1.0,
            normalise: Normalise::None,
            overlap: Overlap::Iou,
            label_aware: false,
            curriculum: Vec::new(),
        }
    }
}

/// Form of the vision relevance reward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VisionMode {
    /// Softmax over all image tokens, mean over mention tokens, chance-corrected.
    AllTokens,
    /// As printed: softmax over the abnormal patches only, summed; identically the number of mention tokens.
    PaperLiteral,
}

/// Vision relevance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VisionRelevance {
    /// Weight in the total; 0 switches the component off whole, its differentiable term too.
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
    /// Form.
    pub mode: VisionMode,
    /// Decoder layers whose attention is read, all heads of each (0-based); with `heads` empty too, the layer floor(2L/3).
    pub layers: Vec<usize>,
    /// Single heads that are read besides: `[layer, head]`. Rows are averaged over all that is read.
    pub heads: Vec<[usize; 2]>,
    /// File that `unveil-reward calibrate` wrote: its heads become `heads` when the configuration is loaded; empty = none.
    pub heads_file: String,
    /// A cell outside the boxes that every token without a letter or digit (two at least) gives so many times its fair share is a sink, and
    /// left out of the reward and of what `generate` and `score` print; 0 = none is. `gradient` and `eval` look at all cells.
    pub sink: f64,
    /// Scale of the differentiable attention term in the learner's loss, times `weight`; 0 = reward only.
    pub gradient: f64,
}

impl Default for VisionRelevance {
    fn default() -> Self {
        Self {
            weight: 0.5,
            normalise: Normalise::None,
            mode: VisionMode::AllTokens,
            layers: Vec::new(),
            heads: Vec::new(),
            heads_file: String::new(),
            sink: 0.0,
            gradient: 0.0,
        }
    }
}

/// Who says how well an answer agrees with the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RelevanceKind {
    /// An external language model (`[reward.judge]`).
    #[default]
    Judge,
    /// Cosine of sentence embeddings (`embedding_dir`).
    Embedding,
    /// Equal after SQuAD's normalisation.
    Exact,
    /// F1 over SQuAD's tokens.
    TokenF1,
    /// ROUGE-L F-measure.
    RougeL,
    /// Sentence BLEU.
    Bleu,
    /// The right choice letter.
    Choice,
    /// The most similar of the record's options is the right one.
    Options,
}

/// Relevance of an answer: does it say what the reference says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Relevance {
    /// Weight in the total; 0 = not computed.
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
    /// Who says it.
    pub kind: RelevanceKind,
    /// `[open, close]`: another way to write `answer.span`, with marks of any kind; it holds for all components. Empty = as `answer.span`
    /// says.
    pub span: Vec<String>,
    /// Characters of an answer that are looked at.
    pub max_chars: usize,
    /// Directory of a sentence embedding model (BERT, mean pooling) for `kind = "embedding"`.
    pub embedding_dir: String,
}

impl Default for Relevance {
    fn default() -> Self {
        Self {
            weight: 0.0,
            normalise: Normalise::None,
            kind: RelevanceKind::Judge,
            span: Vec::new(),
            max_chars: 2000,
            embedding_dir: String::new(),
        }
    }
}

/// Length of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Length {
    /// Weight in the total; 0 = not computed.
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
    /// Shortest answer that scores 1, in characters.
    pub min_chars: usize,
    /// Longest answer that scores 1, in characters.
    pub max_chars: usize,
    /// Characters beyond either over which the score falls to 0.
    pub slack_chars: usize,
}

impl Default for Length {
    fn default() -> Self {
        Self { weight: 0.0, normalise: Normalise::None, min_chars: 1, max_chars: 400, slack_chars: 100 }
    }
}

/// Repetition in an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Repetition {
    /// Weight in the total; 0 = not computed.
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
    /// Words per n-gram.
    pub ngram: usize,
}

impl Default for Repetition {
    fn default() -> Self {
        Self { weight: 0.0, normalise: Normalise::None, ngram: 3 }
    }
}

/// The right to say "no finding".
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Abstention {
    /// Weight in the total; 0 = not computed.
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
}

/// Symbolic checks of multi-step answers.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Symbolic {
    /// Weight in the total; 0 = not computed.
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
    /// Rule table (TOML).
    pub table: String,
}

/// A scorer of the user's own, behind gRPC (`grpc://`, `grpcs://`: the same protocol) or HTTP (`http://`, `https://`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Custom {
    /// Name of the component.
    pub name: String,
    /// Where it is.
    pub address: String,
    /// Weight in the total; 0 = only logged.
    #[serde(default = "one")]
    pub weight: f64,
    /// Normalisation over the group.
    #[serde(default)]
    pub normalise: Normalise,
    /// Seconds to wait for a group before masking it.
    #[serde(default = "five")]
    pub deadline_s: f64,
    /// `[lowest, highest]` value; one outside is masked.
    #[serde(default = "unit")]
    pub range: [f64; 2],
    /// PEM file of certificate authorities trusted beside the system's; empty = none.
    #[serde(default)]
    pub ca: String,
}

fn one() -> f64 {
    1.0
}

fn five() -> f64 {
    5.0
}

fn unit() -> [f64; 2] {
    [0.0, 1.0]
}

/// A component that counts only where another one is high enough.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// The component that is let through or set to 0.
    pub component: String,
    /// The component that decides.
    pub needs: String,
    /// Its lowest raw value that lets through.
    #[serde(default = "one")]
    pub at_least: f64,
}

/// Reward components and the service around them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reward {
    /// Box agreement: soft F1 over matched boxes.
    pub localization: Localization,
    /// Attention of the class tokens on the lesion.
    pub vision_relevance: VisionRelevance,
    /// The answer has the form that was asked for.
    pub format: ComponentConfig,
    /// The abnormal class is named right.
    pub category: ComponentConfig,
    /// The answer says what the reference says.
    pub relevance: Relevance,
    /// The external judge of `relevance.kind = "judge"`.
    pub judge: Judge,
    /// The answer is neither too short nor too long.
    pub length: Length,
    /// The answer does not repeat itself.
    pub repetition: Repetition,
    /// "No finding" is said where nothing is to be found, and only there.
    pub abstention: Abstention,
    /// Several fields of an answer are right, and go together.
    pub symbolic: Symbolic,
    /// Scorers of the user's own.
    pub custom: Vec<Custom>,
    /// Components that count only where another one is high enough.
    pub gates: Vec<Gate>,
    /// Epsilon of `normalise = "max"`.
    pub max_eps: f64,
    /// Listen address of `reward serve`; port 0 = any free one.
    pub listen: String,
    /// Where rollout workers find the service (`http://host:port`, or `https://`); empty = the one that `train` starts.
    pub address: String,
    /// Seconds a rollout worker waits for a group's scores before masking them.
    pub deadline_s: f64,
    /// Limits of the service.
    pub service: RewardService,
}

impl Default for Reward {
    fn default() -> Self {
        Self {
            localization: Localization::default(),
            vision_relevance: VisionRelevance::default(),
            format: ComponentConfig { weight: 0.1, ..Default::default() },
            category: ComponentConfig { weight: 0.2, ..Default::default() },
            relevance: Relevance::default(),
            judge: Judge::default(),
            length: Length::default(),
            repetition: Repetition::default(),
            abstention: Abstention::default(),
            symbolic: Symbolic::default(),
            custom: Vec::new(),
            gates: Vec::new(),
            max_eps: 1e-6,
            listen: "127.0.0.1:0".into(),
            address: String::new(),
            deadline_s: 30.0,
            service: RewardService::default(),
        }
    }
}

impl Reward {
    /// Name, weight and normalisation of every component that is computed under this configuration, in a fixed order: the first
    /// four always, the others where they have a weight, then the user's own.
    pub fn components(&self) -> Vec<(&str, f64, Normalise)> {
        let mut out = vec![
            ("localization", self.localization.weight, self.localization.normalise),
            ("vision_relevance", self.vision_relevance.weight, self.vision_relevance.normalise),
            ("format", self.format.weight, self.format.normalise),
            ("category", self.category.weight, self.category.normalise),
        ];
        let optional = [
            ("relevance", self.relevance.weight, self.relevance.normalise),
            ("length", self.length.weight, self.length.normalise),
            ("repetition", self.repetition.weight, self.repetition.normalise),
            ("abstention", self.abstention.weight, self.abstention.normalise),
            ("symbolic", self.symbolic.weight, self.symbolic.normalise),
        ];
        out.extend(optional.into_iter().filter(|(_, weight, _)| *weight > 0.0));
        out.extend(self.custom.iter().map(|c| (c.name.as_str(), c.weight, c.normalise)));
        out
    }
}
