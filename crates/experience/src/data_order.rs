//! The order of each pass over the data: a permutation that depends only on (seed, pass).

use std::collections::BTreeMap;

use rand::RngCore;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use unveil_core::GroupId;

/// Numbering of groups across all passes: group `g` is position `g % records` of pass `g / records`.
#[derive(Debug)]
pub(crate) struct DataOrder {
    ids: Vec<String>,
    seed: u64,
    passes: BTreeMap<u64, Vec<u32>>,
}

impl DataOrder {
    pub(crate) fn new(ids: Vec<String>, seed: u64) -> Self {
        Self { ids, seed, passes: BTreeMap::new() }
    }

    pub(crate) fn records(&self) -> u64 {
        self.ids.len() as u64
    }

    /// Returns the identity of group number `g`.
    pub(crate) fn group(&mut self, g: u64) -> GroupId {
        let pass = g / self.records();
        let position = g % self.records();
        let n = self.ids.len();
        let seed = self.seed;
        let order = self.passes.entry(pass).or_insert_with(|| permutation(n, seed, pass));
        GroupId { pass, position, record: self.ids[order[position as usize] as usize].clone() }
    }

    /// Returns the identity of group number `g` if its pass has started.
    pub(crate) fn started_group(&self, g: u64) -> Option<GroupId> {
        let pass = g / self.records();
        let position = g % self.records();
        let row = *self.passes.get(&pass)?.get(position as usize)? as usize;
        Some(GroupId { pass, position, record: self.ids[row].clone() })
    }

    /// Returns the number of a group, if its pass has started and its record is at that position.
    pub(crate) fn number(&self, group: &GroupId) -> Option<u64> {
        self.row(group)?;
        group.pass.checked_mul(self.records())?.checked_add(group.position)
    }

    /// Returns the row of a group's record in the data set, if its pass has started; groups of other passes were never leased.
    pub(crate) fn row(&self, group: &GroupId) -> Option<usize> {
        let row = *self.passes.get(&group.pass)?.get(usize::try_from(group.position).ok()?)? as usize;
        (self.ids[row] == group.record).then_some(row)
    }

    /// Drops the permutations of finished passes, except the one before `pass`, to which late submissions may refer.
    pub(crate) fn forget_before(&mut self, pass: u64) {
        let keep = pass.saturating_sub(1);
        self.passes.retain(|p, _| *p >= keep);
    }

    /// Returns the BLAKE3 hash over the ids (length, then bytes) in hex.
    pub(crate) fn fingerprint(&self) -> String {
        let mut h = blake3::Hasher::new();
        for id in &self.ids {
            h.update(&(id.len() as u64).to_le_bytes());
            h.update(id.as_bytes());
        }
        h.finalize().to_hex().to_string()
    }
}

/// Returns a Fisher-Yates permutation with ChaCha8 keyed by BLAKE3(seed, pass), identical on every machine and in every release.
fn permutation(n: usize, seed: u64, pass: u64) -> Vec<u32> {
    let mut h = blake3::Hasher::new_derive_key("unveil 2026 order of a pass");
    h.update(&seed.to_le_bytes());
    h.update(&pass.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(*h.finalize().as_bytes());
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..n as u64).rev() {
        order.swap(i as usize, below(&mut rng, i + 1) as usize);
    }
    order
}

/// Draws a uniform number in `0..bound` by rejection.
fn below(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    let zone = u64::MAX - u64::MAX % bound;
    loop {
        let x = rng.next_u64();
        if x < zone {
            return x % bound;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutations_are_complete_and_pinned() {
        let a = permutation(100, 7, 0);
        let b = permutation(100, 7, 1);
        assert_ne!(a, b);
        assert_ne!(a, permutation(100, 8, 0));
        for mut p in [a, b] {
            p.sort_unstable();
            assert_eq!(p, (0..100).collect::<Vec<u32>>());
        }
        // A resumed run must see the same order as the original run, even across releases.
        assert_eq!(permutation(10, 1, 0), PINNED);
        assert_eq!(permutation(1, 1, 0), [0]);
    }

    const PINNED: [u32; 10] = [5, 1, 3, 8, 9, 6, 7, 4, 0, 2];

    #[test]
    fn numbers_are_checked_against_the_order() {
        let mut o = DataOrder::new(vec!["a".into(), "b".into(), "c".into()], 3);
        let g = o.group(4);
        assert_eq!((g.pass, g.position), (1, 1));
        assert_eq!(o.number(&g), Some(4));
        let wrong = GroupId { record: "zz".into(), ..g.clone() };
        assert_eq!(o.number(&wrong), None);
        assert_eq!(o.number(&GroupId { pass: 9, ..g.clone() }), None);
        assert_eq!(o.number(&GroupId { position: u64::MAX, ..g }), None);
    }
}
