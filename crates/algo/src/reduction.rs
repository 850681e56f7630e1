//! Loss reductions, as weights per token. A weight depends only on the token's response and group and on the counts of the whole batch,
//! so that micro-batches add up exactly.

use unveil_core::LossReduction;

use crate::layout::{Counts, TokenLayout};

/// Returns weights per token, `[N]` for the N tokens of `layout`; `counts` are those of the whole batch, of which it may be a part.
/// Groups must not be split. The loss is the sum over all tokens of weight times term.
///
/// - `Token`: 1 / tokens (DAPO, arXiv 2503.14476, the token-level loss).
/// - `SequenceTokenMean`: 1 / (responses x length) (GRPO, arXiv 2402.03300, eq. 3). Tokens of long responses weigh less.
/// - `SequenceTokenSum`: 1 / responses. Its gradient is that of the likelihood of whole responses and grows with length.
/// - `SequenceMaxLength`: 1 / (responses x `max_length`) (Dr. GRPO, arXiv 2503.20783). It has no length bias, and its scale does not grow
///   with length. `max_length` is the maximum response length in sampling; the other reductions ignore it.
/// - `GroupTokenMean`: 1 / (groups x tokens of the group). All prompts have equal weight (prompt average, arXiv 2510.13786, section 3.2).
pub fn token_weights(reduction: LossReduction, max_length: u64, layout: &TokenLayout, counts: &Counts) -> Vec<f64> {
    let one_in = |n: u64| 1.0 / n.max(1) as f64;
    let mut out = Vec::with_capacity(layout.tokens());
    for group in layout.lengths() {
        let in_group: usize = group.iter().sum();
        for length in group {
            let weight = one_in(match reduction {
                LossReduction::Token => counts.tokens,
                LossReduction::SequenceTokenMean => counts.responses * *length as u64,
                LossReduction::SequenceTokenSum => counts.responses,
                LossReduction::SequenceMaxLength => counts.responses * max_length,
                LossReduction::GroupTokenMean => counts.groups * in_group as u64,
            });
            out.extend(std::iter::repeat_n(weight, *length));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_match_a_manual_calculation() {
        let layout = TokenLayout::new(vec![vec![1, 3], vec![2]]);
        let weights = |r| token_weights(r, 10, &layout, &layout.counts());
        assert_eq!(weights(LossReduction::Token), vec![1.0 / 6.0; 6]);
        let third = 1.0 / 3.0;
        assert_eq!(
            weights(LossReduction::SequenceTokenMean),
            vec![third, 1.0 / 9.0, 1.0 / 9.0, 1.0 / 9.0, 1.0 / 6.0, 1.0 / 6.0]
        );
        assert_eq!(weights(LossReduction::SequenceTokenSum), vec![third; 6]);
        assert_eq!(weights(LossReduction::SequenceMaxLength), vec![1.0 / 30.0; 6]);
        assert_eq!(weights(LossReduction::GroupTokenMean), vec![0.125, 0.125, 0.125, 0.125, 0.25, 0.25]);
    }

    #[test]
    fn micro_batches_have_the_weights_of_the_batch() {
        let whole = TokenLayout::new(vec![vec![4, 2, 0], vec![5], vec![1, 1]]);
        let parts = [TokenLayout::new(vec![vec![4, 2, 0]]), TokenLayout::new(vec![vec![5], vec![1, 1]])];
        let all = [
            LossReduction::Token,
            LossReduction::SequenceTokenMean,
            LossReduction::SequenceTokenSum,
            LossReduction::SequenceMaxLength,
            LossReduction::GroupTokenMean,
        ];
        for a in all {
            let joined: Vec<f64> = parts.iter().flat_map(|p| token_weights(a, 7, p, &whole.counts())).collect();
            assert_eq!(joined, token_weights(a, 7, &whole, &whole.counts()), "{a:?}");
        }
    }
}
