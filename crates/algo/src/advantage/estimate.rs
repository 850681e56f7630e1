//! One entry to every advantage: from the rewards of a batch of groups to an advantage per token.

use super::{discounted, gae, group_advantages, leave_one_out, token_rewards};
use crate::AlgoError;
use crate::error::expect_len;

/// How rewards become advantages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Estimator {
    /// Reward minus the group's mean, over its deviation or not: [`group_advantages`], the same for all tokens of a response.
    Grpo {
        /// Divide by the group's standard deviation.
        scale_by_std: bool,
    },
    /// Reward minus the mean of the group's other rewards: [`leave_one_out`], the same for all tokens of a response.
    Rloo,
    /// Returns without a baseline of the prompt: [`discounted`] rewards, penalties from each token on (REINFORCE++, arXiv
    /// 2501.03262). The source's normalisation over the whole batch is [`super::Moments::whiten`], to be done afterwards.
    ReinforcePlusPlus {
        /// Discount; 1 in the source.
        gamma: f64,
    },
    /// The same with the group's mean subtracted from the reward first, undiscounted (the baseline variant of arXiv 2501.03262;
    /// its scale, too, comes from the whole batch).
    ReinforcePlusPlusBaseline,
    /// Generalised advantage estimation with a value head: [`gae`].
    Gae {
        /// Discount.
        gamma: f64,
        /// Lambda.
        lambda: f64,
    },
}

impl Estimator {
    /// Whether it needs values and gives value targets.
    pub fn needs_values(self) -> bool {
        matches!(self, Self::Gae { .. })
    }
}

/// One response whose reward is there.
#[derive(Debug, Clone, Copy)]
pub struct Sampled<'a> {
    /// Reward of the whole response.
    pub reward: f64,
    /// Its length.
    pub tokens: usize,
    /// What each token costs: the weight of KL times KL. Empty where KL is not in the reward.
    pub penalty: &'a [f64],
    /// Value at each token; empty where there is no value head.
    pub values: &'a [f64],
}

/// Flat results in the order of the groups' responses.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Estimate {
    /// `[N]`, not whitened.
    pub advantages: Vec<f64>,
    /// `[N]` value targets; empty where the estimator has none.
    pub targets: Vec<f64>,
}

/// Advantages of `groups`, each the responses to one prompt without the masked ones. Estimators that compare responses subtract
/// the sum of a response's penalties from its reward first, as they see responses only as a whole.
///
/// # Errors
/// Penalties or values whose number is not that of the tokens.
pub fn estimate(estimator: Estimator, groups: &[Vec<Sampled<'_>>]) -> Result<Estimate, AlgoError> {
    let mut out = Estimate::default();
    for group in groups {
        for r in group {
            if !r.penalty.is_empty() {
                expect_len("penalty", r.penalty.len(), r.tokens)?;
            }
            if estimator.needs_values() {
                expect_len("values", r.values.len(), r.tokens)?;
            }
        }
        let whole = || group.iter().map(|r| Some(r.reward - r.penalty.iter().sum::<f64>())).collect::<Vec<_>>();
        match estimator {
            Estimator::Grpo { scale_by_std } => repeat(group, group_advantages(&whole(), scale_by_std), &mut out),
            Estimator::Rloo => repeat(group, leave_one_out(&whole()), &mut out),
            Estimator::ReinforcePlusPlus { gamma } => {
                for r in group {
                    out.advantages.extend(discounted(&token_rewards(r.reward, r.penalty, r.tokens), gamma));
                }
            }
            Estimator::ReinforcePlusPlusBaseline => {
                let rewards: Vec<Option<f64>> = group.iter().map(|r| Some(r.reward)).collect();
                for (r, a) in group.iter().zip(group_advantages(&rewards, false)) {
                    let along = token_rewards(a.unwrap_or(f64::NAN), r.penalty, r.tokens);
                    out.advantages.extend(discounted(&along, 1.0));
                }
            }
            Estimator::Gae { gamma, lambda } => {
                for r in group {
                    let (a, t) = gae(&token_rewards(r.reward, r.penalty, r.tokens), r.values, gamma, lambda);
                    out.advantages.extend(a);
                    out.targets.extend(t);
                }
            }
        }
    }
    Ok(out)
}

/// One advantage for all tokens of a response. A reward that is not finite gives NaN, which [`crate::check_tokens`] finds.
fn repeat(group: &[Sampled<'_>], advantages: Vec<Option<f64>>, out: &mut Estimate) {
    for (r, a) in group.iter().zip(advantages) {
        out.advantages.extend(std::iter::repeat_n(a.unwrap_or(f64::NAN), r.tokens));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_that_differ_are_named() {
        let r = Sampled { reward: 1.0, tokens: 2, penalty: &[0.1], values: &[0.0, 0.0] };
        let e = estimate(Estimator::Rloo, &[vec![r]]).unwrap_err();
        assert_eq!(e.to_string(), "`penalty` has shape [1] where [2] is needed");
        let short = Sampled { penalty: &[], values: &[0.0], ..r };
        let e = estimate(Estimator::Gae { gamma: 1.0, lambda: 1.0 }, &[vec![short]]).unwrap_err();
        assert!(matches!(e, AlgoError::Shape { what: "values", .. }));
        assert!(estimate(Estimator::Rloo, &[vec![short]]).is_ok(), "values are not looked at without need");
    }

    #[test]
    fn a_reward_that_is_not_finite_does_not_pass_for_zero() {
        let r = |reward| Sampled { reward, tokens: 1, penalty: &[], values: &[] };
        let all = [Estimator::Grpo { scale_by_std: true }, Estimator::Rloo, Estimator::ReinforcePlusPlusBaseline];
        for e in all {
            let out = estimate(e, &[vec![r(f64::INFINITY), r(1.0)]]).unwrap();
            assert!(!out.advantages[0].is_finite(), "{e:?}");
        }
    }
}
