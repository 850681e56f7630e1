//! Micro-batches: what both stages train on, divided so that one forward and backward pass fits the token budget.

use std::ops::Range;

use unveil_core::GroupInput;
use unveil_model::PackedGroup;

/// A prompt with the tokens that its loss is computed on: a group of stage 2 or a sample of stage 1.
pub(crate) trait BatchItem {
    /// Returns the prompt and its responses.
    fn packed(&self) -> &PackedGroup;

    /// Returns the prepared prompt, with the pixels of its images.
    fn input(&self) -> &GroupInput;

    /// Returns the number of response tokens.
    fn token_count(&self) -> usize {
        self.packed().responses.iter().map(Vec::len).sum()
    }

    /// Returns the length of the packed sequence in tokens.
    fn packed_len(&self) -> usize {
        self.packed().prompt.tokens.len() + self.token_count()
    }
}

/// Rule by which items, sorted by length, are divided into micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Division {
    /// One row per item, padded to the longest. At most [`MAX_PADDING`] of a micro-batch is padding, unless it has a single item.
    LittlePadding,
    /// One row per item, padded to the longest. Items that fit the budget together stay in one micro-batch, in their order.
    Padded,
    /// All items of a micro-batch in one row, without padding.
    Packed,
}

/// Largest share of a micro-batch that may be padding under [`Division::LittlePadding`].
const MAX_PADDING: f64 = 0.05;

impl Division {
    /// Divides items into micro-batches of at most `budget` positions, padding included, unless a single item is longer.
    pub(crate) fn micro_batches<'m, T: BatchItem>(self, items: &[&'m T], budget: usize) -> Vec<Vec<&'m T>> {
        if items.is_empty() {
            return Vec::new();
        }
        if self == Self::Padded && self.positions(items) <= budget {
            return vec![items.to_vec()];
        }
        let mut sorted = items.to_vec();
        sorted.sort_by_key(|item| item.packed_len());
        let packed_lens: Vec<usize> = sorted.iter().map(|item| item.packed_len()).collect();
        self.split_by_len(&packed_lens, budget).into_iter().map(|range| sorted[range].to_vec()).collect()
    }

    /// Returns the number of positions of a micro-batch, padding included.
    pub(crate) fn positions<T: BatchItem>(self, micro_batch: &[&T]) -> usize {
        let longest = micro_batch.iter().map(|item| item.packed_len()).max().unwrap_or(0);
        match self {
            Self::Packed => micro_batch.iter().map(|item| item.packed_len()).sum(),
            Self::LittlePadding | Self::Padded => micro_batch.len() * longest,
        }
    }

    /// Returns the number of positions of several micro-batches, and the number of those that are padding.
    pub(crate) fn padding_positions<T: BatchItem>(self, micro_batches: &[Vec<&T>]) -> (usize, usize) {
        let all: usize = micro_batches.iter().map(|micro_batch| self.positions(micro_batch)).sum();
        let filled: usize = micro_batches.iter().flatten().map(|item| item.packed_len()).sum();
        (all, all - filled)
    }

    /// Splits sequences of these ascending lengths into ranges of consecutive ones.
    fn split_by_len(self, packed_lens: &[usize], budget: usize) -> Vec<Range<usize>> {
        let mut out: Vec<Range<usize>> = Vec::new();
        let mut longest = 0;
        let mut filled = 0;
        for (i, len) in packed_lens.iter().enumerate() {
            longest = longest.max(*len);
            filled += len;
            match out.last_mut() {
                Some(range) if self.accepts((range.len() + 1) * longest, filled, budget) => range.end = i + 1,
                _ => {
                    longest = *len;
                    filled = *len;
                    out.push(i..i + 1);
                }
            }
        }
        out
    }

    /// Returns whether a micro-batch of `padded` positions, of which `filled` hold tokens, may be formed.
    fn accepts(self, padded: usize, filled: usize, budget: usize) -> bool {
        match self {
            Self::LittlePadding => padded <= budget && (padded - filled) as f64 <= MAX_PADDING * padded as f64,
            Self::Padded => padded <= budget,
            Self::Packed => filled <= budget,
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn micro_batches_have_little_padding() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let split = |lens: &[usize], budget| Division::LittlePadding.split_by_len(lens, budget);
        for count in [1, 2, 16, 200] {
            let mut packed_lens: Vec<usize> = (0..count).map(|_| rng.random_range(290..1400)).collect();
            packed_lens.sort_unstable();
            let ranges = split(&packed_lens, 20_000);
            assert_eq!(ranges.iter().cloned().flatten().collect::<Vec<_>>(), (0..count).collect::<Vec<_>>());
            for range in &ranges {
                let lens = &packed_lens[range.clone()];
                let padded = lens.len() * lens.iter().max().unwrap();
                assert!(padded <= 20_000, "{lens:?}");
                assert!((padded - lens.iter().sum::<usize>()) as f64 <= 0.05 * padded as f64, "{lens:?}");
            }
        }
        assert_eq!(split(&[500, 500, 500], 1000), [0..2, 2..3]);
        assert_eq!(split(&[5000, 5000], 1000).len(), 2, "a single group may exceed the budget");
    }

    #[test]
    fn packed_rows_are_filled_to_the_budget() {
        let lens = [100, 300, 400, 500, 900];
        assert_eq!(Division::Packed.split_by_len(&lens, 1000), [0..3, 3..4, 4..5]);
        assert_eq!(Division::Padded.split_by_len(&lens, 1000), [0..2, 2..4, 4..5]);
        assert_eq!(Division::LittlePadding.split_by_len(&lens, 1000).len(), 5);
    }
}
