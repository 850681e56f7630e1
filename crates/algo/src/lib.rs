//! Advantages and losses of stage 2 as pure functions: what goes in is rewards, values, log-probabilities and attention rows;
//! what comes out is advantages, a differentiable loss and statistics. Each function names its source.
//!
//! Tokens of a batch are flat: `[N]` in the order (group, response, position), as [`Layout`] has it. Tensor functions keep the
//! kind of their inputs. Must not know: anything but tch and core.

mod advantage;
mod aggregate;
mod attention;
mod check;
mod error;
mod importance;
mod kl;
mod layout;
mod loss;
mod objective;
mod surrogate;

pub use advantage::{
    Estimate, Estimator, Moments, STD_EPS, Sampled, discounted, estimate, gae, group_advantages, leave_one_out,
    token_rewards,
};
pub use aggregate::Aggregation;
pub use attention::{MentionBatch, attention_rewards};
pub use check::{BatchStats, check_batch, check_tokens};
pub use error::{AlgoError, NotFinite};
pub use importance::{Correction, ImportanceWeights};
pub use kl::{KlController, KlForm, KlGradient, kl_terms};
pub use layout::{Counts, Layout, Place};
pub use loss::{LossParts, TokenBatch, TokenMeans, policy_loss, value_terms};
pub use objective::Objective;
pub use surrogate::{Clip, RatioLevel, approx_kl, clip_fraction, log_ratios, policy_terms};
