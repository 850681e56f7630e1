//! Dropout on the inputs of adapters, in training only. Whether an input is dropped is a function of the key of its position, its layer and
//! its column, never of how positions are batched, so recomputation and any number of ranks drop the same ones.

use tch::{Kind, Tensor};

/// Bits of the hash that are compared with the rate.
const BITS: i64 = 24;

/// Dropout of the adapters of the decoder in one pass over positions `[B * L]`.
#[derive(Debug)]
pub struct AdapterDropout {
    rate: f64,
    /// Keys of all positions `[B * L]`.
    keys: Tensor,
    /// Keys of the positions that the last layer computes alone `[M]`.
    row_keys: Tensor,
}

impl AdapterDropout {
    /// Creates the dropout of a pass. `rate` is the probability, from 0 up to below 1, with which an input is set to 0 (the others are divided
    /// by `1 - rate`); `keys [B * L]` (int64) identify the positions, of which the last layer computes `rows [M]` alone.
    pub fn new(rate: f64, keys: Tensor, rows: &Tensor) -> Self {
        let row_keys = keys.index_select(0, rows);
        Self { rate, keys, row_keys }
    }

    /// Drops inputs `x [.., in]` of the adapter of the layer with this key.
    pub(crate) fn apply(&self, x: &Tensor, layer: i64) -> Tensor {
        let width = x.size().last().copied().unwrap_or(1);
        let rows = x.numel() as i64 / width.max(1);
        let keys = if rows == self.keys.size()[0] { &self.keys } else { &self.row_keys };
        let kept = kept(keys, layer, width, self.rate).to_kind(x.kind()) / (1.0 - self.rate);
        x * kept.view(x.size().as_slice())
    }
}

/// Returns 1 for the inputs that are kept and 0 for those that are dropped: `[positions, width]`.
fn kept(keys: &Tensor, layer: i64, width: i64, rate: f64) -> Tensor {
    tch::no_grad(|| {
        let columns = Tensor::arange(width, (Kind::Int64, keys.device())) * 0x5851_F42D_4C95_7F2D_i64;
        let mut hash = mix(&keys.bitwise_xor(layer)).unsqueeze(1) + columns.unsqueeze(0);
        hash = mix(&hash);
        let low = hash.bitwise_right_shift_tensor_scalar(17).bitwise_and((1i64 << BITS) - 1);
        low.ge((rate * (1i64 << BITS) as f64) as i64)
    })
}

/// Mixes the bits of every element (two rounds of multiplication and shift).
fn mix(values: &Tensor) -> Tensor {
    let first = values.bitwise_xor_tensor(&values.bitwise_right_shift_tensor_scalar(29)) * 0x2545_F491_4F6C_DD1D_i64;
    first.bitwise_xor_tensor(&first.bitwise_right_shift_tensor_scalar(32)) * 0x369D_EA0F_31A5_3F85_i64
}

/// Returns the key of a layer.
pub(crate) fn layer_key(name: &str) -> i64 {
    let hash = blake3::hash(name.as_bytes());
    i64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i]))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn inputs_are_dropped_at_the_rate_and_independently() {
        let keys = Tensor::arange(400, (Kind::Int64, Device::Cpu));
        let share = |t: &Tensor| t.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        for rate in [0.0, 0.1, 0.5] {
            let q = kept(&keys, layer_key("q"), 300, rate);
            assert!((share(&q) - (1.0 - rate)).abs() < 0.01, "{rate}: {}", share(&q));
            let both = |other: &Tensor| share(&q.logical_and(other)) - (1.0 - rate).powi(2);
            // Other layers, the next position and the next column are independent.
            assert!(both(&kept(&keys, layer_key("v"), 300, rate)).abs() < 0.01);
            assert!(both(&q.roll([1], [0])).abs() < 0.01 && both(&q.roll([1], [1])).abs() < 0.01);
        }
    }

    /// A position drops the same inputs whatever is computed with it, and the mean of the inputs stays.
    #[test]
    fn a_key_determines_what_is_dropped() {
        let keys = Tensor::from_slice(&[7i64, 9, 11, 13]);
        let rows = Tensor::from_slice(&[2i64, 1]);
        let dropout = AdapterDropout::new(0.5, keys, &rows);
        let x = Tensor::ones([4, 2000], (Kind::Float, Device::Cpu));
        let all = dropout.apply(&x.view([2, 2, 2000]), 3).view([4, 2000]);
        assert_eq!(dropout.apply(&x.narrow(0, 0, 2), 3), all.index_select(0, &rows));
        assert!((all.mean(Kind::Float).double_value(&[]) - 1.0).abs() < 0.05);
        assert_eq!(AdapterDropout::new(0.0, Tensor::zeros([4], (Kind::Int64, Device::Cpu)), &rows).apply(&x, 3), x);
    }
}
