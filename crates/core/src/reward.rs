//! What a reward says of one response: components with value, mask and reason. Owns the JSON shape that scripts read.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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

/// Why a component has no value. Masked is never 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskReason {
    /// The sample has no true box, or the boxes cover the whole image.
    NotApplicable,
    /// Attention rows were not sent or do not match the response.
    NoAttention,
    /// The scorer failed, or what it said cannot be used.
    Failed(String),
    /// Whoever computes it could not be had: away, overloaded, too slow, or it does not let us in. The same call may succeed later.
    Unavailable(String),
    /// Another response of the group had this component masked.
    GroupMasked,
}

/// How one true lesion was met.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LesionScore {
    /// Which true box.
    pub truth: usize,
    /// The box of the answer that it is matched with; absent when none is left for it.
    pub predicted: Option<usize>,
    /// IoU of the two, `[0, 1]`; 0 where there is no match.
    pub iou: f64,
    /// What the match adds to the score, in `[0, 1]`: the configured overlap, 0 below the threshold or under another label.
    pub counted: f64,
}

/// One component of the reward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Component {
    /// Raw value in the scorer's stated range; absent when masked.
    pub value: Option<f64>,
    /// True when the value could not be computed.
    pub masked: bool,
    /// Why it is masked, or what the scorer noticed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<MaskReason>,
    /// Side measurements (lift, matched boxes…), for logs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub detail: BTreeMap<String, f64>,
    /// Localization: one entry per true lesion.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lesions: Vec<LesionScore>,
    /// Which scorer (and prompt or table) made it; empty when nobody did.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub version: Cow<'static, str>,
}

impl Component {
    /// A component with a value.
    pub fn value(value: f64) -> Self {
        let (detail, lesions) = (BTreeMap::new(), Vec::new());
        Self { value: Some(value), masked: false, reason: None, detail, lesions, version: Cow::Borrowed("") }
    }

    /// A component that could not be computed.
    pub fn masked(reason: MaskReason) -> Self {
        let (detail, lesions) = (BTreeMap::new(), Vec::new());
        Self { value: None, masked: true, reason: Some(reason), detail, lesions, version: Cow::Borrowed("") }
    }

    /// Says who made it.
    pub fn by(mut self, version: impl Into<Cow<'static, str>>) -> Self {
        self.version = version.into();
        self
    }

    /// Adds a side measurement.
    pub fn with(mut self, key: &str, value: f64) -> Self {
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
    /// Weighted total; absent when every component of the group is masked.
    pub total: Option<f64>,
    /// By component name.
    pub components: BTreeMap<String, Component>,
}
