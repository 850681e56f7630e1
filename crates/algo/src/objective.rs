//! The objective of an update: its terms with their coefficients, forms and clip ranges.

use unveil_core::{Importance, KlForm, KlGradient, LossReduction, RatioLevel, Surrogate};

use crate::surrogate::ClipRange;

/// Coefficients, forms and clip ranges of the loss
/// `L = policy_coef L_clip + value_coef L_VF - entropy_coef S + kl_coef KL - attention_coef mean(r_att)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// c1: scale of the advantages, applied after normalisation, which would cancel it; equivalent to the coefficient of the clipped
    /// surrogate. 0 omits the surrogate.
    pub policy_coef: f64,
    /// Form of the policy loss, `L_clip` above.
    pub surrogate: Surrogate,
    /// Clip ranges of the ratio.
    pub clip: ClipRange,
    /// Whether ratios are per token or per response.
    pub ratio: RatioLevel,
    /// Importance weights for tokens of a policy other than the ratio's denominator.
    pub importance: Importance,
    /// Bound of these weights with [`Importance::Truncate`] and [`Importance::Mask`], at least 1.
    pub importance_cap: f64,
    /// Loss reduction of the policy, value, entropy and KL terms.
    pub reduction: LossReduction,
    /// Maximum response length in sampling, the divisor of [`LossReduction::SequenceMaxLength`].
    pub max_length: u64,
    /// c2, coefficient of the value loss; 0: no value loss.
    pub value_coef: f64,
    /// Clip range of the value loss; 0: not clipped.
    pub value_clip: f64,
    /// c3, coefficient of the entropy bonus.
    pub entropy_coef: f64,
    /// Coefficient of the KL to the reference in the loss.
    pub kl_coef: f64,
    /// Estimator of that KL.
    pub kl_form: KlForm,
    /// Gradient of that KL.
    pub kl_gradient: KlGradient,
    /// Coefficient of the differentiable vision relevance.
    pub attention_coef: f64,
}

impl Objective {
    /// Returns the clipped surrogate only, as a mean over tokens; other terms and options are set field by field.
    pub fn surrogate(clip_low: f64, clip_high: f64) -> Self {
        Self {
            policy_coef: 1.0,
            surrogate: Surrogate::Clip,
            clip: ClipRange { low: clip_low, high: clip_high, dual: None },
            ratio: RatioLevel::Token,
            importance: Importance::None,
            importance_cap: f64::INFINITY,
            reduction: LossReduction::Token,
            max_length: 1,
            value_coef: 0.0,
            value_clip: 0.0,
            entropy_coef: 0.0,
            kl_coef: 0.0,
            kl_form: KlForm::K3,
            kl_gradient: KlGradient::Own,
            attention_coef: 0.0,
        }
    }

    /// Returns the objective of abnormal-aware rewarding, which maximises `E[L_CLIP + c1 r - c2 L_VF + c3 S]` (arXiv 2501.01377), with a
    /// symmetric clip range as in PPO. As a loss: `c1 L_clip + c2 L_VF - c3 S`.
    ///
    /// Rewards (IoU, judge scores) have no gradient, so a term `c1 r` in a loss would have no effect: they enter through the advantages,
    /// and c1 is their scale. It multiplies the advantages and not the rewards, so that value targets keep the unit of the rewards and
    /// normalised advantages are scaled as well.
    pub fn paper(c1: f64, c2: f64, c3: f64, clip: f64) -> Self {
        Self { policy_coef: c1, value_coef: c2, entropy_coef: c3, ..Self::surrogate(clip, clip) }
    }

    /// Returns the objective during critic warm-up, with only the value loss.
    pub fn critic_only(self) -> Self {
        Self { policy_coef: 0.0, entropy_coef: 0.0, kl_coef: 0.0, attention_coef: 0.0, ..self }
    }
}
