//! Advantages and losses of stage 2 as pure functions: from rewards, values, log-probabilities and attention rows to advantages, a
//! differentiable loss and statistics. Each function names its source.
//!
//! Tokens of a batch are flat, `[N]` in the order (group, response, position) that [`TokenLayout`] describes. Tensor functions keep the
//! dtype of their inputs. Must not depend on anything but tch and core.
//!
//! # Examples
//! One group of two responses, of one and two tokens, on policy:
//! ```
//! use tch::Tensor;
//! use unveil_algo::{Objective, TokenBatch, TokenLayout, policy_loss};
//!
//! let layout = TokenLayout::new(vec![vec![1, 2]]);
//! let logprobs = Tensor::from_slice(&[-1.0f32, -2.0, -0.5]).set_requires_grad(true);
//! let old = logprobs.detach();
//! let advantages = Tensor::from_slice(&[0.5f32, -0.5, -0.5]);
//! let batch = TokenBatch {
//!     logprobs: Some(&logprobs),
//!     old_logprobs: Some(&old),
//!     advantages: Some(&advantages),
//!     ..TokenBatch::default()
//! };
//!
//! let parts = policy_loss(&Objective::surrogate(0.2, 0.28), &batch, &layout, &layout.counts())?;
//! // The mean over tokens of minus the advantage; its gradient raises the probability of the first response.
//! assert!((parts.loss.double_value(&[]) - 0.5 / 3.0).abs() < 1e-6);
//! parts.loss.backward();
//! assert!((logprobs.grad().double_value(&[0]) + 0.5 / 3.0).abs() < 1e-6);
//! # Ok::<(), unveil_algo::AlgoError>(())
//! ```

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
pub use importance::{ImportanceWeights, importance_weights};
pub use kl::{KlController, kl_terms};
pub use layout::{Counts, TokenLayout, TokenPosition};
pub use loss::{LossParts, TokenBatch, TokenMeans, policy_loss, value_terms};
pub use objective::Objective;
pub use reduction::token_weights;
pub use surrogate::{ClipRange, approx_kl, cispo_terms, clip_fraction, log_ratios, policy_terms};
