//! Advantages of responses relative to the other responses to the same prompt. Masked rewards are left out, never counted as 0.

use unveil_core::rewards_are_equal;

/// Added to the standard deviation before dividing.
pub const STD_EPS: f64 = 1e-6;

/// Returns the rewards that are neither masked (`None`) nor non-finite.
fn finite_rewards(totals: &[Option<f64>]) -> Vec<f64> {
    totals.iter().filter_map(finite).collect()
}

fn finite(total: &Option<f64>) -> Option<f64> {
    total.filter(|v| v.is_finite())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Returns group-relative advantages: each response's reward minus the mean of its group (DeepSeekMath, arXiv 2402.03300, section
/// 4.1.2), divided by the group's standard deviation if `scale_by_std` (sample standard deviation plus [`STD_EPS`]; without it:
/// Dr. GRPO, arXiv 2503.20783, section 3.2).
///
/// `totals` are the rewards of one group; a masked response (`None`) is left out of mean and deviation and gets no advantage.
/// If all rewards are equal, the advantages are exactly 0. A reward that is not finite counts as masked.
///
/// # Examples
/// ```
/// use unveil_algo::{group_advantages, leave_one_out_advantages};
///
/// let rewards = [Some(1.0), None, Some(3.0)];
/// assert_eq!(group_advantages(&rewards, false), [Some(-1.0), None, Some(1.0)]);
/// assert_eq!(leave_one_out_advantages(&rewards), [Some(-2.0), None, Some(2.0)]);
///
/// // Responses of equal reward teach nothing.
/// assert_eq!(group_advantages(&[Some(0.3); 4], true), [Some(0.0); 4]);
/// ```
pub fn group_advantages(totals: &[Option<f64>], scale_by_std: bool) -> Vec<Option<f64>> {
    let values = finite_rewards(totals);
    let mean = mean(&values);
    let n = values.len() as f64;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let scale = if scale_by_std { variance.sqrt() + STD_EPS } else { 1.0 };
    let flat = rewards_are_equal(totals);
    totals.iter().map(|t| finite(t).map(|v| if flat { 0.0 } else { (v - mean) / scale })).collect()
}

/// Returns leave-one-out advantages (RLOO, arXiv 2402.14740): each response's reward minus the mean of the *other* rewards of its group.
///
/// Masked rewards are treated as in [`group_advantages`]. The advantage of a single response is 0, and so are those of equal rewards,
/// exactly.
pub fn leave_one_out_advantages(totals: &[Option<f64>]) -> Vec<Option<f64>> {
    let values = finite_rewards(totals);
    let sum = values.iter().sum::<f64>();
    let others = values.len().saturating_sub(1) as f64;
    let flat = rewards_are_equal(totals);
    let advantage = |v: f64| if flat { 0.0 } else { v - (sum - v) / others };
    totals.iter().map(|t| finite(t).map(advantage)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rewards_give_zero() {
        for std in [true, false] {
            assert_eq!(group_advantages(&[Some(0.3); 4], std), vec![Some(0.0); 4]);
            assert_eq!(group_advantages(&[Some(0.1 + 0.2), Some(0.3)], std), vec![Some(0.0); 2]);
        }
        assert_eq!(leave_one_out_advantages(&[Some(0.1 + 0.2), Some(0.3)]), vec![Some(0.0); 2]);
        assert!(rewards_are_equal(&[Some(0.1 + 0.2), None, Some(0.3)]) && !rewards_are_equal(&[Some(0.1), Some(0.3)]));
        assert!(!rewards_are_equal(&[None, None]), "a masked group does not count as equal");
    }

    #[test]
    fn masked_and_non_finite_rewards_are_left_out() {
        let rewards = [Some(1.0), None, Some(3.0), Some(f64::NAN)];
        assert_eq!(group_advantages(&rewards, false), vec![Some(-1.0), None, Some(1.0), None]);
        assert_eq!(leave_one_out_advantages(&rewards), vec![Some(-2.0), None, Some(2.0), None]);
        for f in [|t: &[Option<f64>]| group_advantages(t, true), leave_one_out_advantages] {
            assert_eq!(f(&[None, None]), vec![None, None]);
            assert_eq!(f(&[None, Some(2.0)]), vec![None, Some(0.0)]);
            assert!(f(&[]).is_empty());
        }
    }
}
