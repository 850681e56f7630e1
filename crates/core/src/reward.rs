//! Reward of one response: components with value, mask and reason. Owns the JSON shape that scripts read.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::answer::ParseFault;

/// Attention of response tokens over the image tokens (contract of R.jsonl).
///
/// `rows[k]` belongs to response token `tokens[k]` (0-based): the forward pass whose *input* is that token; softmax over the
/// image tokens only, so each row sums to 1 and has `grid[0] * grid[1]` values in row-major order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    /// `[rows, cols]` of the merged image-token grid.
    pub grid: [usize; 2],
    /// Response token indices.
    pub tokens: Vec<usize>,
    /// One row per entry of `tokens`.
    pub rows: Vec<Vec<f32>>,
}

/// Difference from their mean up to which rewards count as equal.
const EQUAL_REWARDS: f64 = 1e-9;

/// Returns whether a group has rewards and all of them are equal (within 1e-9), so that its relative advantages are exactly 0. Rewards that
/// are masked (`None`) or not finite are left out.
pub fn rewards_are_equal(totals: &[Option<f64>]) -> bool {
    let values: Vec<f64> = totals.iter().flatten().copied().filter(|v| v.is_finite()).collect();
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    !values.is_empty() && values.iter().all(|v| (v - mean).abs() <= EQUAL_REWARDS)
}

/// Reason why a component has no value, or a remark on its value. A masked component is never 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskReason {
    /// The sample has no true box, or the boxes cover the whole image.
    NotApplicable,
    /// Attention rows were not sent or do not match the response.
    NoAttention,
    /// The scorer failed, or its result cannot be used.
    Failed(String),
    /// The external scorer is unreachable, overloaded, too slow, or rejects our credentials. The same call may succeed later.
    Unavailable(String),
    /// Another response of the group had this component masked.
    GroupMasked,
    /// Remark, not a mask: the component is 0 because the response breaks this rule of the configured form.
    Form(ParseFault),
}

/// Score of one true lesion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LesionScore {
    /// Index of the true box.
    pub truth: usize,
    /// Index of the answer's box matched with it; `None` if no box is left for it.
    pub predicted: Option<usize>,
    /// IoU of the two boxes, `[0, 1]`; 0 without a match.
    pub iou: f64,
    /// Contribution of the match to the score, in `[0, 1]`: the configured overlap, 0 below the threshold or under a different label.
    pub counted: f64,
}

/// One component of the reward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Component {
    /// Raw value in the scorer's stated range; `None` when masked.
    pub value: Option<f64>,
    /// Whether the component is masked (the value could not be computed).
    pub masked: bool,
    /// Reason for the mask, or a remark of the scorer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<MaskReason>,
    /// Additional measurements (lift, matched boxes…), for logs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub detail: BTreeMap<String, f64>,
    /// Scores per true lesion; localization only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lesions: Vec<LesionScore>,
    /// Version of the scorer (and of its prompt or table); empty if no scorer ran.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub version: Cow<'static, str>,
}

impl Component {
    /// Creates a component with a value.
    pub fn value(value: f64) -> Self {
        Self {
            value: Some(value),
            masked: false,
            reason: None,
            detail: BTreeMap::new(),
            lesions: Vec::new(),
            version: Cow::Borrowed(""),
        }
    }

    /// Creates a masked component.
    pub fn masked(reason: MaskReason) -> Self {
        Self {
            value: None,
            masked: true,
            reason: Some(reason),
            detail: BTreeMap::new(),
            lesions: Vec::new(),
            version: Cow::Borrowed(""),
        }
    }

    /// Sets the version of the scorer.
    pub fn with_version(mut self, version: impl Into<Cow<'static, str>>) -> Self {
        self.version = version.into();
        self
    }

    /// Adds a remark to a component with a value.
    pub fn with_remark(mut self, remark: Option<MaskReason>) -> Self {
        self.reason = remark;
        self
    }

    /// Adds an additional measurement.
    pub fn with_detail(mut self, key: &str, value: f64) -> Self {
        self.detail.insert(key.to_owned(), value);
        self
    }
}

/// The reward of one response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Breakdown {
    /// Group key.
    pub id: String,
    /// Position within the group.
    pub index: usize,
    /// Weighted total; `None` when every component of the group is masked.
    pub total: Option<f64>,
    /// Components by name.
    pub components: BTreeMap<String, Component>,
}
