//! Advantages and losses of stage 2 as pure functions: what goes in is rewards, values, log-probabilities and attention rows;
//! what comes out is advantages, a differentiable loss and statistics. Each function names its source.
//!
//! Tokens of a batch are flat: `[N]` in the order (group, response, position). Must not know: anything but tch and core.

mod advantage;
mod attention;
mod loss;

pub use advantage::{STD_EPS, gae, group_advantages, whiten};
pub use attention::{MentionBatch, attention_rewards};
pub use loss::{
    LossParts, Objective, TokenBatch, TokenStats, approx_kl, clip_fraction, kl_k3, policy_loss, policy_terms,
    value_terms,
};

/// Inputs that do not fit together.
#[derive(Debug, thiserror::Error)]
pub enum AlgoError {
    /// A tensor has another shape than the batch needs.
    #[error("`{what}` has shape {found:?} where {expected:?} is needed")]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// Its shape.
        found: Vec<i64>,
        /// The shape that was needed.
        expected: Vec<i64>,
    },
    /// A term needs an input that was not given.
    #[error("the {term} term has a weight but `{input}` was not given")]
    Missing {
        /// Which term.
        term: &'static str,
        /// Which input.
        input: &'static str,
    },
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Torch(#[from] tch::TchError),
}

pub(crate) fn expect_shape(what: &'static str, t: &tch::Tensor, expected: &[i64]) -> Result<(), AlgoError> {
    if t.size() == expected {
        Ok(())
    } else {
        Err(AlgoError::Shape { what, found: t.size(), expected: expected.to_vec() })
    }
}
