//! Effects of a precision mode: dtypes of operands and caches, and how far generation and training may differ.

use tch::{Device, Kind, Tensor};
use unveil_core::Compute;
use unveil_torch_ext::{allow_tf32, round_through};

use crate::error::or_panic;
use crate::{ModelError, Result};

/// Largest mean |delta log p| between generation and training on tokens of the same weights: rows by mode, for fp32 and for bf16 weights.
///
/// They come from step-by-step decoding against one teacher-forced pass on the CPU, over random models of 100 million parameters (weights
/// of standard deviation 0.02, and ten times as wide logits) and a trained small one. Largest means: `exact` 9.5e-6 with fp32 weights and
/// 5.9e-5 with split operands, `fast` 1.6e-3 and, with wide logits, 2.3e-2. `exact` with bf16 weights and `fast` have room for GPUs, whose
/// sums depend on the number of rows; `tf32` keeps three bits more than `fast`, an eighth of its error. `precision_bench` measures them.
const AGREEMENT_LIMITS: [(Compute, f64, f64); 3] =
    [(Compute::Exact, 1e-5, 1e-3), (Compute::Tf32, 6e-3, 6e-3), (Compute::Fast, 5e-2, 5e-2)];

/// Returns the default limit of the mean |delta log p| between rollout and learner, for weights of dtype `weights`.
pub fn agreement_limit(compute: Compute, weights: Kind) -> f64 {
    let row = AGREEMENT_LIMITS.iter().find(|(mode, ..)| *mode == compute);
    let half = matches!(weights, Kind::BFloat16 | Kind::Half);
    row.map_or(0.0, |(_, full, narrow)| if half { *narrow } else { *full })
}

/// Returns the dtype of keys and values in KV caches of a model with activations of dtype `activations`.
pub(crate) fn cache_kind(compute: Compute, activations: Kind) -> Kind {
    match compute {
        Compute::Fast if activations == Kind::Float => Kind::BFloat16,
        _ => activations,
    }
}

/// Returns the dtype in which a fused kernel computes attention of `q`. On the CPU, operands that are rounded to bf16 stay fp32 tensors: the
/// kernel is as fast, and rounds nothing else.
pub(crate) fn attention_operands(compute: Compute, q: &Tensor) -> Kind {
    match (q.device(), q.kind()) {
        (Device::Cuda(_), kind) => cache_kind(compute, kind),
        (_, kind) => kind,
    }
}

/// Rounds queries, keys or values as `compute` demands; the gradient passes unchanged.
pub(crate) fn rounded_operand(compute: Compute, t: Tensor) -> Tensor {
    if cache_kind(compute, t.kind()) == t.kind() { t } else { or_panic(round_through(&t)) }
}

/// Prepares libtorch for a mode on a device.
///
/// # Errors
/// Returns [`ModelError::Input`] for TF32 without a GPU.
pub(crate) fn prepare(compute: Compute, device: Device) -> Result<()> {
    match device {
        Device::Cuda(_) => Ok(allow_tf32(compute == Compute::Tf32)?),
        _ if compute == Compute::Tf32 => Err(ModelError::input(
            "run.compute = \"tf32\" needs a GPU, and there is none: use exact or fast, or set run.device to a GPU",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_grow_with_the_error_of_the_mode() {
        for weights in [Kind::Float, Kind::BFloat16] {
            let limits = [Compute::Exact, Compute::Tf32, Compute::Fast].map(|c| agreement_limit(c, weights));
            assert!(limits[0] > 0.0 && limits.is_sorted(), "{limits:?}");
        }
        assert_eq!(agreement_limit(Compute::Exact, Kind::Float), 1e-5);
        assert_eq!(agreement_limit(Compute::Exact, Kind::BFloat16), 1e-3);
    }

    #[test]
    fn only_the_fast_mode_narrows_caches() {
        assert_eq!(cache_kind(Compute::Fast, Kind::Float), Kind::BFloat16);
        assert_eq!(cache_kind(Compute::Fast, Kind::Double), Kind::Double);
        assert_eq!(cache_kind(Compute::Exact, Kind::Float), Kind::Float);
        let t = Tensor::from_slice(&[1.0f32 + 1e-3]);
        assert_eq!(rounded_operand(Compute::Exact, t.shallow_clone()), t);
        assert_eq!(rounded_operand(Compute::Fast, t).double_value(&[0]), 1.0);
    }

    #[test]
    fn tf32_is_refused_on_the_cpu() {
        let e = prepare(Compute::Tf32, Device::Cpu).unwrap_err().to_string();
        assert!(e.contains("tf32") && e.contains("use exact or fast"), "{e}");
        prepare(Compute::Fast, Device::Cpu).unwrap();
    }
}
