//! Who computes what: the groups of a batch over the ranks of a learner, and putting together again what each computed. Every rank
//! knows the whole batch but for the pixels of the others' groups, so that all but passes through the model is the same everywhere.

use std::rc::Rc;

use tch::Device;

use crate::batch::{Member, padding, parts};
use crate::error::Result;
use crate::shard::Ranks;

/// The rank of each of so many ranks that computes each group: the widest first, each to the rank that has least.
pub(crate) fn owners(widths: &[usize], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..widths.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(widths[*i]));
    let (mut loads, mut out) = (vec![0; ranks.max(1)], vec![0; widths.len()]);
    for i in order {
        let least = (0..loads.len()).min_by_key(|r| loads[*r]).unwrap_or(0);
        loads[least] += widths[i].max(1);
        out[i] = least;
    }
    out
}

/// The members of a batch over the ranks.
pub(crate) struct Share {
    ranks: Rc<Ranks>,
    owner: Vec<usize>,
    /// Tokens of each member.
    tokens: Vec<usize>,
    budget: usize,
    device: Device,
}

/// What one rank computes of some members, in passes.
pub(crate) struct Work<'m, 'a> {
    parts: Vec<Vec<&'m Member<'a>>>,
    /// Passes that each rank makes.
    rounds: usize,
    /// The most positions that a rank's parts have together.
    pub positions: usize,
}

impl<'m, 'a> Work<'m, 'a> {
    /// The members of each pass; none where another rank makes more passes.
    pub fn passes(&self) -> impl Iterator<Item = &[&'m Member<'a>]> {
        (0..self.rounds).map(|round| self.parts.get(round).map_or(&[][..], Vec::as_slice))
    }
}

impl Share {
    /// `members` over `ranks`; parts have `budget` padded positions at most.
    pub fn new(members: &[Member<'_>], ranks: Rc<Ranks>, budget: usize, device: Device) -> Self {
        let widths: Vec<usize> = members.iter().map(Member::width).collect();
        let owner = owners(&widths, ranks.size());
        Self { ranks, owner, tokens: members.iter().map(Member::tokens).collect(), budget, device }
    }

    /// The members that this rank computes.
    pub fn own(&self) -> impl Iterator<Item = usize> {
        (0..self.owner.len()).filter(|i| self.owner[*i] == self.ranks.rank())
    }

    /// The passes over `chosen` of `members`; their parts have members of like width.
    pub fn work<'m, 'a>(&self, members: &'m [Member<'a>], chosen: &[usize]) -> Work<'m, 'a> {
        let of = |rank: usize| {
            let mut own: Vec<&Member> =
                chosen.iter().filter(|i| self.owner[**i] == rank).map(|i| &members[*i]).collect();
            own.sort_by_key(|m| m.width());
            parts(&own, self.budget)
        };
        let all: Vec<_> = (0..self.ranks.size()).map(of).collect();
        let rounds = all.iter().map(Vec::len).max().unwrap_or(0);
        let positions = all.iter().map(|parts| padding(parts).0).max().unwrap_or(0);
        Work { parts: all.into_iter().nth(self.ranks.rank()).unwrap_or_default(), rounds, positions }
    }

    /// Share of positions that are padding, over all ranks.
    pub fn padding(&self, members: &[Member<'_>]) -> f64 {
        let (mut all, mut unused) = (0, 0);
        for rank in 0..self.ranks.size() {
            let own: Vec<&Member> =
                members.iter().zip(&self.owner).filter(|(_, o)| **o == rank).map(|(m, _)| m).collect();
            let found = padding(&parts(&own, self.budget));
            (all, unused) = (all + found.0, unused + found.1);
        }
        unused as f64 / all.max(1) as f64
    }

    /// Numbers of all members' tokens, in the order of members, from those that each rank has of its own in the order of its
    /// parts.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn join(&self, own: &[f64]) -> Result<Vec<f64>> {
        if self.ranks.size() == 1 {
            return Ok(own.to_vec());
        }
        let mut all = vec![0.0; self.tokens.iter().sum()];
        let (mut begin, mut taken) = (0, 0);
        for (tokens, owner) in self.tokens.iter().zip(&self.owner) {
            if *owner == self.ranks.rank() {
                all[begin..begin + tokens].copy_from_slice(&own[taken..taken + tokens]);
                taken += tokens;
            }
            begin += tokens;
        }
        self.ranks.sum(all, self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_even_and_the_same_everywhere() {
        let widths: Vec<usize> = (0..37).map(|i| 300 + (i * 7919) % 700).collect();
        for ranks in 1..6 {
            let owner = owners(&widths, ranks);
            assert_eq!(owner, owners(&widths, ranks));
            let load = |r| widths.iter().zip(&owner).filter(|(_, o)| **o == r).map(|(w, _)| w).sum::<usize>();
            let loads: Vec<usize> = (0..ranks).map(load).collect();
            let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
            assert!(most - least <= 1000, "{loads:?}");
        }
        assert_eq!(owners(&[5, 5], 4), [0, 1]);
        assert!(owners(&[], 2).is_empty());
    }
}
