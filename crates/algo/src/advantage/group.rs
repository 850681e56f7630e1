//! Advantages of a response against the other responses to the same prompt. Masked rewards are left out, never taken as 0.

use super::EQUAL;

/// Added to the standard deviation before dividing.
pub const STD_EPS: f64 = 1e-6;

/// The rewards that are there: a masked one (`None`) is not, nor is one that is not finite.
fn present(totals: &[Option<f64>]) -> Vec<f64> {
    totals.iter().filter_map(finite).collect()
}

fn finite(total: &Option<f64>) -> Option<f64> {
    total.filter(|v| v.is_finite())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// True where a group has rewards and all of them are equal (within 1e-9): its relative advantages are exactly 0.
pub fn all_equal(totals: &[Option<f64>]) -> bool {
    let values = present(totals);
    !values.is_empty() && values.iter().all(|v| (v - mean(&values)).abs() <= EQUAL)
}

/// Group-relative advantages: each response's reward minus the mean of its group (DeepSeekMath, arXiv 2402.03300, section
/// 4.1.2), over the group's standard deviation when `scale_by_std` (sample standard deviation, plus [`STD_EPS`]; without it:
/// Dr. GRPO, arXiv 2503.20783, section 3.2).
///
/// `totals` are the rewards of one group; a masked response (`None`) is left out of mean and deviation and gets no advantage.
/// Where all rewards are equal the advantages are exactly 0. A reward that is not finite counts as masked.
pub fn group_advantages(totals: &[Option<f64>], scale_by_std: bool) -> Vec<Option<f64>> {
    let values = present(totals);
    let (mean, n) = (mean(&values), values.len() as f64);
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let scale = if scale_by_std { variance.sqrt() + STD_EPS } else { 1.0 };
    let flat = all_equal(totals);
    totals.iter().map(|t| finite(t).map(|v| if flat { 0.0 } else { (v - mean) / scale })).collect()
}

/// Leave-one-out advantages (RLOO, arXiv 2402.14740): each response's reward minus the mean of the *other* rewards of its group.
///
/// Masks as in [`group_advantages`]. A response alone has nothing to compare with: 0. All equal: exactly 0.
pub fn leave_one_out(totals: &[Option<f64>]) -> Vec<Option<f64>> {
    let values = present(totals);
    let (sum, others) = (values.iter().sum::<f64>(), values.len().saturating_sub(1) as f64);
    let flat = all_equal(totals);
    let one = |v: f64| if flat { 0.0 } else { v - (sum - v) / others };
    totals.iter().map(|t| finite(t).map(one)).collect()
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
        assert_eq!(leave_one_out(&[Some(0.1 + 0.2), Some(0.3)]), vec![Some(0.0); 2]);
        assert!(all_equal(&[Some(0.1 + 0.2), None, Some(0.3)]) && !all_equal(&[Some(0.1), Some(0.3)]));
        assert!(!all_equal(&[None, None]), "a masked group is not an equal one");
    }

    #[test]
    fn masked_and_non_finite_are_left_out() {
        let rewards = [Some(1.0), None, Some(3.0), Some(f64::NAN)];
        assert_eq!(group_advantages(&rewards, false), vec![Some(-1.0), None, Some(1.0), None]);
        assert_eq!(leave_one_out(&rewards), vec![Some(-2.0), None, Some(2.0), None]);
        for f in [|t: &[Option<f64>]| group_advantages(t, true), leave_one_out] {
            assert_eq!(f(&[None, None]), vec![None, None]);
            assert_eq!(f(&[None, Some(2.0)]), vec![None, Some(0.0)]);
            assert!(f(&[]).is_empty());
        }
    }
}
