//! Groups with their responses and rewards, as rollout workers submit them and the trainer takes them.

use std::sync::Arc;

use bytes::Bytes;

use crate::geometry::Grid;
use crate::group::{Finish, GroupId, Response};
use crate::prompt::Prompt;
use crate::record::Record;
use crate::reward::{Attention, Breakdown, rewards_are_equal};

/// Prompt and image of one group.
#[derive(Debug, Clone)]
pub struct GroupInput {
    /// The record; boxes are in pixels of the image that the policy saw.
    pub record: Record,
    /// Width and height of that image in pixels.
    pub image_size: (u32, u32),
    /// Prompt with image placeholders expanded.
    pub prompt: Prompt,
    /// Flattened patches `[t*h*w, patch length]` of the image.
    pub patches: Vec<f32>,
    /// Grid of image tokens after merging.
    pub merged: Grid,
    /// The encoded image as it was leased; empty if it was not leased.
    pub encoded: Bytes,
}

/// A group with its responses and rewards, as submitted by a rollout worker.
#[derive(Debug, Clone)]
pub struct TrainGroup {
    /// Pass, position and record.
    pub id: GroupId,
    /// Name of the worker that generated it; empty if unknown.
    pub worker: String,
    /// Prompt and image.
    pub input: Arc<GroupInput>,
    /// The n responses.
    pub responses: Vec<Response>,
    /// Per response, the byte range of its text that each token covers.
    pub spans: Vec<Vec<(usize, usize)>>,
    /// Reward breakdown per response.
    pub breakdowns: Vec<Breakdown>,
    /// Per response, attention rows of the tokens that name the class, if the worker sent them; kept for the report.
    pub attention: Vec<Option<Attention>>,
    /// Duration of generation in ms.
    pub generate_ms: f64,
    /// Duration of scoring in ms.
    pub reward_ms: f64,
}

impl TrainGroup {
    /// Returns the total rewards in the order of the responses; `None` for a masked response or one without a breakdown.
    pub fn totals(&self) -> Vec<Option<f64>> {
        let total = |r: &Response| self.breakdowns.iter().find(|b| b.index == r.index).and_then(|b| b.total);
        self.responses.iter().map(total).collect()
    }

    /// Returns whether the group can be trained on: some response has tokens and a reward.
    pub fn is_rewarded(&self) -> bool {
        self.responses.iter().zip(self.totals()).any(|(r, total)| total.is_some() && !r.tokens.is_empty())
    }

    /// Returns the positions of the responses that enter the loss: those with tokens and a reward and, with `overlong_filter`, not cut at
    /// the length limit.
    pub fn responses_in_loss(&self, overlong_filter: bool) -> Vec<usize> {
        let enters = |(r, total): (&Response, Option<f64>)| {
            total.is_some() && !r.tokens.is_empty() && !(overlong_filter && r.finish == Finish::Length)
        };
        let entering: Vec<bool> = self.responses.iter().zip(self.totals()).map(enters).collect();
        (0..entering.len()).filter(|i| entering[*i]).collect()
    }

    /// Returns whether an algorithm that compares responses has nothing to learn from the group: all its rewards are equal, or no
    /// rewarded response enters the loss. A group without any reward, which can be scored again, does not count.
    pub fn teaches_nothing(&self, overlong_filter: bool) -> bool {
        self.is_rewarded() && (rewards_are_equal(&self.totals()) || self.responses_in_loss(overlong_filter).is_empty())
    }
}
