//! Section `[learner]`: the algorithm of stage 2, its loss, and the learner process.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use unveil_core::{Algorithm, Importance, KlForm, KlGradient, LossReduction, RatioLevel, Surrogate};

use super::{Lora, Optimizer, Parallel};

/// Model that computes the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Critic {
    /// The policy: values are read from its hidden states, and the value loss trains its weights too.
    Shared,
    /// A second model, which starts as a copy of the stage 1 model and is trained by the value loss alone.
    Separate,
}

/// Whitening of advantages: shifting to mean 0 and scaling to variance 1 over the tokens of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Whiten {
    /// As usual for the algorithm: on for ppo and both reinforce_plus_plus, off for grpo and rloo.
    Auto,
    /// On.
    Always,
    /// Off.
    Never,
}

/// Denominator of the probability ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RatioBase {
    /// The log-probabilities recorded by the rollout, of the weights that generated each token.
    Rollout,
    /// The learner's log-probabilities before the update (the proximal policy); `importance` sets the correction for their difference to
    /// the rollout's.
    Learner,
}

/// Place where the KL divergence to the reference enters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlPlacement {
    /// A term of the loss.
    Loss,
    /// Subtracted from the rewards: per token with ppo and reinforce_plus_plus, summed over the response with grpo and rloo.
    Reward,
}

/// Parameters that are frozen for a range of updates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Freeze {
    /// Parameters to freeze: `vision_tower`, `merger`, `language_model`, or prefixes of parameter names.
    pub parameters: Vec<String>,
    /// First update that leaves them unchanged, from 0.
    #[serde(default)]
    pub from: u64,
    /// First update that trains them again; above `from`.
    pub until: u64,
}

/// Stage 2: reinforcement learning. The loss is the clipped surrogate times `policy_coef`, plus the value loss times `value_coef`, minus
/// the entropy times `entropy_coef`, plus the KL divergence times `kl_coef`; the first three weights are c1, c2 and c3 of the paper.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Learner {
    /// Advantage estimator: `grpo`, `ppo`, `rloo`, `reinforce_plus_plus` or `reinforce_plus_plus_baseline`.
    pub algorithm: Algorithm,
    /// Number of updates; 0 skips stage 2.
    pub steps: u64,
    /// Groups per update, at least 1.
    #[schemars(range(min = 1))]
    pub groups: usize,
    /// Number of times that a collected batch is trained on, at least 1.
    #[schemars(range(min = 1))]
    pub inner_epochs: usize,
    /// Mini-batches per inner epoch; must divide `groups`.
    #[schemars(range(min = 1))]
    pub minibatches: usize,
    /// Optimiser of stage 2.
    pub optimizer: Optimizer,
    /// c1, weight of the policy loss, above 0: scale of the advantages, applied after their normalisation.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub policy_coef: f64,
    /// Form of the policy loss: `clip` (the clipped surrogate) or `cispo` (each token's log-probability, weighted by its clipped ratio; the
    /// clip ranges bound the weight, and `clip_low` of 1 or more sets no lower bound, as in arXiv 2506.13585).
    pub surrogate: Surrogate,
    /// Clip range of the ratio below 1, above 0.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub clip_low: f64,
    /// Clip range of the ratio above 1, above 0.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub clip_high: f64,
    /// Dual clip: the objective of a token with negative advantage A is at least this times A (arXiv 1912.09729); above 1, or 0 to disable
    /// it.
    pub clip_dual: f64,
    /// Unit of the probability ratio: `token` or `sequence`.
    pub ratio: RatioLevel,
    /// Denominator of the ratio: `rollout` (log-probabilities of the rollout) or `learner` (the learner's before the update).
    pub ratio_to: RatioBase,
    /// Importance weight of each token for the difference between rollout and learner: `none`, `full`, `truncate` or `mask`; all but `none`
    /// need `ratio_to = "learner"`.
    pub importance: Importance,
    /// Bound of the importance weight with `truncate` and `mask`, above 1.
    #[schemars(extend("exclusiveMinimum" = 1.0))]
    pub importance_cap: f64,
    /// Leaves responses that were cut at `rollout.max_new_tokens` out of the loss and of its means (overlong filtering of DAPO, arXiv
    /// 2503.14476, section 3.4). Their rewards still count in the mean and the standard deviation of their group.
    pub overlong_filter: bool,
    /// Reduction of the loss: `token`, `sequence_token_mean`, `sequence_token_sum`, `sequence_max_length` or `group_token_mean`.
    pub loss_mean: LossReduction,
    /// Divides group advantages by their standard deviation (grpo).
    pub scale_by_std: bool,
    /// Normalises advantages over the batch: `auto` (as usual for the algorithm), `always` or `never`.
    pub whiten: Whiten,
    /// Model that computes values (ppo): `shared` (the policy) or `separate` (a second model).
    pub critic: Critic,
    /// c2, weight of the value loss (ppo), 0 or more.
    #[schemars(range(min = 0.0))]
    pub value_coef: f64,
    /// Clip range of the value loss (ppo); 0 disables clipping.
    #[schemars(range(min = 0.0))]
    pub value_clip: f64,
    /// Number of updates at the start that train the value loss only (ppo).
    pub critic_warmup: u64,
    /// c3, weight of the entropy bonus.
    pub entropy_coef: f64,
    /// Discount factor (ppo, reinforce_plus_plus), 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub gamma: f64,
    /// Lambda of generalised advantage estimation (ppo), 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub lambda: f64,
    /// Weight of the KL divergence to the reference, the stage 1 model (with adapters, the model without them); 0 loads no reference.
    #[schemars(range(min = 0.0))]
    pub kl_coef: f64,
    /// Estimator of the KL divergence: `k1`, `k2` or `k3`.
    pub kl_form: KlForm,
    /// Place of the KL divergence: `loss` or `reward`.
    pub kl_in: KlPlacement,
    /// Gradient of the KL term in the loss: `own` (of `kl_form`) or `reverse` (of KL(policy || reference)).
    pub kl_gradient: KlGradient,
    /// Target KL divergence per response in nats; `kl_coef` is adapted towards it (arXiv 1909.08593). 0 keeps `kl_coef` constant.
    #[schemars(range(min = 0.0))]
    pub kl_target: f64,
    /// Gain of that adaptation, above 0: relative change of `kl_coef` per update at a relative error of 1; errors are clipped to 0.2.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub kl_gain: f64,
    /// Discards activations in the forward pass and recomputes them layer by layer in the backward pass (activation checkpointing): about a
    /// third more computation for a fraction of the memory.
    pub recompute: bool,
    /// Low-rank adapters instead of full training.
    pub lora: Lora,
    /// Parameters that stage 2 never trains: `vision_tower`, `merger`, `language_model`, or prefixes of parameter names.
    pub frozen: Vec<String>,
    /// Parameters that stage 2 freezes for a range of updates.
    pub freeze: Vec<Freeze>,
    /// Maximum mean |delta log p| between rollout and learner on tokens of the same weight version; above it the run stops. 0 selects the
    /// default of `run.compute`: 1e-5 for `exact` (1e-3 with bf16 weights), 6e-3 for `tf32`, 5e-2 for `fast`.
    #[schemars(range(min = 0.0))]
    pub agreement_limit: f64,
    /// Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): maximum number of groups per update, up to 1000000, that are replaced by
    /// further ones because they teach nothing: all their rewards are equal, or `overlong_filter` leaves out all their responses. A replaced
    /// group is counted and never trained. Above the maximum such groups are trained, and the run stops at a batch that has no other ones.
    /// Needs an algorithm that compares responses. 0 disables it.
    #[schemars(range(max = 1_000_000))]
    pub max_replaced: usize,
    /// Maximum fraction (0 to 1) of recent groups in which an applicable component with a weight, or the whole reward, is masked, or that
    /// were set aside; above it the run stops. The window is the last 64 groups or four updates, whichever is more. 1 never stops.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_masked: f64,
    /// Updates between evaluations on the validation split; 0 evaluates at the end only.
    pub eval_every: u64,
    /// Updates between checkpoints; 0 saves at the end only.
    pub checkpoint_every: u64,
    /// Listen address `host:port` of the experience service; port 0 picks a free one.
    pub listen: String,
    /// Address of the experience service for rollout workers (`http://host:port` or `https://host:port`). Empty: the service that `unveil
    /// train` starts.
    pub address: String,
    /// Listen address `host:port` of the Prometheus page (`/metrics`) of rank 0. Empty: no page.
    pub metrics_listen: String,
    /// Ranks of the learner.
    pub parallel: Parallel,
    /// Maximum number of padded positions in one forward and backward pass; larger mini-batches are split into several. Lower it to save
    /// memory.
    #[schemars(range(min = 1))]
    pub token_budget: usize,
    /// CPU threads of the learner; 0 uses all cores. Leave some to rollout workers on the same machine.
    pub threads: usize,
}

impl Default for Learner {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::Grpo,
            steps: 100,
            groups: 16,
            inner_epochs: 1,
            minibatches: 1,
            optimizer: Optimizer { lr: 3e-4, warmup: 5, weight_decay: 0.0, ..Default::default() },
            policy_coef: 1.0,
            surrogate: Surrogate::Clip,
            clip_low: 0.2,
            clip_high: 0.28,
            clip_dual: 0.0,
            ratio: RatioLevel::Token,
            ratio_to: RatioBase::Rollout,
            importance: Importance::None,
            importance_cap: 2.0,
            overlong_filter: false,
            loss_mean: LossReduction::Token,
            scale_by_std: true,
            whiten: Whiten::Auto,
            critic: Critic::Shared,
            value_coef: 0.5,
            value_clip: 0.2,
            critic_warmup: 0,
            entropy_coef: 0.0,
            gamma: 1.0,
            lambda: 0.95,
            kl_coef: 0.0,
            kl_form: KlForm::K3,
            kl_in: KlPlacement::Loss,
            kl_gradient: KlGradient::Own,
            kl_target: 0.0,
            kl_gain: 0.1,
            recompute: false,
            lora: Lora::default(),
            frozen: Vec::new(),
            freeze: Vec::new(),
            agreement_limit: 0.0,
            max_replaced: 0,
            max_masked: 0.5,
            eval_every: 0,
            checkpoint_every: 50,
            listen: "127.0.0.1:0".into(),
            address: String::new(),
            metrics_listen: String::new(),
            parallel: Parallel::default(),
            token_budget: 65_536,
            threads: 0,
        }
    }
}
