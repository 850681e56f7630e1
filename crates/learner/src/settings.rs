//! Everything of the configuration that enters a policy update, in one place that a test or a dump can fill by hand.

use tch::Kind;
use unveil_algo::{Aggregation, Clip, Correction, Estimator, KlController, KlForm, KlGradient, Objective, RatioLevel};
use unveil_config::Config;
use unveil_config::schema::{self, Algorithm, Critic, Importance, KlPlace, LossMean, Optimizer, RatioBase, Whiten};
use unveil_model::{AttentionSet, Vlm};
use unveil_reward::Scoring;

use crate::freeze::Freezing;

/// Everything of the configuration that enters an update.
#[derive(Debug, Clone)]
pub struct StepSettings {
    /// How rewards become advantages.
    pub estimator: Estimator,
    /// Normalise advantages over the batch.
    pub whiten: bool,
    /// Clip ranges, forms and weights of the loss. `kl_coef` is where the weight of KL starts, in the loss or in the reward.
    pub objective: Objective,
    /// What the ratio is taken to.
    pub ratio_to: RatioBase,
    /// Whether KL is part of the loss or of the reward.
    pub kl_in: KlPlace,
    /// KL per response in nats that its weight is steered towards; 0 = the weight stays.
    pub kl_target: f64,
    /// Relative change of that weight at a relative error of 1.
    pub kl_gain: f64,
    /// What values are computed from.
    pub critic: Critic,
    /// Updates at the start that train the value loss alone.
    pub critic_warmup: u64,
    /// Passes over the batch.
    pub inner_epochs: usize,
    /// Mini-batches per pass.
    pub minibatches: usize,
    /// Optimiser.
    pub optimizer: Optimizer,
    /// Updates of the whole run, for the schedule.
    pub total_steps: u64,
    /// Temperature of the distribution that log-probabilities are of.
    pub temperature: f64,
    /// Token ids that the rollout never samples.
    pub banned: Vec<u32>,
    /// Largest mean |delta log p| on tokens of the same version.
    pub agreement_limit: f64,
    /// Layers and heads whose attention enters the loss.
    pub attention: AttentionSet,
    /// Class names and synonyms.
    pub scoring: Scoring,
    /// Which parameters are trained at which update.
    pub freezing: Freezing,
    /// Compute activations again in the backward pass.
    pub recompute: bool,
    /// Padded tokens per forward pass.
    pub token_budget: usize,
    /// Run seed, for the order of mini-batches.
    pub seed: u64,
}

impl StepSettings {
    /// From the configuration; `banned` are the token ids that the rollout never samples.
    pub fn new(config: &Config, vlm: &Vlm, banned: &[u32]) -> Self {
        let l = &config.learner;
        let vision = &config.reward.vision_relevance;
        Self {
            estimator: estimator(l),
            whiten: match l.whiten {
                Whiten::Auto => l.algorithm.whitens(),
                Whiten::Always => true,
                Whiten::Never => false,
            },
            objective: Objective {
                attention_coef: vision.weight * vision.gradient,
                ..objective(l, config.rollout.max_new_tokens)
            },
            ratio_to: l.ratio_to,
            kl_in: l.kl_in,
            kl_target: l.kl_target,
            kl_gain: l.kl_gain,
            critic: l.critic,
            critic_warmup: l.critic_warmup,
            inner_epochs: l.inner_epochs,
            minibatches: l.minibatches,
            optimizer: l.optimizer.clone(),
            total_steps: l.steps,
            temperature: config.rollout.logprobs.temperature(config.rollout.temperature),
            banned: banned_ids(vlm, banned),
            agreement_limit: agreement_limit(l.agreement_limit, vlm.kind()),
            attention: AttentionSet::configured(vlm.config(), &vision.layers, &vision.heads),
            scoring: Scoring::new(config),
            freezing: Freezing::new(l),
            recompute: l.recompute,
            token_budget: l.token_budget,
            seed: config.run.seed,
        }
    }
}

impl StepSettings {
    /// The weight of KL as it starts.
    pub(crate) fn kl_controller(&self) -> KlController {
        let (coef, target, gain) = (self.objective.kl_coef, self.kl_target, self.kl_gain);
        if target > 0.0 { KlController::Adaptive { coef, target, gain } } else { KlController::Fixed { coef } }
    }

    /// The objective of update `step` (from 0) while KL weighs `kl_coef`.
    pub(crate) fn objective_at(&self, step: u64, kl_coef: f64) -> Objective {
        let kl_coef = if self.kl_in == KlPlace::Loss { kl_coef } else { 0.0 };
        let whole = Objective { kl_coef, ..self.objective };
        if step < self.critic_warmup { whole.critic_only() } else { whole }
    }
}

/// The configured limit, else what numbers of this kind allow.
fn agreement_limit(configured: f64, kind: Kind) -> f64 {
    match kind {
        _ if configured > 0.0 => configured,
        Kind::BFloat16 | Kind::Half => 1e-3,
        _ => 1e-5,
    }
}

fn estimator(l: &schema::Learner) -> Estimator {
    match l.algorithm {
        Algorithm::Grpo => Estimator::Grpo { scale_by_std: l.scale_by_std },
        Algorithm::Ppo => Estimator::Gae { gamma: l.gamma, lambda: l.lambda },
        Algorithm::Rloo => Estimator::Rloo,
        Algorithm::ReinforcePlusPlus => Estimator::ReinforcePlusPlus { gamma: l.gamma },
        Algorithm::ReinforcePlusPlusBaseline => Estimator::ReinforcePlusPlusBaseline,
    }
}

/// The loss without the attention term.
fn objective(l: &schema::Learner, max_length: usize) -> Objective {
    let cap = l.importance_cap;
    let value_coef = if l.algorithm == Algorithm::Ppo { l.value_coef } else { 0.0 };
    Objective {
        clip: Clip { low: l.clip_low, high: l.clip_high, dual: (l.clip_dual > 0.0).then_some(l.clip_dual) },
        ratio: match l.ratio {
            schema::RatioLevel::Token => RatioLevel::Token,
            schema::RatioLevel::Sequence => RatioLevel::Sequence,
        },
        correction: match l.importance {
            Importance::None => Correction::None,
            Importance::Full => Correction::Full,
            Importance::Truncate => Correction::Truncate { cap },
            Importance::Mask => Correction::Mask { cap },
        },
        aggregation: match l.loss_mean {
            LossMean::Token => Aggregation::TokenMean,
            LossMean::SequenceTokenMean => Aggregation::SequenceTokenMean,
            LossMean::SequenceTokenSum => Aggregation::SequenceTokenSum,
            LossMean::SequenceMaxLength => Aggregation::SequenceMaxLength { max_length: max_length as u64 },
            LossMean::GroupTokenMean => Aggregation::GroupTokenMean,
        },
        value_clip: l.value_clip,
        kl_coef: l.kl_coef,
        kl_form: match l.kl_form {
            schema::KlForm::K1 => KlForm::K1,
            schema::KlForm::K2 => KlForm::K2,
            schema::KlForm::K3 => KlForm::K3,
        },
        kl_gradient: match l.kl_gradient {
            schema::KlGradient::Own => KlGradient::Own,
            schema::KlGradient::Reverse => KlGradient::Reverse,
        },
        ..Objective::paper(l.policy_coef, value_coef, l.entropy_coef, l.clip_low)
    }
}

/// Ids that are never sampled: the tokenizer's and the model's own vision tokens, as the engine has them.
pub fn banned_ids(vlm: &Vlm, tokenizer: &[u32]) -> Vec<u32> {
    let c = vlm.config();
    let own = [c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id];
    let mut ids: Vec<u32> = tokenizer.iter().copied().chain(own).collect();
    ids.retain(|id| i64::from(*id) < c.text.vocab_size);
    ids.sort_unstable();
    ids.dedup();
    ids
}
