//! How the terms of single tokens become one loss: as weights per token that depend on the token's own response and group and
//! on the counts of the whole batch alone, so that parts of a batch add up exactly. Must not know: what is weighted.

use crate::layout::{Counts, Layout};

/// What weighs the same: tokens, responses, or prompts. Each is the sum over all tokens of weight times term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aggregation {
    /// Mean over all tokens of the batch: 1 / tokens (DAPO, arXiv 2503.14476, the token-level loss).
    TokenMean,
    /// Mean over responses of the mean over their tokens: 1 / (responses x length) (GRPO, arXiv 2402.03300, eq. 3). A token of a
    /// long response weighs less.
    SequenceTokenMean,
    /// Mean over responses of the sum over their tokens: 1 / responses. The gradient of the likelihood of whole responses; grows
    /// with length.
    SequenceTokenSum,
    /// Mean over responses of the sum over their tokens divided by a constant: 1 / (responses x max_length) (Dr. GRPO, arXiv
    /// 2503.20783). No bias by length, and a scale that does not grow with it.
    SequenceMaxLength {
        /// The constant: the length cap of sampling.
        max_length: u64,
    },
    /// Mean over groups of the mean over a group's tokens: 1 / (groups x tokens of the group). Each prompt weighs the same
    /// (the prompt average of arXiv 2510.13786, section 3.2).
    GroupTokenMean,
}

impl Aggregation {
    /// Weights per token, `[N]` for the N tokens of `layout`, with `counts` those of the whole batch that it is part of. Groups
    /// must be whole.
    pub fn weights(self, layout: &Layout, counts: &Counts) -> Vec<f64> {
        let one_in = |n: u64| 1.0 / n.max(1) as f64;
        let mut out = Vec::with_capacity(layout.tokens());
        for group in layout.lengths() {
            let in_group: usize = group.iter().sum();
            for length in group {
                let weight = one_in(match self {
                    Self::TokenMean => counts.tokens,
                    Self::SequenceTokenMean => counts.responses * *length as u64,
                    Self::SequenceTokenSum => counts.responses,
                    Self::SequenceMaxLength { max_length } => counts.responses * max_length,
                    Self::GroupTokenMean => counts.groups * in_group as u64,
                });
                out.extend(std::iter::repeat_n(weight, *length));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_by_hand() {
        let layout = Layout::new(vec![vec![1, 3], vec![2]]);
        let of = |a: Aggregation| a.weights(&layout, &layout.counts());
        assert_eq!(of(Aggregation::TokenMean), vec![1.0 / 6.0; 6]);
        let third = 1.0 / 3.0;
        assert_eq!(
            of(Aggregation::SequenceTokenMean),
            vec![third, 1.0 / 9.0, 1.0 / 9.0, 1.0 / 9.0, 1.0 / 6.0, 1.0 / 6.0]
        );
        assert_eq!(of(Aggregation::SequenceTokenSum), vec![third; 6]);
        assert_eq!(of(Aggregation::SequenceMaxLength { max_length: 10 }), vec![1.0 / 30.0; 6]);
        assert_eq!(of(Aggregation::GroupTokenMean), vec![0.125, 0.125, 0.125, 0.125, 0.25, 0.25]);
    }

    #[test]
    fn parts_have_the_weights_of_the_whole() {
        let whole = Layout::new(vec![vec![4, 2, 0], vec![5], vec![1, 1]]);
        let parts = [Layout::new(vec![vec![4, 2, 0]]), Layout::new(vec![vec![5], vec![1, 1]])];
        let all = [
            Aggregation::TokenMean,
            Aggregation::SequenceTokenMean,
            Aggregation::SequenceTokenSum,
            Aggregation::SequenceMaxLength { max_length: 7 },
            Aggregation::GroupTokenMean,
        ];
        for a in all {
            let joined: Vec<f64> = parts.iter().flat_map(|p| a.weights(p, &whole.counts())).collect();
            assert_eq!(joined, a.weights(&whole, &whole.counts()), "{a:?}");
        }
    }
}
