//! How a flat batch of tokens is divided: groups, responses, positions; and the counts that a mean is divided by. Must not
//! know: what the tokens' numbers are.

use std::ops::Add;

/// Lengths in tokens of each response of each group, in the order of the flat batch (group, response, position).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layout {
    lengths: Vec<Vec<usize>>,
}

/// Where a token is; all positions count from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Group within the batch.
    pub group: usize,
    /// Response within its group.
    pub response: usize,
    /// Token within its response.
    pub token: usize,
}

/// Counts of a batch. What a loss divides by are those of the **whole** batch, summed over micro-batches and ranks: then the
/// losses and gradients of the parts add up to those of the whole (a sum over ranks, not a mean).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Response tokens.
    pub tokens: u64,
    /// Responses with at least one token.
    pub responses: u64,
    /// Groups with at least one token.
    pub groups: u64,
    /// Responses that have vision relevance; [`Layout::counts`] does not know them and gives 0.
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

impl Layout {
    /// From the lengths of each group's responses. Responses of length 0 may be among them; they count nowhere.
    pub fn new(lengths: Vec<Vec<usize>>) -> Self {
        Self { lengths }
    }

    /// Lengths by group and response.
    pub fn lengths(&self) -> &[Vec<usize>] {
        &self.lengths
    }

    /// N, the number of tokens.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().flatten().sum()
    }

    /// Its own counts, `attended` left 0.
    pub fn counts(&self) -> Counts {
        let full = |group: &&Vec<usize>| group.iter().any(|n| *n > 0);
        Counts {
            tokens: self.tokens() as u64,
            responses: self.lengths.iter().flatten().filter(|n| **n > 0).count() as u64,
            groups: self.lengths.iter().filter(full).count() as u64,
            attended: 0,
        }
    }

    /// Where flat token `index` is; none beyond the end.
    pub fn place(&self, index: usize) -> Option<Place> {
        let mut left = index;
        for (group, lengths) in self.lengths.iter().enumerate() {
            for (response, length) in lengths.iter().enumerate() {
                if left < *length {
                    return Some(Place { group, response, token: left });
                }
                left -= length;
            }
        }
        None
    }

    /// Per token, the number of its response in flat order.
    pub(crate) fn response_of(&self) -> Vec<i64> {
        let numbered = self.lengths.iter().flatten().enumerate();
        numbered.flat_map(|(r, n)| std::iter::repeat_n(r as i64, *n)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_places() {
        let l = Layout::new(vec![vec![2, 0, 1], vec![0], vec![3]]);
        assert_eq!(l.counts(), Counts { tokens: 6, responses: 3, groups: 2, attended: 0 });
        assert_eq!(l.response_of(), vec![0, 0, 2, 4, 4, 4]);
        assert_eq!(l.place(2), Some(Place { group: 0, response: 2, token: 0 }));
        assert_eq!(l.place(5), Some(Place { group: 2, response: 0, token: 2 }));
        assert_eq!(l.place(6), None);
        let halves = [Layout::new(vec![vec![2, 0, 1]]), Layout::new(vec![vec![0], vec![3]])];
        assert_eq!(halves[0].counts() + halves[1].counts(), l.counts());
    }
}
