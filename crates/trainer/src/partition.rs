//! Data parallelism: assigns the groups of a batch to ranks and collects what each computed. Every rank holds the whole batch except
//! the pixels of other ranks' groups, so everything apart from passes through the model is computed identically on all ranks.

use std::rc::Rc;

use tch::Device;

use crate::batch::{TrainableGroup, micro_batches, padding_positions};
use crate::error::Result;
use crate::shard::Ranks;

/// Assigns each group to one of `ranks` ranks: the longest first, each to the rank with the smallest load so far.
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

/// The groups of a batch, partitioned over the ranks.
pub(crate) struct Partition {
    ranks: Rc<Ranks>,
    /// Rank of each group.
    owners: Vec<usize>,
    /// Response tokens of each group.
    token_counts: Vec<usize>,
    /// Maximum of padded positions in a micro-batch.
    budget: usize,
    device: Device,
}

/// The micro-batches of one rank. All ranks iterate over the same number of them.
pub(crate) struct MicroBatches<'m, 'a> {
    local: Vec<Vec<&'m TrainableGroup<'a>>>,
    /// Number of micro-batches on each rank, empty ones included.
    count: usize,
    /// Padded positions on the rank that has most.
    pub positions: usize,
}

impl<'m, 'a> MicroBatches<'m, 'a> {
    /// Iterates over the micro-batches; they are empty once only other ranks have groups left.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[&'m TrainableGroup<'a>]> {
        (0..self.count).map(|i| self.local.get(i).map_or(&[][..], Vec::as_slice))
    }
}

impl Partition {
    /// Partitions `groups` over `ranks`; micro-batches have at most `budget` padded positions.
    pub(crate) fn new(groups: &[TrainableGroup<'_>], ranks: Rc<Ranks>, budget: usize, device: Device) -> Self {
        let packed_lens: Vec<usize> = groups.iter().map(TrainableGroup::packed_len).collect();
        let owners = assign_ranks(&packed_lens, ranks.size());
        let token_counts = groups.iter().map(TrainableGroup::token_count).collect();
        Self { ranks, owners, token_counts, budget, device }
    }

    /// Iterates over the indices of the groups that this rank computes.
    pub(crate) fn local_indices(&self) -> impl Iterator<Item = usize> {
        (0..self.owners.len()).filter(|i| self.owners[*i] == self.ranks.rank())
    }

    /// Returns the micro-batches of the `chosen` ones of `groups`; a micro-batch has groups of similar length.
    pub(crate) fn micro_batches<'m, 'a>(
        &self,
        groups: &'m [TrainableGroup<'a>],
        chosen: &[usize],
    ) -> MicroBatches<'m, 'a> {
        let of_rank = |rank: usize| {
            let mut assigned: Vec<&TrainableGroup> =
                chosen.iter().filter(|i| self.owners[**i] == rank).map(|i| &groups[*i]).collect();
            assigned.sort_by_key(|g| g.packed_len());
            micro_batches(&assigned, self.budget)
        };
        let by_rank: Vec<_> = (0..self.ranks.size()).map(of_rank).collect();
        let count = by_rank.iter().map(Vec::len).max().unwrap_or(0);
        let positions = by_rank.iter().map(|batches| padding_positions(batches).0).max().unwrap_or(0);
        let local = by_rank.into_iter().nth(self.ranks.rank()).unwrap_or_default();
        MicroBatches { local, count, positions }
    }

    /// Returns the share of positions that are padding, over all ranks.
    pub(crate) fn padding_share(&self, groups: &[TrainableGroup<'_>]) -> f64 {
        let mut all = 0;
        let mut unused = 0;
        for rank in 0..self.ranks.size() {
            let assigned: Vec<&TrainableGroup> =
                groups.iter().zip(&self.owners).filter(|(_, o)| **o == rank).map(|(g, _)| g).collect();
            let (rank_all, rank_unused) = padding_positions(&micro_batches(&assigned, self.budget));
            all += rank_all;
            unused += rank_unused;
        }
        unused as f64 / all.max(1) as f64
    }

    /// Gathers one value per token from all ranks: `local` has this rank's groups in the order of the batch; the result has all
    /// groups.
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
