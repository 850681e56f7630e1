//! Advantages from rewards: group-relative (GRPO) and generalised advantage estimation (PPO). Host arithmetic in f64, since a
//! batch has a few thousand tokens at most.

use tch::{Kind, Tensor};

/// Added to the standard deviation before dividing.
pub const STD_EPS: f64 = 1e-6;

/// Spread below which the rewards of a group count as equal.
const EQUAL: f64 = 1e-9;

/// Group-relative advantages: each response's reward minus the mean of its group (DeepSeekMath, arXiv 2402.03300, §4.1.2), over
/// the group's standard deviation when `scale_by_std` (sample standard deviation, plus [`STD_EPS`]; without it: Dr. GRPO, arXiv
/// 2503.20783, §3.2).
///
/// `totals` are the rewards of one group; a masked response (`None`) is left out of mean and deviation and gets no advantage.
/// Where all rewards are equal the advantages are exactly 0. A reward that is not finite counts as masked.
pub fn group_advantages(totals: &[Option<f64>], scale_by_std: bool) -> Vec<Option<f64>> {
    let finite = |t: &Option<f64>| t.filter(|v| v.is_finite());
    let present: Vec<f64> = totals.iter().filter_map(finite).collect();
    let n = present.len() as f64;
    let mean = present.iter().sum::<f64>() / n.max(1.0);
    let spread = present.iter().map(|v| (v - mean).abs()).fold(0.0, f64::max);
    let variance = present.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let scale = if scale_by_std { variance.sqrt() + STD_EPS } else { 1.0 };
    totals.iter().map(|t| finite(t).map(|v| if spread <= EQUAL { 0.0 } else { (v - mean) / scale })).collect()
}

/// Generalised advantage estimation over the tokens of one response (arXiv 1506.02438, eq. 16), the reward given at the last
/// token and the value after it 0: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}.
///
/// Returns advantages and value targets `A_t + V_t`, one per entry of `values`.
pub fn gae(reward: f64, values: &[f32], gamma: f64, lambda: f64) -> (Vec<f32>, Vec<f32>) {
    let mut advantages = vec![0.0; values.len()];
    let (mut next_value, mut next_advantage) = (0.0, 0.0);
    for (t, v) in values.iter().map(|v| f64::from(*v)).enumerate().rev() {
        let r = if t + 1 == values.len() { reward } else { 0.0 };
        next_advantage = r + gamma * next_value - v + gamma * lambda * next_advantage;
        next_value = v;
        advantages[t] = next_advantage as f32;
    }
    let targets = advantages.iter().zip(values).map(|(a, v)| a + v).collect();
    (advantages, targets)
}

/// Advantages `[N]` shifted to mean 0 and scaled to variance 1 over the batch (the implementation detail of "What matters in
/// on-policy reinforcement learning", arXiv 2006.05990, appendix B.9; sample variance plus 1e-8). One token alone becomes 0.
pub fn whiten(advantages: &Tensor) -> Tensor {
    let mean = advantages.mean(Kind::Float);
    if advantages.numel() < 2 {
        return advantages - mean;
    }
    let variance = advantages.var(true);
    (advantages - mean) * (variance + 1e-8).rsqrt()
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
    }

    #[test]
    fn masked_and_non_finite_are_left_out() {
        let a = group_advantages(&[Some(1.0), None, Some(3.0), Some(f64::NAN)], false);
        assert_eq!(a, vec![Some(-1.0), None, Some(1.0), None]);
        assert_eq!(group_advantages(&[None, None], true), vec![None, None]);
        assert_eq!(group_advantages(&[None, Some(2.0)], true), vec![None, Some(0.0)]);
        assert!(group_advantages(&[], true).is_empty());
    }

    #[test]
    fn gae_by_hand() {
        let (a, r) = gae(1.0, &[0.5, 0.25], 0.9, 0.8);
        assert!((a[1] - 0.75).abs() < 1e-6);
        assert!((a[0] - (0.9 * 0.25 - 0.5 + 0.72 * 0.75)).abs() < 1e-6);
        assert!((r[1] - 1.0).abs() < 1e-6);
        assert_eq!(gae(1.0, &[], 1.0, 1.0), (vec![], vec![]));
    }
}
