//! Advantages from rewards. Host arithmetic in f64, since a batch has some ten thousand tokens at most. Must not know: tensors,
//! losses.

mod estimate;
mod group;
mod returns;
mod whiten;

pub use estimate::{Estimate, Estimator, Sampled, estimate};
pub(crate) use group::all_equal;
pub use group::{STD_EPS, group_advantages, leave_one_out};
pub use returns::{discounted, gae, token_rewards};
pub use whiten::Moments;

/// Spread below which numbers count as equal.
pub(crate) const EQUAL: f64 = 1e-9;
