//! The objective of an update as plain numbers: which terms, with which weights and clip ranges. Must not know: tensors.

use crate::aggregate::Aggregation;
use crate::importance::Correction;
use crate::kl::{KlForm, KlGradient};
use crate::surrogate::{Clip, RatioLevel};

/// Weights, forms and clip ranges of the loss
/// `L = policy_coef L_clip + value_coef L_VF - entropy_coef S + kl_coef KL - attention_coef mean(r_att)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// c1: scale of the advantages, applied last, so that no normalisation takes it out; the same as the weight of the clipped
    /// surrogate. 0 leaves the surrogate out.
    pub policy_coef: f64,
    /// Clip ranges of the ratio.
    pub clip: Clip,
    /// What a ratio is taken over.
    pub ratio: RatioLevel,
    /// Weights for tokens of another policy than the ratio's denominator.
    pub correction: Correction,
    /// What weighs the same in policy, value, entropy and KL terms.
    pub aggregation: Aggregation,
    /// c2; 0 = no value loss.
    pub value_coef: f64,
    /// Clip range of the value loss; 0 = not clipped.
    pub value_clip: f64,
    /// c3.
    pub entropy_coef: f64,
    /// Weight of KL to the reference in the loss.
    pub kl_coef: f64,
    /// Estimator of that KL.
    pub kl_form: KlForm,
    /// Its gradient.
    pub kl_gradient: KlGradient,
    /// Weight of the differentiable vision relevance.
    pub attention_coef: f64,
}

impl Objective {
    /// The clipped surrogate alone, as a mean over tokens; other terms and choices are set field by field.
    pub fn surrogate(clip_low: f64, clip_high: f64) -> Self {
        Self {
            policy_coef: 1.0,
            clip: Clip { low: clip_low, high: clip_high, dual: None },
            ratio: RatioLevel::Token,
            correction: Correction::None,
            aggregation: Aggregation::TokenMean,
            value_coef: 0.0,
            value_clip: 0.0,
            entropy_coef: 0.0,
            kl_coef: 0.0,
            kl_form: KlForm::K3,
            kl_gradient: KlGradient::Own,
            attention_coef: 0.0,
        }
    }

    /// The objective of abnormal-aware rewarding, to be maximised: `E[L_CLIP + c1 r - c2 L_VF + c3 S]` (arXiv 2501.01377), with
    /// a symmetric clip range as in PPO. As a loss: `c1 L_clip + c2 L_VF - c3 S`.
    ///
    /// Rewards (IoU, judge scores) have no gradient, so a term `c1 r` in a loss would do nothing: they enter by the advantages,
    /// and c1 is their scale. It multiplies the advantages, not the rewards: value targets stay in the unit of the rewards, and
    /// normalised advantages are scaled as well.
    pub fn paper(c1: f64, c2: f64, c3: f64, clip: f64) -> Self {
        Self { policy_coef: c1, value_coef: c2, entropy_coef: c3, ..Self::surrogate(clip, clip) }
    }

    /// The same during critic warm-up: only the value loss is trained.
    pub fn critic_only(self) -> Self {
        Self { policy_coef: 0.0, entropy_coef: 0.0, kl_coef: 0.0, attention_coef: 0.0, ..self }
    }
}
