//! Rewards per token of one response, their discounted returns, and generalised advantage estimation.

/// Returns the rewards per token of one response, `tokens` long: the reward of the whole response at its last token, minus `penalty` (KL
/// coefficient times KL) at each token (arXiv 1909.08593, eq. 2, spread over tokens). An empty `penalty` means none.
pub fn token_rewards(reward: f64, penalty: &[f64], tokens: usize) -> Vec<f64> {
    let mut out: Vec<f64> = (0..tokens).map(|t| -penalty.get(t).copied().unwrap_or(0.0)).collect();
    if let Some(last) = out.last_mut() {
        *last += reward;
    }
    out
}

/// Returns discounted returns: R_t = r_t + gamma R_{t+1}, with 0 after the end.
pub fn discounted_returns(rewards: &[f64], gamma: f64) -> Vec<f64> {
    let mut out = rewards.to_vec();
    for t in (1..out.len()).rev() {
        out[t - 1] += gamma * out[t];
    }
    out
}

/// Computes generalised advantage estimation over the tokens of one response (arXiv 1506.02438, eq. 16), with value 0 after the last
/// token:
/// delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}.
///
/// `rewards` and `values` have one entry per token. Returns advantages and value targets `A_t + V_t`.
pub fn gae(rewards: &[f64], values: &[f64], gamma: f64, lambda: f64) -> (Vec<f64>, Vec<f64>) {
    let mut advantages = vec![0.0; values.len()];
    let mut next_value = 0.0;
    let mut next_advantage = 0.0;
    for (t, (r, v)) in rewards.iter().zip(values).enumerate().rev() {
        next_advantage = r + gamma * next_value - v + gamma * lambda * next_advantage;
        next_value = *v;
        advantages[t] = next_advantage;
    }
    let targets = advantages.iter().zip(values).map(|(a, v)| a + v).collect();
    (advantages, targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gae_matches_a_manual_calculation() {
        let (a, r) = gae(&token_rewards(1.0, &[], 2), &[0.5, 0.25], 0.9, 0.8);
        assert!((a[1] - 0.75).abs() < 1e-12);
        assert!((a[0] - (0.9 * 0.25 - 0.5 + 0.72 * 0.75)).abs() < 1e-12);
        assert!((r[1] - 1.0).abs() < 1e-12);
        assert_eq!(gae(&[], &[], 1.0, 1.0), (vec![], vec![]));
    }

    #[test]
    fn penalties_apply_at_their_tokens() {
        assert_eq!(token_rewards(1.0, &[0.25, 0.5], 2), vec![-0.25, 0.5]);
        assert_eq!(discounted_returns(&[-0.25, 0.5], 0.5), vec![0.0, 0.5]);
        assert!(token_rewards(1.0, &[], 0).is_empty() && discounted_returns(&[], 0.5).is_empty());
    }
}
