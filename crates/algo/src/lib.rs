//! Advantages and losses of stage 2 as pure functions: from rewards, values, log-probabilities and attention rows to advantages, a
//! differentiable loss and statistics. Each function names its source.
//!
//! Tokens of a batch are flat, `[N]` in the order (group, response, position) that [`TokenLayout`] describes. Tensor functions keep the
//! dtype of their inputs. Must not depend on anything but tch and core.

mod advantage;
mod attention;
mod check;
mod error;
mod importance;
mod kl;
mod layout;
mod loss;
mod objective;
mod reduction;
mod surrogate;

pub use advantage::{
    AdvantageEstimate, Estimator, Moments, STD_EPS, ScoredResponse, discounted_returns, estimate_advantages, gae,
    group_advantages, leave_one_out_advantages, token_rewards,
};
pub use attention::{MentionBatch, attention_rewards};
pub use check::{BatchStats, check_batch, check_tokens};
pub use error::{AlgoError, NotFinite};
pub use importance::{Correction, ImportanceWeights};
pub use kl::{KlController, KlForm, KlGradient, kl_terms};
pub use layout::{Counts, TokenLayout, TokenPosition};
pub use loss::{LossParts, TokenBatch, TokenMeans, policy_loss, value_terms};
pub use objective::Objective;
pub use reduction::LossReduction;
pub use surrogate::{ClipRange, RatioLevel, approx_kl, clip_fraction, log_ratios, policy_terms};
