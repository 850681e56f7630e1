//! Where the tokens of one decode step go in a cache, as tensors: with equal shapes the same work is done, whatever the values.

use tch::{Kind, Tensor};

use crate::cache::{GroupCache, minus_infinity_where};

/// In a steady cache the suffix that is looked at grows in steps of so many tokens.
const STEADY: i64 = 64;

/// The tensors of one step, all on the device.
pub(crate) struct Place {
    /// Rotary positions of the fed tokens `[A]`.
    pub positions: Tensor,
    /// Rows that are fed `[A]`, if not all.
    pub rows: Option<Tensor>,
    /// Cache row and slot of each new token.
    pub write: Write,
    /// Suffix tokens that are looked at.
    pub used: i64,
    /// Additive mask `[R, 1, 1, used]` where rows differ in length.
    pub suffix_bias: Option<Tensor>,
}

/// Where new keys and values are stored.
pub(crate) enum Write {
    /// All rows, at one slot.
    Column(i64),
    /// Rows `[A]` and slots `[A]`.
    Scatter(Tensor, Tensor),
}

/// Where the tokens of one step go, as numbers: all by fed row.
pub(crate) struct Seats {
    /// Rotary positions.
    pub positions: Vec<i64>,
    /// Rows, ascending.
    pub rows: Vec<i64>,
    /// Places in the row's suffix.
    pub places: Vec<i64>,
}

impl GroupCache {
    /// Where the tokens of a step go that feeds `rows` (ascending); all of them in a steady cache, where a row that is full
    /// writes over its last place, so that only rows which go on may be looked at afterwards.
    pub(crate) fn seats(&self, rows: &[usize]) -> Seats {
        let (n, last) = (self.shape().n, self.shape().response as i64 - 1);
        Seats {
            positions: rows.iter().map(|r| self.slots[r / n].next + self.lengths[*r]).collect(),
            rows: rows.iter().map(|r| *r as i64).collect(),
            places: rows.iter().map(|r| self.lengths[*r].min(last)).collect(),
        }
    }

    /// [`GroupCache::seats`] as tensors, with the masks that go with them.
    pub(crate) fn place(&self, rows: &[usize]) -> Place {
        let Seats { positions, rows: index, places } = self.seats(rows);
        let mut seen = self.lengths.clone();
        rows.iter().zip(&places).for_each(|(r, place)| seen[*r] = place + 1);
        let mut used = seen.iter().copied().max().unwrap_or(1).max(1);
        if self.steady() {
            used = ((used + STEADY - 1) / STEADY * STEADY).min(self.shape().response as i64);
        }
        let all = rows.len() == self.rows();
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(self.device);
        let even = all && !self.steady() && seen.iter().all(|s| *s == used);
        let suffix_bias = (!even).then(|| {
            // A row that was never fed still sees its first place, so that its softmax is finite.
            let seen = tensor(&seen.iter().map(|s| (*s).max(1)).collect::<Vec<_>>()).unsqueeze(1);
            let ahead = Tensor::arange(used, (Kind::Int64, self.device)).unsqueeze(0).ge_tensor(&seen);
            minus_infinity_where(&ahead).view([-1, 1, 1, used])
        });
        Place {
            positions: tensor(&positions),
            rows: (!all).then(|| tensor(&index)),
            write: if even { Write::Column(used - 1) } else { Write::Scatter(tensor(&index), tensor(&places)) },
            used,
            suffix_bias,
        }
    }

    /// Stores keys and values `[A, Hkv, 1, d]` of this step.
    pub(crate) fn write(&self, layer: usize, place: &Place, k: &Tensor, v: &Tensor) {
        let store = self.layer(layer);
        for (target, new) in [(&store.suffix_k, k), (&store.suffix_v, v)] {
            match &place.write {
                Write::Column(slot) => target.narrow(2, *slot, 1).copy_(new),
                Write::Scatter(rows, slots) => {
                    let mut target = target.shallow_clone();
                    let _ = target.index_put_(&[Some(rows), None, Some(slots)], &new.squeeze_dim(2), false);
                }
            }
        }
    }
}
