//! The settings of a policy update, collected from the configuration so that a test or a dump can set them by hand.

use unveil_algo::{ClipRange, Estimator, KlController, Objective};
use unveil_config::Config;
use unveil_config::schema::{self, Critic, KlPlacement, Optimizer, RatioBase, Whiten};
use unveil_core::MentionFinder;
use unveil_model::{AttentionSet, Vlm, agreement_limit};

use crate::freeze::Freezing;

/// All settings of a policy update.
#[derive(Debug, Clone)]
pub struct StepSettings {
    /// Estimator of advantages from rewards.
    pub estimator: Estimator,
    /// Whether advantages are normalised over the batch.
    pub whiten: bool,
    /// Whether responses cut at the length limit are left out of the loss.
    pub overlong_filter: bool,
    /// Clip ranges, forms and coefficients of the loss. `kl_coef` is the initial KL coefficient, be KL part of the loss or the reward.
    pub objective: Objective,
    /// Denominator of the probability ratio.
    pub ratio_to: RatioBase,
    /// Whether KL is part of the loss or of the reward.
    pub kl_in: KlPlacement,
    /// Target of KL per response in nats, to which the KL coefficient is adapted; 0: the coefficient is constant.
    pub kl_target: f64,
    /// Relative change of the coefficient per update at a relative error of 1.
    pub kl_gain: f64,
    /// Backbone of the value head.
    pub critic: Critic,
    /// Updates at the start that train the value loss only.
    pub critic_warmup: u64,
    /// Inner epochs: passes over each batch.
    pub inner_epochs: usize,
    /// Mini-batches per inner epoch.
    pub minibatches: usize,
    /// Settings of the optimiser.
    pub optimizer: Optimizer,
    /// Updates of the whole run, for the learning-rate schedule.
    pub total_steps: u64,
    /// Temperature at which log-probabilities are computed.
    pub temperature: f64,
    /// Token ids that are never sampled.
    pub banned: Vec<u32>,
    /// Largest mean |delta log p| on tokens of the same version.
    pub agreement_limit: f64,
    /// Layers and heads whose attention enters the loss.
    pub attention: AttentionSet,
    /// Class names and synonyms, to find mentions.
    pub mentions: MentionFinder,
    /// Parameters that are frozen, and when.
    pub freezing: Freezing,
    /// Whether activations are recomputed in the backward pass.
    pub recompute: bool,
    /// Maximum of padded tokens per forward pass.
    pub token_budget: usize,
    /// Run seed, for the order of mini-batches.
    pub seed: u64,
}

impl StepSettings {
    /// Reads the configuration; `banned` are the tokenizer's ids that are never sampled.
    pub fn new(config: &Config, vlm: &Vlm, banned: &[u32]) -> Self {
        let l = &config.learner;
        let vision = &config.reward.vision_relevance;
        Self {
            estimator: Estimator {
                algorithm: l.algorithm,
                scale_by_std: l.scale_by_std,
                gamma: l.gamma,
                lambda: l.lambda,
            },
            whiten: match l.whiten {
                Whiten::Auto => l.algorithm.whitens_by_default(),
                Whiten::Always => true,
                Whiten::Never => false,
            },
            overlong_filter: l.overlong_filter,
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
            banned: vlm.config().banned_ids(banned),
            agreement_limit: if l.agreement_limit > 0.0 {
                l.agreement_limit
            } else {
                agreement_limit(vlm.compute(), vlm.kind())
            },
            attention: AttentionSet::configured(vlm.config(), &vision.layers, &vision.heads),
            mentions: MentionFinder { reader: config.answer_reader(), synonyms: config.data.synonyms.clone() },
            freezing: Freezing::new(l),
            recompute: l.recompute,
            token_budget: l.token_budget,
            seed: config.run.seed,
        }
    }
}

impl StepSettings {
    /// Returns the controller of the KL coefficient in its initial state.
    pub(crate) fn kl_controller(&self) -> KlController {
        let coef = self.objective.kl_coef;
        let target = self.kl_target;
        let gain = self.kl_gain;
        if target > 0.0 { KlController::Adaptive { coef, target, gain } } else { KlController::Fixed { coef } }
    }

    /// Returns the objective of update `step` (from 0) at the KL coefficient `kl_coef`.
    pub(crate) fn objective_at(&self, step: u64, kl_coef: f64) -> Objective {
        let kl_coef = if self.kl_in == KlPlacement::Loss { kl_coef } else { 0.0 };
        let objective = Objective { kl_coef, ..self.objective };
        if step < self.critic_warmup { objective.critic_only() } else { objective }
    }
}

/// Returns the configured objective without the attention term.
fn objective(l: &schema::Learner, max_length: usize) -> Objective {
    let value_coef = if l.algorithm.needs_values() { l.value_coef } else { 0.0 };
    Objective {
        clip: ClipRange { low: l.clip_low, high: l.clip_high, dual: (l.clip_dual > 0.0).then_some(l.clip_dual) },
        surrogate: l.surrogate,
        ratio: l.ratio,
        importance: l.importance,
        importance_cap: l.importance_cap,
        reduction: l.loss_mean,
        max_length: max_length as u64,
        value_clip: l.value_clip,
        kl_coef: l.kl_coef,
        kl_form: l.kl_form,
        kl_gradient: l.kl_gradient,
        ..Objective::paper(l.policy_coef, value_coef, l.entropy_coef, l.clip_low)
    }
}
