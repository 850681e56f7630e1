//! Everything of the configuration that enters a policy update, in one place that a test or a dump can fill by hand.

use unveil_algo::Objective;
use unveil_config::Config;
use unveil_config::schema::{Algorithm, Optimizer};
use unveil_model::{AttentionSet, Vlm};
use unveil_reward::Scoring;

/// Padded tokens of one forward and backward pass; a larger batch is split and its gradients added up.
pub const TOKEN_BUDGET: usize = 65_536;

/// Everything of the configuration that enters an update.
#[derive(Debug, Clone)]
pub struct StepSettings {
    /// GRPO or PPO.
    pub algorithm: Algorithm,
    /// Clip ranges and weights of the loss.
    pub objective: Objective,
    /// Divide group advantages by their standard deviation.
    pub scale_by_std: bool,
    /// Discount (PPO).
    pub gamma: f64,
    /// GAE lambda (PPO).
    pub lambda: f64,
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
    /// Parameter name prefixes that are not trained.
    pub frozen: Vec<String>,
    /// Padded tokens per forward pass.
    pub token_budget: usize,
    /// Run seed, for the order of mini-batches.
    pub seed: u64,
}

impl StepSettings {
    /// From the configuration; `banned` are the token ids that the rollout never samples.
    pub fn new(config: &Config, vlm: &Vlm, banned: &[u32]) -> Self {
        let l = &config.learner;
        let ppo = l.algorithm == Algorithm::Ppo;
        let vision = &config.reward.vision_relevance;
        Self {
            algorithm: l.algorithm,
            objective: Objective {
                clip_low: l.clip_low,
                clip_high: l.clip_high,
                value_coef: if ppo { l.value_coef } else { 0.0 },
                value_clip: l.value_clip,
                entropy_coef: l.entropy_coef,
                kl_coef: l.kl_coef,
                attention_coef: vision.weight * vision.gradient,
            },
            scale_by_std: l.scale_by_std,
            gamma: l.gamma,
            lambda: l.lambda,
            inner_epochs: l.inner_epochs,
            minibatches: l.minibatches,
            optimizer: l.optimizer.clone(),
            total_steps: l.steps,
            temperature: config.rollout.logprobs.temperature(config.rollout.temperature),
            banned: banned_ids(vlm, banned),
            agreement_limit: l.agreement_limit,
            attention: AttentionSet::configured(vlm.config(), &vision.layers, &vision.heads),
            scoring: Scoring::new(config),
            frozen: l.frozen.clone(),
            token_budget: TOKEN_BUDGET,
            seed: config.run.seed,
        }
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
