//! Data parallelism: assigns the items of a batch to ranks and collects what each computed. Every rank holds the whole batch except
//! the pixels of other ranks' items, so everything apart from passes through the model is computed identically on all ranks.

use std::rc::Rc;

use tch::Device;

use crate::error::Result;
use crate::micro_batch::{BatchItem, Division};
use crate::shard::Ranks;

/// Assigns each item to one of `ranks` ranks: the longest first, each to the rank with the smallest load so far.
pub(crate) fn assign_ranks(packed_lens: &[usize], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..packed_lens.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(packed_lens[*i]));
    let mut loads = vec![0; ranks.max(1)];
    let mut owners = vec![0; packed_lens.len()];
    for i in order {
        let least = (0..loads.len()).min_by_key(|r| loads[*r]).unwrap_or(0);
        loads[least] += packed_lens[i].max(1);
        owners[i] = least;
    }
    owners
}

/// The items of a batch (groups of stage 2 or samples of stage 1), partitioned over the ranks.
pub(crate) struct Partition {
    ranks: Rc<Ranks>,
    /// Rank of each item.
    owners: Vec<usize>,
    /// Response tokens of each item.
    token_counts: Vec<usize>,
    /// Maximum of positions in a micro-batch.
    budget: usize,
    division: Division,
    device: Device,
}

/// The micro-batches of one rank. All ranks iterate over the same number of them.
pub(crate) struct MicroBatches<'m, T> {
    local: Vec<Vec<&'m T>>,
    /// Number of micro-batches on each rank, empty ones included.
    count: usize,
    /// Padded positions on the rank that has most.
    pub positions: usize,
}

impl<'m, T> MicroBatches<'m, T> {
    /// Iterates over the micro-batches; they are empty once only other ranks have items left.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[&'m T]> {
        (0..self.count).map(|i| self.local.get(i).map_or(&[][..], Vec::as_slice))
    }
}

impl Partition {
    /// Partitions `items` over `ranks`; micro-batches are formed by `division` and have at most `budget` positions.
    pub(crate) fn new<T: BatchItem>(
        items: &[T],
        ranks: Rc<Ranks>,
        (division, budget): (Division, usize),
        device: Device,
    ) -> Self {
        let packed_lens: Vec<usize> = items.iter().map(T::packed_len).collect();
        let owners = assign_ranks(&packed_lens, ranks.size());
        let token_counts = items.iter().map(T::token_count).collect();
        Self { ranks, owners, token_counts, budget, division, device }
    }

    /// Iterates over the indices of the items that this rank computes.
    pub(crate) fn local_indices(&self) -> impl Iterator<Item = usize> {
        (0..self.owners.len()).filter(|i| self.owners[*i] == self.ranks.rank())
    }

    /// Returns the micro-batches of the `chosen` ones of `items`.
    pub(crate) fn micro_batches<'m, T: BatchItem>(&self, items: &'m [T], chosen: &[usize]) -> MicroBatches<'m, T> {
        let of_rank = |rank: usize| {
            let assigned: Vec<&T> = chosen.iter().filter(|i| self.owners[**i] == rank).map(|i| &items[*i]).collect();
            self.division.micro_batches(&assigned, self.budget)
        };
        let by_rank: Vec<_> = (0..self.ranks.size()).map(of_rank).collect();
        let count = by_rank.iter().map(Vec::len).max().unwrap_or(0);
        let positions = |batches: &Vec<Vec<&T>>| self.division.padding_positions(batches).0;
        let positions = by_rank.iter().map(positions).max().unwrap_or(0);
        let local = by_rank.into_iter().nth(self.ranks.rank()).unwrap_or_default();
        MicroBatches { local, count, positions }
    }

    /// Returns the share of positions that are padding, over all ranks.
    pub(crate) fn padding_share<T: BatchItem>(&self, items: &[T]) -> f64 {
        let mut all = 0;
        let mut unused = 0;
        for rank in 0..self.ranks.size() {
            let assigned: Vec<&T> =
                items.iter().zip(&self.owners).filter(|(_, o)| **o == rank).map(|(item, _)| item).collect();
            let micro_batches = self.division.micro_batches(&assigned, self.budget);
            let (rank_all, rank_unused) = self.division.padding_positions(&micro_batches);
            all += rank_all;
            unused += rank_unused;
        }
        unused as f64 / all.max(1) as f64
    }

    /// Gathers one value per token from all ranks: `local` has this rank's items in the order of the batch; the result has all
    /// items.
    ///
    /// # Errors
    /// Returns [`crate::TrainerError::Ranks`] if another rank has failed or timed out.
    pub(crate) fn all_gather_tokens(&self, local: &[f64]) -> Result<Vec<f64>> {
        if self.ranks.size() == 1 {
            return Ok(local.to_vec());
        }
        let mut all = vec![0.0; self.token_counts.iter().sum()];
        let mut begin = 0;
        let mut copied = 0;
        for (tokens, owner) in self.token_counts.iter().zip(&self.owners) {
            if *owner == self.ranks.rank() {
                all[begin..begin + tokens].copy_from_slice(&local[copied..copied + tokens]);
                copied += tokens;
            }
            begin += tokens;
        }
        self.ranks.all_reduce_sum(all, self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_get_even_loads_deterministically() {
        let packed_lens: Vec<usize> = (0..37).map(|i| 300 + (i * 7919) % 700).collect();
        for ranks in 1..6 {
            let owners = assign_ranks(&packed_lens, ranks);
            assert_eq!(owners, assign_ranks(&packed_lens, ranks));
            let load = |r| packed_lens.iter().zip(&owners).filter(|(_, o)| **o == r).map(|(w, _)| w).sum::<usize>();
            let loads: Vec<usize> = (0..ranks).map(load).collect();
            let least = loads.iter().min().unwrap();
            let most = loads.iter().max().unwrap();
            assert!(most - least <= 1000, "{loads:?}");
        }
        assert_eq!(assign_ranks(&[5, 5], 4), [0, 1]);
        assert!(assign_ranks(&[], 2).is_empty());
    }
}
