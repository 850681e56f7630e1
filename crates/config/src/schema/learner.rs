//! The section `[learner]`: the algorithm of stage 2, its loss, and how the learner runs.

use serde::{Deserialize, Serialize};

use super::{Lora, Optimizer, Parallel};

/// How rewards become advantages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Reward minus the group's mean, over its deviation where `scale_by_std`; no value head (arXiv 2402.03300).
    Grpo,
    /// Value head and GAE (arXiv 1707.06347, 1506.02438).
    Ppo,
    /// Reward minus the mean of the group's other rewards (arXiv 2402.14740).
    Rloo,
    /// Discounted returns, normalised over the batch; no baseline of the prompt (REINFORCE++, arXiv 2501.03262).
    ReinforcePlusPlus,
    /// Reward minus the group's mean, normalised over the batch (the baseline variant of REINFORCE++).
    ReinforcePlusPlusBaseline,
}

impl Algorithm {
    /// Whether it compares the responses to one prompt, so that a group needs two of them.
    pub fn compares(self) -> bool {
        matches!(self, Self::Grpo | Self::Rloo | Self::ReinforcePlusPlusBaseline)
    }

    /// Whether advantages are normalised over the batch when `whiten = "auto"`.
    pub fn whitens(self) -> bool {
        matches!(self, Self::Ppo | Self::ReinforcePlusPlus | Self::ReinforcePlusPlusBaseline)
    }
}

/// What values are computed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Critic {
    /// The policy's own hidden states; the value loss trains the policy's weights too.
    Shared,
    /// Those of a second model, which starts as a copy of the stage 1 model and is trained by the value loss alone.
    Separate,
}

/// Whether advantages are shifted to mean 0 and scaled to variance 1 over the tokens of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whiten {
    /// As the algorithm has it: with ppo and both forms of reinforce_plus_plus, not with grpo and rloo.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What a ratio of probabilities is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RatioLevel {
    /// Each token.
    Token,
    /// A whole response: the geometric mean of its tokens' ratios (GSPO, arXiv 2507.18071). Clip ranges of some 1e-4 to 1e-3
    /// belong to it.
    Sequence,
}

/// The denominator of the ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RatioBase {
    /// The log-probabilities that the rollout recorded, of the weights that made each token.
    Rollout,
    /// The learner's own before the update (the proximal policy); `importance` says what becomes of the difference.
    Learner,
}

/// Weight `w = exp(learner before the update - rollout)` of each token's surrogate, where `ratio_to = "learner"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Importance {
    /// 1.
    None,
    /// w: the decoupled objective for stale data (AReaL, arXiv 2505.24298).
    Full,
    /// min(w, `importance_cap`): truncated importance sampling.
    Truncate,
    /// w within [1 / `importance_cap`, `importance_cap`], else 0: the token is dropped.
    Mask,
}

/// What weighs the same in the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossMean {
    /// Tokens: mean over all tokens of a mini-batch (DAPO).
    Token,
    /// Responses: mean over responses of the mean over their tokens (GRPO).
    SequenceTokenMean,
    /// Responses: mean over responses of the sum over their tokens.
    SequenceTokenSum,
    /// Responses: mean over responses of the sum over their tokens divided by `rollout.max_new_tokens` (Dr. GRPO).
    SequenceMaxLength,
    /// Prompts: mean over groups of the mean over a group's tokens.
    GroupTokenMean,
}

/// Estimate of KL to the reference per token, with d = log policy - log reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlForm {
    /// d. The form for the reward; its own gradient in the loss is 0 in expectation.
    K1,
    /// d^2 / 2. In the loss it has the gradient of KL(policy || reference).
    K2,
    /// exp(-d) - 1 + d, never negative. In the loss it has the gradient of KL(reference || policy), that of k2 to first order.
    K3,
}

/// Where KL to the reference enters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlPlace {
    /// As a term of the loss.
    Loss,
    /// Subtracted from the rewards: token by token with ppo and reinforce_plus_plus, summed over the response with grpo and rloo.
    Reward,
}

/// Gradient of a KL term in the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlGradient {
    /// That of `kl_form`.
    Own,
    /// That of KL(policy || reference), whatever form is reported.
    Reverse,
}

/// Parameters that are left as they are for some updates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Freeze {
    /// `vision_tower`, `merger`, `language_model`, or prefixes of parameter names.
    pub parameters: Vec<String>,
    /// The first update that leaves them as they are, from 0.
    #[serde(default)]
    pub from: u64,
    /// The first update that trains them again.
    pub until: u64,
}

/// Stage 2: policy updates. The loss is the clipped surrogate times `policy_coef`, plus the value loss times `value_coef`, minus
/// entropy times `entropy_coef`, plus KL times `kl_coef`; the first three weights are the paper's c1, c2 and c3.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Learner {
    /// Algorithm.
    pub algorithm: Algorithm,
    /// Updates; 0 skips stage 2.
    pub steps: u64,
    /// Groups per update.
    pub groups: usize,
    /// Passes over a collected batch.
    pub inner_epochs: usize,
    /// Mini-batches per inner epoch.
    pub minibatches: usize,
    /// Optimiser.
    pub optimizer: Optimizer,
    /// c1: scale of the advantages, applied after any normalisation of them.
    pub policy_coef: f64,
    /// Clip range of the ratio below 1.
    pub clip_low: f64,
    /// Clip range of the ratio above 1.
    pub clip_high: f64,
    /// Dual clip: for a negative advantage A the objective is at least this times A (arXiv 1912.09729); above 1, 0 = off.
    pub clip_dual: f64,
    /// What a ratio is taken over.
    pub ratio: RatioLevel,
    /// What a ratio is taken to.
    pub ratio_to: RatioBase,
    /// Weight for the difference between rollout and learner.
    pub importance: Importance,
    /// Bound of that weight with `truncate` and `mask`; above 1.
    pub importance_cap: f64,
    /// What weighs the same in the loss.
    pub loss_mean: LossMean,
    /// Divide group advantages by their standard deviation (grpo).
    pub scale_by_std: bool,
    /// Normalise advantages over the batch.
    pub whiten: Whiten,
    /// What values are computed from (ppo).
    pub critic: Critic,
    /// c2: weight of the value loss (ppo).
    pub value_coef: f64,
    /// Clip range of the value loss; 0 = none (ppo).
    pub value_clip: f64,
    /// Updates at the start in which only the value loss is trained (ppo).
    pub critic_warmup: u64,
    /// c3: weight of the entropy bonus.
    pub entropy_coef: f64,
    /// Discount (ppo, reinforce_plus_plus).
    pub gamma: f64,
    /// GAE lambda (ppo).
    pub lambda: f64,
    /// Weight of KL to the stage 1 model; 0 = no reference. With adapters the reference is the model without them.
    pub kl_coef: f64,
    /// Estimate of that KL.
    pub kl_form: KlForm,
    /// Loss or reward.
    pub kl_in: KlPlace,
    /// Its gradient in the loss.
    pub kl_gradient: KlGradient,
    /// KL per response in nats that `kl_coef` is steered towards (arXiv 1909.08593); 0 = `kl_coef` stays as it is.
    pub kl_target: f64,
    /// Relative change of `kl_coef` per update at a relative error of 1; errors count up to 0.2.
    pub kl_gain: f64,
    /// Throw activations away in the forward pass and compute them again, layer by layer, in the backward pass: about a third more
    /// work for a fraction of the memory.
    pub recompute: bool,
    /// Adapters instead of all weights.
    pub lora: Lora,
    /// What stage 2 never trains: `vision_tower`, `merger`, `language_model`, or prefixes of parameter names.
    pub frozen: Vec<String>,
    /// What stage 2 does not train for some of its updates.
    pub freeze: Vec<Freeze>,
    /// Largest mean |delta log p| between rollout and learner on tokens of the same version; 0 = 1e-5, or 1e-3 where weights are
    /// bf16.
    pub agreement_limit: f64,
    /// Share of the last 64 groups (or of four updates, where those are more) for which a reward component with a weight, or the whole
    /// reward, may be masked though it applies, or that may be set aside; above it the run stops. 1 = never.
    pub max_masked: f64,
    /// Held-out evaluation every so many steps; 0 = only at the end.
    pub eval_every: u64,
    /// Checkpoint every so many steps; 0 = only at the end.
    pub checkpoint_every: u64,
    /// Listen address of the experience service; port 0 = any free one.
    pub listen: String,
    /// Where rollout workers find it (`http://host:port`); empty = the one that `train` starts.
    pub address: String,
    /// Rank 0: listen address of the Prometheus page (`/metrics`); empty = none.
    pub metrics_listen: String,
    /// The learner's ranks.
    pub parallel: Parallel,
    /// Padded positions of one forward and backward pass; a larger batch takes several. Lower it where memory is short.
    pub token_budget: usize,
    /// Threads of the learner (0 = all cores); leave some to the rollout workers that run beside it.
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
            clip_low: 0.2,
            clip_high: 0.28,
            clip_dual: 0.0,
            ratio: RatioLevel::Token,
            ratio_to: RatioBase::Rollout,
            importance: Importance::None,
            importance_cap: 2.0,
            loss_mean: LossMean::Token,
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
            kl_in: KlPlace::Loss,
            kl_gradient: KlGradient::Own,
            kl_target: 0.0,
            kl_gain: 0.1,
            recompute: false,
            lora: Lora::default(),
            frozen: Vec::new(),
            freeze: Vec::new(),
            agreement_limit: 0.0,
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
