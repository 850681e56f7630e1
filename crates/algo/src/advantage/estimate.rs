//! Entry point of all estimators: from the rewards of a batch of groups to an advantage per token.

use unveil_core::Algorithm;

use super::{discounted_returns, gae, group_advantages, leave_one_out_advantages, token_rewards};
use crate::AlgoError;
use crate::error::expect_len;

/// Estimator of advantages from rewards: an algorithm and its parameters, each of which only the algorithms named there use.
///
/// - GRPO: reward minus the group's mean, divided by its standard deviation if `scale_by_std`: [`group_advantages`], the same for all
///   tokens of a response.
/// - RLOO: reward minus the mean of the group's other rewards: [`leave_one_out_advantages`], the same for all tokens of a response.
/// - REINFORCE++: [`discounted_returns`] of rewards and penalties, without a baseline (arXiv 2501.03262). The source's normalisation over
///   the whole batch is [`super::Moments::whiten`], to be applied afterwards.
/// - REINFORCE++ with baseline: the same with the group's mean subtracted from the reward first, undiscounted (the baseline variant of
///   arXiv 2501.03262; it is normalised over the whole batch as well).
/// - PPO: generalised advantage estimation with a value head: [`gae`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimator {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// Whether to divide by the group's standard deviation (GRPO).
    pub scale_by_std: bool,
    /// Discount (PPO, REINFORCE++); 1 in the source of REINFORCE++.
    pub gamma: f64,
    /// Lambda (PPO).
    pub lambda: f64,
}

/// A response with a reward.
#[derive(Debug, Clone, Copy)]
pub struct ScoredResponse<'a> {
    /// Reward of the whole response.
    pub reward: f64,
    /// Length in tokens.
    pub tokens: usize,
    /// Penalty per token: KL coefficient times KL. Empty if KL is not part of the reward.
    pub penalty: &'a [f64],
    /// Value per token; empty without a value head.
    pub values: &'a [f64],
}

/// Advantages and value targets, flat in the order of the groups' responses.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdvantageEstimate {
    /// `[N]`, not whitened.
    pub advantages: Vec<f64>,
    /// `[N]` value targets; empty if the estimator has none.
    pub targets: Vec<f64>,
}

/// Estimates the advantages of `groups`, each with the responses to one prompt except the masked ones. Estimators that compare whole
/// responses subtract the sum of a response's penalties from its reward first.
///
/// # Errors
/// Returns [`AlgoError::Shape`] if the number of penalties or values is not that of the tokens.
pub fn estimate_advantages(
    estimator: Estimator,
    groups: &[Vec<ScoredResponse<'_>>],
) -> Result<AdvantageEstimate, AlgoError> {
    let mut out = AdvantageEstimate::default();
    for group in groups {
        for r in group {
            if !r.penalty.is_empty() {
                expect_len("penalty", r.penalty.len(), r.tokens)?;
            }
            if estimator.algorithm.needs_values() {
                expect_len("values", r.values.len(), r.tokens)?;
            }
        }
        let shaped_rewards =
            || group.iter().map(|r| Some(r.reward - r.penalty.iter().sum::<f64>())).collect::<Vec<_>>();
        match estimator.algorithm {
            Algorithm::Grpo => {
                repeat_per_token(group, group_advantages(&shaped_rewards(), estimator.scale_by_std), &mut out)
            }
            Algorithm::Rloo => repeat_per_token(group, leave_one_out_advantages(&shaped_rewards()), &mut out),
            Algorithm::ReinforcePlusPlus => {
                for r in group {
                    let rewards = token_rewards(r.reward, r.penalty, r.tokens);
                    out.advantages.extend(discounted_returns(&rewards, estimator.gamma));
                }
            }
            Algorithm::ReinforcePlusPlusBaseline => {
                let rewards: Vec<Option<f64>> = group.iter().map(|r| Some(r.reward)).collect();
                for (r, a) in group.iter().zip(group_advantages(&rewards, false)) {
                    let rewards = token_rewards(a.unwrap_or(f64::NAN), r.penalty, r.tokens);
                    out.advantages.extend(discounted_returns(&rewards, 1.0));
                }
            }
            Algorithm::Ppo => {
                for r in group {
                    let rewards = token_rewards(r.reward, r.penalty, r.tokens);
                    let (a, t) = gae(&rewards, r.values, estimator.gamma, estimator.lambda);
                    out.advantages.extend(a);
                    out.targets.extend(t);
                }
            }
        }
    }
    Ok(out)
}

/// Repeats the advantage of each response for all its tokens. A reward that is not finite becomes NaN, which [`crate::check_tokens`]
/// reports.
fn repeat_per_token(group: &[ScoredResponse<'_>], advantages: Vec<Option<f64>>, out: &mut AdvantageEstimate) {
    for (r, a) in group.iter().zip(advantages) {
        out.advantages.extend(std::iter::repeat_n(a.unwrap_or(f64::NAN), r.tokens));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimator(algorithm: Algorithm) -> Estimator {
        Estimator { algorithm, scale_by_std: true, gamma: 1.0, lambda: 1.0 }
    }

    #[test]
    fn length_mismatches_are_named() {
        let r = ScoredResponse { reward: 1.0, tokens: 2, penalty: &[0.1], values: &[0.0, 0.0] };
        let e = estimate_advantages(estimator(Algorithm::Rloo), &[vec![r]]).unwrap_err();
        assert_eq!(e.to_string(), "`penalty` has shape [1] where [2] is needed");
        let short = ScoredResponse { penalty: &[], values: &[0.0], ..r };
        let e = estimate_advantages(estimator(Algorithm::Ppo), &[vec![short]]).unwrap_err();
        assert!(matches!(e, AlgoError::Shape { what: "values", .. }));
        assert!(
            estimate_advantages(estimator(Algorithm::Rloo), &[vec![short]]).is_ok(),
            "values are ignored if they are not needed"
        );
    }

    #[test]
    fn non_finite_rewards_do_not_become_zero() {
        let r = |reward| ScoredResponse { reward, tokens: 1, penalty: &[], values: &[] };
        for e in [Algorithm::Grpo, Algorithm::Rloo, Algorithm::ReinforcePlusPlusBaseline] {
            let out = estimate_advantages(estimator(e), &[vec![r(f64::INFINITY), r(1.0)]]).unwrap();
            assert!(!out.advantages[0].is_finite(), "{e:?}");
        }
    }
}
