//! Section `[reward]`: components, their weights and normalisation, and gates.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Judge, RewardService};

/// Normalisation of a component over its group, applied before the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Normalise {
    /// No normalisation.
    #[default]
    None,
    /// Division by the group's maximum (the paper's form); all 0 if the maximum is below `reward.max_eps`.
    Max,
    /// Difference to the group's mean, divided by its standard deviation; 0 if all values are equal.
    Zscore,
}

/// Settings of a component without options.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ComponentConfig {
    /// Weight in the total, 0 or more; with 0 the component is computed and logged only.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// Normalisation over the group: `none`, `max` or `zscore`.
    pub normalise: Normalise,
}

impl Default for ComponentConfig {
    fn default() -> Self {
        Self { weight: 1.0, normalise: Normalise::None }
    }
}

/// Measure of agreement between two boxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// Intersection over union, `[0, 1]`.
    #[default]
    Iou,
    /// Generalised IoU, mapped to `[0, 1]` by (1 + x) / 2; it still varies with the distance of disjoint boxes.
    Giou,
    /// Complete IoU, mapped to `[0, 1]` by (1.5 + x) / 2.5; it also compares centres and aspect ratios.
    Ciou,
}

/// Agreement of the answer's boxes with the true ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Localization {
    /// Weight in the total, 0 or more; with 0 the component is computed and logged only.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// Normalisation over the group: `none`, `max` or `zscore`.
    pub normalise: Normalise,
    /// Measure of agreement between a box of the answer and a true box: `iou`, `giou` or `ciou`.
    pub overlap: Overlap,
    /// Matches two boxes only if their labels are equal or synonyms. A box without a label has the category of its answer or record as
    /// label.
    pub label_aware: bool,
    /// List of `[version, threshold]`: from that weight version on, matches with an IoU below the threshold (0 to 1) count as 0. Versions
    /// must increase. Empty, and before the first version: no threshold.
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

/// Formula of the vision relevance reward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VisionMode {
    /// Softmax over all image tokens, mean over the mention tokens, corrected for chance.
    AllTokens,
    /// The formula as printed in the paper: softmax over the abnormal patches only, summed; always equal to the number of mention tokens.
    PaperLiteral,
}

/// Attention of the tokens that name the class to the true boxes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VisionRelevance {
    /// Weight in the total, 0 or more; 0 disables the component, including its differentiable term.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// Normalisation over the group: `none`, `max` or `zscore`.
    pub normalise: Normalise,
    /// Formula: `all_tokens` or `paper_literal`.
    pub mode: VisionMode,
    /// Decoder layers whose attention is read, all heads of each, from 0. If `heads` is empty too: layer floor(2L/3) of L.
    pub layers: Vec<usize>,
    /// Single attention heads to read, `[layer, head]`, in addition to `layers`. The attention is averaged over everything that is read.
    pub heads: Vec<[usize; 2]>,
    /// File written by `unveil-reward calibrate`; its heads become `heads` when the configuration is loaded. Empty: no file.
    pub heads_file: String,
    /// Filter of attention sinks, image cells that attract attention regardless of the text: a factor above 1, or 0 to disable it. A cell
    /// outside the true boxes is a sink if every token without letters or digits gives it at least this many times its fair share of
    /// attention (1 / number of cells); at least two such tokens are needed. Sinks are ignored by the reward and by the `vision_relevance`
    /// of `generate` and `score`; `gradient` and `eval` use all cells.
    pub sink: f64,
    /// Scale of the differentiable attention term in the learner's loss, 0 or more, multiplied by `weight`; 0 uses the reward only.
    #[schemars(range(min = 0.0))]
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

/// Method of comparing an answer with the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RelevanceKind {
    /// Score of an external language model (`[reward.judge]`).
    #[default]
    Judge,
    /// Cosine similarity of sentence embeddings (`embedding_dir`).
    Embedding,
    /// Equality after SQuAD normalisation.
    Exact,
    /// F1 score over SQuAD tokens.
    TokenF1,
    /// ROUGE-L F-measure.
    RougeL,
    /// Sentence BLEU.
    Bleu,
    /// Correctness of the choice letter.
    Choice,
    /// Whether the most similar of the record's options is the correct one.
    Options,
}

/// Agreement of an answer with the reference answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Relevance {
    /// Weight in the total, 0 or more; with 0 the component is not computed.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// Normalisation over the group: `none`, `max` or `zscore`.
    pub normalise: Normalise,
    /// Method of comparison: `judge`, `embedding`, `exact`, `token_f1`, `rouge_l`, `bleu`, `choice` or `options`.
    pub kind: RelevanceKind,
    /// Alias of `answer.span` with arbitrary marks, `[open, close]`; applies to all components. Empty: `answer.span` applies.
    pub span: Vec<String>,
    /// Maximum number of characters of an answer that are compared.
    #[schemars(range(min = 1))]
    pub max_chars: usize,
    /// Directory of a sentence embedding model (BERT, mean pooling); required for `kind = "embedding"`.
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

/// Length of an answer: 1 within the bounds, falling linearly to 0 outside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Length {
    /// Weight in the total, 0 or more; with 0 the component is not computed.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// Normalisation over the group: `none`, `max` or `zscore`.
    pub normalise: Normalise,
    /// Minimum length that scores 1, in characters.
    pub min_chars: usize,
    /// Maximum length that scores 1, in characters.
    pub max_chars: usize,
    /// Characters beyond either bound over which the score falls to 0.
    pub slack_chars: usize,
}

impl Default for Length {
    fn default() -> Self {
        Self { weight: 0.0, normalise: Normalise::None, min_chars: 1, max_chars: 400, slack_chars: 100 }
    }
}

/// Soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), in tokens: added to the total, 0 for responses of at most
/// `rollout.max_new_tokens - interval_tokens`, from there falling linearly to -1 at `rollout.max_new_tokens`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Overlong {
    /// Factor of the punishment, 0 or more; with 0 it is not computed.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// Length of the interval in which the punishment grows, in tokens, 1 to `rollout.max_new_tokens`.
    #[schemars(range(min = 1))]
    pub interval_tokens: usize,
}

impl Default for Overlong {
    fn default() -> Self {
        Self { weight: 0.0, interval_tokens: 8 }
    }
}

/// Penalty for repeated n-grams in an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Repetition {
    /// Weight in the total, 0 or more; with 0 the component is not computed.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// Normalisation over the group: `none`, `max` or `zscore`.
    pub normalise: Normalise,
    /// Words per n-gram, at least 1.
    #[schemars(range(min = 1))]
    pub ngram: usize,
}

impl Default for Repetition {
    fn default() -> Self {
        Self { weight: 0.0, normalise: Normalise::None, ngram: 3 }
    }
}

/// Correctness of saying "no finding", or of not saying it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Abstention {
    /// Weight in the total, 0 or more; with 0 the component is not computed.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// Normalisation over the group: `none`, `max` or `zscore`.
    pub normalise: Normalise,
}

/// Symbolic checks of answers with several fields.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Symbolic {
    /// Weight in the total, 0 or more; with 0 the component is not computed.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// Normalisation over the group: `none`, `max` or `zscore`.
    pub normalise: Normalise,
    /// Rule table (TOML file); required if `weight` is above 0.
    pub table: String,
}

/// User-defined scorer behind gRPC (`grpc://`, `grpcs://`, Unveil's reward protocol) or HTTP (`http://`, `https://`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Custom {
    /// Name of the component: letters, digits and `_`, and not the name of another component.
    pub name: String,
    /// URL of the scorer.
    pub address: String,
    /// Weight in the total, 0 or more; with 0 the component is computed and logged only.
    #[serde(default = "default_weight")]
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// Normalisation over the group: `none`, `max` or `zscore`.
    #[serde(default)]
    pub normalise: Normalise,
    /// Seconds to wait for the scores of a group before they are masked.
    #[serde(default = "default_deadline_s")]
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1e6))]
    pub deadline_s: f64,
    /// `[lowest, highest]` valid value; values outside are masked.
    #[serde(default = "unit_range")]
    pub range: [f64; 2],
    /// PEM file of certificate authorities to trust in addition to the system's. Empty: the system's only.
    #[serde(default)]
    pub ca: String,
}

fn default_weight() -> f64 {
    1.0
}

fn default_threshold() -> f64 {
    1.0
}

fn default_deadline_s() -> f64 {
    5.0
}

fn unit_range() -> [f64; 2] {
    [0.0, 1.0]
}

/// Condition that sets one component to 0 unless another one is high enough.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Name of the component that is set to 0 while the gate is closed.
    pub component: String,
    /// Name of the component that opens the gate.
    pub needs: String,
    /// Minimum raw value of `needs` that opens the gate.
    #[serde(default = "default_threshold")]
    pub at_least: f64,
}

/// Reward components and the reward service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Reward {
    /// Box agreement: soft F1 over matched boxes.
    pub localization: Localization,
    /// Attention of the class tokens to the lesion.
    pub vision_relevance: VisionRelevance,
    /// Whether the answer has the expected form.
    pub format: ComponentConfig,
    /// Whether the answer names the abnormal class correctly.
    pub category: ComponentConfig,
    /// Whether the answer agrees with the reference answer.
    pub relevance: Relevance,
    /// External judge for `relevance.kind = "judge"`.
    pub judge: Judge,
    /// Whether the answer is neither too short nor too long.
    pub length: Length,
    /// Punishment of responses near the length limit.
    pub overlong: Overlong,
    /// Whether the answer avoids repeating itself.
    pub repetition: Repetition,
    /// Whether the answer says "no finding" exactly if there is none.
    pub abstention: Abstention,
    /// Whether several fields of an answer are correct and consistent.
    pub symbolic: Symbolic,
    /// User-defined scorers.
    pub custom: Vec<Custom>,
    /// Components that count only if another component is high enough.
    pub gates: Vec<Gate>,
    /// Epsilon of `normalise = "max"`: a group whose maximum is below it scores 0.
    #[schemars(range(min = 0.0))]
    pub max_eps: f64,
    /// Listen address `host:port` of `unveil reward serve`; port 0 picks a free one.
    pub listen: String,
    /// Address of the reward service for rollout workers (`http://host:port` or `https://host:port`). Empty: the service that `unveil
    /// train` starts.
    pub address: String,
    /// Seconds that a rollout worker waits for the scores of a group before it masks them, above 0.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
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
            overlong: Overlong::default(),
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
    /// Returns name, weight and normalisation of every component that is computed under this configuration, in a fixed order: the first
    /// four always, the others if they have a weight, then the custom ones.
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
