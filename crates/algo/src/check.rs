//! Checks that the values of a batch are finite, and counts masked and equal rewards.

use unveil_core::rewards_are_equal;

use crate::error::expect_len;
use crate::layout::{TokenLayout, TokenPosition};
use crate::{AlgoError, NotFinite};

/// Counts of groups and responses in a batch, and of those without a learning signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BatchStats {
    /// Groups.
    pub groups: usize,
    /// Responses.
    pub responses: usize,
    /// Responses without a reward.
    pub masked_responses: usize,
    /// Groups without any reward.
    pub masked_groups: usize,
    /// Groups whose rewards are all equal: their relative advantages are exactly 0.
    pub flat_groups: usize,
}

/// Checks a whole batch: `rewards` by group and response (`None`: masked), and series of one value per token, each with its name
/// ("behaviour log-probability"), flat in the order of `layout`.
///
/// # Errors
/// Returns [`AlgoError::NotFinite`] with the first NaN or infinite value and its position, and [`AlgoError::Shape`] if a series or the
/// rewards do not have the length of the layout.
pub fn check_batch(
    rewards: &[Vec<Option<f64>>],
    layout: &TokenLayout,
    series: &[(&'static str, &[f32])],
) -> Result<BatchStats, AlgoError> {
    expect_len("rewards", rewards.len(), layout.lengths().len())?;
    let mut stats = BatchStats { groups: rewards.len(), ..Default::default() };
    for (group, (totals, lengths)) in rewards.iter().zip(layout.lengths()).enumerate() {
        expect_len("rewards of a group", totals.len(), lengths.len())?;
        for (response, total) in totals.iter().enumerate() {
            if let Some(value) = total.filter(|v| !v.is_finite()) {
                return Err(NotFinite { what: "reward", group, response, token: None, value }.into());
            }
        }
        let masked = totals.iter().filter(|t| t.is_none()).count();
        stats.responses += totals.len();
        stats.masked_responses += masked;
        stats.masked_groups += usize::from(masked == totals.len());
        stats.flat_groups += usize::from(rewards_are_equal(totals));
    }
    for (what, values) in series {
        check_tokens(what, values, layout)?;
    }
    Ok(stats)
}

/// Checks one value per token, flat in the order of `layout`; `what` names it ("advantage").
///
/// # Errors
/// See [`check_batch`].
pub fn check_tokens<T: Copy + Into<f64>>(
    what: &'static str,
    values: &[T],
    layout: &TokenLayout,
) -> Result<(), AlgoError> {
    expect_len(what, values.len(), layout.tokens())?;
    let not_finite = values.iter().map(|v| (*v).into()).enumerate().find(|(_, v): &(usize, f64)| !v.is_finite());
    match not_finite.and_then(|(i, value)| Some((layout.position(i)?, value))) {
        Some((position, value)) => {
            let TokenPosition { group, response, token } = position;
            Err(NotFinite { what, group, response, token: Some(token), value }.into())
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> TokenLayout {
        TokenLayout::new(vec![vec![2, 1], vec![1, 3], vec![1, 1]])
    }

    fn rewards() -> Vec<Vec<Option<f64>>> {
        vec![vec![None, None], vec![Some(0.5), Some(0.5)], vec![Some(0.1), None]]
    }

    #[test]
    fn masks_and_flat_groups_are_counted() {
        let stats = check_batch(&rewards(), &layout(), &[("log-probability", &[0.0; 9])]).unwrap();
        let want = BatchStats { groups: 3, responses: 6, masked_responses: 3, masked_groups: 1, flat_groups: 2 };
        assert_eq!(stats, want);
    }

    #[test]
    fn first_non_finite_value_is_located() {
        let mut with_nan = rewards();
        with_nan[2][0] = Some(f64::NAN);
        let e = check_batch(&with_nan, &layout(), &[]).unwrap_err().to_string();
        assert!(e.starts_with("the reward of response 0 of group 2 is NaN"), "{e}");
        let mut logprobs = [-1.0f32; 9];
        logprobs[6] = f32::NEG_INFINITY;
        let e = check_batch(&rewards(), &layout(), &[("log-probability", &logprobs)]).unwrap_err().to_string();
        assert!(e.starts_with("the log-probability of token 2 of response 1 of group 1 is -inf"), "{e}");
        let e = check_tokens("advantage", &[0.0f64; 8], &layout()).unwrap_err().to_string();
        assert_eq!(e, "`advantage` has shape [8] where [9] is needed");
        assert!(matches!(check_batch(&with_nan[..2], &layout(), &[]), Err(AlgoError::Shape { what: "rewards", .. })));
    }
}
