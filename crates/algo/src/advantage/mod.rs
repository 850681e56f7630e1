//! Advantages from rewards, computed on the host in f64, since a batch has some ten thousand tokens at most.

mod estimate;
mod group;
mod returns;
mod whiten;

pub use estimate::{AdvantageEstimate, Estimator, ScoredResponse, estimate_advantages};
pub use group::{STD_EPS, group_advantages, leave_one_out_advantages};
pub use returns::{discounted_returns, gae, token_rewards};
pub use whiten::Moments;

/// Difference below which values count as equal.
pub(crate) const EQUAL: f64 = 1e-9;
