//! Division of a flat batch of tokens into groups and responses, and the counts that means divide by.

use std::ops::Add;

/// Lengths in tokens of each response of each group, in the order of the flat batch (group, response, position).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenLayout {
    lengths: Vec<Vec<usize>>,
}

/// Position of a token in a batch, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenPosition {
    /// Group within the batch.
    pub group: usize,
    /// Response within its group.
    pub response: usize,
    /// Token within its response.
    pub token: usize,
}

/// Counts of a batch. A loss divides by those of the **whole** batch, summed over micro-batches and ranks, so that the losses and
/// gradients of its parts add up to those of the whole (a sum over ranks, not a mean).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Response tokens.
    pub tokens: u64,
    /// Responses with at least one token.
    pub responses: u64,
    /// Groups with at least one token.
    pub groups: u64,
    /// Responses with vision relevance; 0 in the result of [`TokenLayout::counts`].
    pub attended: u64,
}

impl Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            responses: self.responses + other.responses,
            groups: self.groups + other.groups,
            attended: self.attended + other.attended,
        }
    }
}

impl TokenLayout {
    /// Creates a layout from the lengths of each group's responses. Responses of length 0 are allowed and not counted.
    pub fn new(lengths: Vec<Vec<usize>>) -> Self {
        Self { lengths }
    }

    /// Returns the lengths by group and response.
    pub fn lengths(&self) -> &[Vec<usize>] {
        &self.lengths
    }

    /// Returns N, the number of tokens.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().flatten().sum()
    }

    /// Returns the counts, with `attended` = 0.
    pub fn counts(&self) -> Counts {
        let has_tokens = |group: &&Vec<usize>| group.iter().any(|n| *n > 0);
        Counts {
            tokens: self.tokens() as u64,
            responses: self.lengths.iter().flatten().filter(|n| **n > 0).count() as u64,
            groups: self.lengths.iter().filter(has_tokens).count() as u64,
            attended: 0,
        }
    }

    /// Returns the position of flat token `index`; `None` beyond the end.
    pub fn position(&self, index: usize) -> Option<TokenPosition> {
        let mut left = index;
        for (group, lengths) in self.lengths.iter().enumerate() {
            for (response, length) in lengths.iter().enumerate() {
                if left < *length {
                    return Some(TokenPosition { group, response, token: left });
                }
                left -= length;
            }
        }
        None
    }

    /// Returns for each token the index of its response in flat order.
    pub(crate) fn response_indices(&self) -> Vec<i64> {
        let numbered = self.lengths.iter().flatten().enumerate();
        numbered.flat_map(|(r, n)| std::iter::repeat_n(r as i64, *n)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_positions() {
        let l = TokenLayout::new(vec![vec![2, 0, 1], vec![0], vec![3]]);
        assert_eq!(l.counts(), Counts { tokens: 6, responses: 3, groups: 2, attended: 0 });
        assert_eq!(l.response_indices(), vec![0, 0, 2, 4, 4, 4]);
        assert_eq!(l.position(2), Some(TokenPosition { group: 0, response: 2, token: 0 }));
        assert_eq!(l.position(5), Some(TokenPosition { group: 2, response: 0, token: 2 }));
        assert_eq!(l.position(6), None);
        let halves = [TokenLayout::new(vec![vec![2, 0, 1]]), TokenLayout::new(vec![vec![0], vec![3]])];
        assert_eq!(halves[0].counts() + halves[1].counts(), l.counts());
    }
}
