//! Linear layers with optional bias and adapter, and linear layers that share an input.

use std::cell::{Cell, OnceCell};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tch::Tensor;
use unveil_core::Compute;
use unveil_torch_ext::MatrixSet;

use crate::Result;
use crate::config::parameters::GetTensor;
use crate::layers::dropout::AdapterDropout;
use crate::layers::ops::{linear, linear_set, records_gradients};

/// A linear layer: `W x + b`, plus the output of its adapter.
#[derive(Debug)]
pub(crate) struct Linear {
    /// Name of the layer; its matrix is the parameter `NAME.weight`.
    pub name: String,
    /// `[out, in]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
    pub adapter: OnceCell<Adapter>,
    /// Precision of the product.
    pub compute: Cell<Compute>,
}

impl Linear {
    /// Creates the layer from the parameter `NAME.weight` and, if it is `biased`, `NAME.bias`.
    pub(crate) fn new(get: &GetTensor<'_>, name: String, biased: bool) -> Result<Self> {
        let bias = biased.then(|| get(&format!("{name}.bias"))).transpose()?;
        let weight = get(&format!("{name}.weight"))?;
        Ok(Self { weight, bias, name, adapter: OnceCell::new(), compute: Cell::default() })
    }

    pub(crate) fn apply(&self, x: &Tensor) -> Tensor {
        let output = linear(x, &self.weight, self.bias.as_ref(), self.compute.get());
        match self.adapter_output(x) {
            Some(added) => output + added,
            None => output,
        }
    }

    /// Returns what the adapter adds; `None` without an adapter, or while adapters are disabled.
    fn adapter_output(&self, x: &Tensor) -> Option<Tensor> {
        self.adapter.get().and_then(|a| a.apply(x, self.compute.get()))
    }

    fn records_gradients(&self) -> bool {
        records_gradients(std::iter::once(&self.weight).chain(&self.bias))
    }
}

/// The adapter of one layer.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
    pub(crate) scale: f64,
    pub(crate) enabled: Arc<AtomicBool>,
    /// Dropout of the present pass, shared by all adapters of a model.
    pub(crate) dropout: Arc<Mutex<Option<AdapterDropout>>>,
    /// Key of the layer for dropout.
    pub(crate) key: i64,
}

impl Adapter {
    /// Returns what the adapter adds to the layer's output for `x [.., in]`: `[.., out]`; `None` while adapters are disabled.
    pub(crate) fn apply(&self, x: &Tensor, compute: Compute) -> Option<Tensor> {
        let product = |x: &Tensor, weight: &Tensor| linear(x, weight, None, compute);
        self.enabled.load(Ordering::Relaxed).then(|| {
            let dropout = self.dropout.lock().unwrap_or_else(PoisonError::into_inner);
            let dropped = dropout.as_ref().map(|d| d.apply(x, self.key));
            product(&(product(dropped.as_ref().unwrap_or(x), &self.a) * self.scale), &self.b)
        })
    }
}

/// Linear layers with the same input: queries, keys and values, or gate and up.
#[derive(Debug)]
pub(crate) struct FusedLinear {
    pub parts: Vec<Linear>,
    /// Concatenated matrices and biases of all parts, if they are small, so that one product computes all parts.
    fused: Option<(Tensor, Option<Tensor>)>,
}

impl FusedLinear {
    /// `fused` is ignored unless it has a bias exactly if the parts have one.
    pub(crate) fn new(parts: Vec<Linear>, fused: Option<(Tensor, Option<Tensor>)>) -> Self {
        let biased = parts.iter().any(|p| p.bias.is_some());
        Self { parts, fused: fused.filter(|(_, b)| b.is_some() == biased) }
    }

    /// Returns the outputs of all parts, concatenated on the last dimension.
    pub(crate) fn apply(&self, x: &Tensor) -> Tensor {
        let Some((weight, bias)) = &self.fused else {
            return Tensor::cat(&self.parts.iter().map(|p| p.apply(x)).collect::<Vec<_>>(), -1);
        };
        let compute = self.parts.first().map_or_else(Compute::default, |p| p.compute.get());
        let output = if self.parts.iter().any(Linear::records_gradients) {
            // Gradients must reach the parameters, whose memory the fused matrix shares.
            let weights: Vec<&Tensor> = self.parts.iter().map(|p| &p.weight).collect();
            let biases: Vec<&Tensor> = self.parts.iter().filter_map(|p| p.bias.as_ref()).collect();
            let set = MatrixSet { weights: &weights, biases: &biases, whole: Some((weight, bias.as_ref())) };
            linear_set(x, &set, compute)
        } else {
            linear(x, weight, bias.as_ref(), compute)
        };
        let added: Vec<Option<Tensor>> = self.parts.iter().map(|p| p.adapter_output(x)).collect();
        if added.iter().all(Option::is_none) {
            return output;
        }
        let mut size = x.size();
        let columns = added.into_iter().zip(&self.parts).map(|(added, part)| {
            added.unwrap_or_else(|| {
                if let Some(last) = size.last_mut() {
                    *last = part.weight.size()[0];
                }
                Tensor::zeros(size.as_slice(), (output.kind(), output.device()))
            })
        });
        let columns = Tensor::cat(&columns.collect::<Vec<_>>(), -1);
        output + columns
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn random(size: &[i64]) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu))
    }

    /// Trainable weights use the fused matrix, and the kernels for few rows if no gradient is recorded.
    #[test]
    fn fast_path_is_used_without_recording() {
        tch::manual_seed(5);
        let layer = |name: &str, weight: Tensor| Linear {
            name: name.into(),
            weight: weight.set_requires_grad(true),
            bias: None,
            adapter: OnceCell::new(),
            compute: Cell::default(),
        };
        let x = random(&[3, 100]);
        let other = random(&[14, 100]);
        let parts = || vec![layer("gate", random(&[7, 100])), layer("up", random(&[7, 100]))];
        // A matrix that differs from the parts shows which one is used.
        let fused = FusedLinear::new(parts(), Some((other.shallow_clone(), None)));
        let recorded = fused.apply(&x);
        assert_eq!(recorded.detach(), x.linear(&other, None::<Tensor>));
        recorded.sum(Kind::Float).backward();
        assert!(fused.parts.iter().all(|p| p.weight.grad().defined()));
        let ours = unveil_torch_ext::linear(&x, &other, None).unwrap();
        assert_ne!(
            ours,
            x.linear(&other, None::<Tensor>),
            "the two kernels must round differently for this test to mean anything"
        );
        assert_eq!(tch::no_grad(|| fused.apply(&x)), ours);
        // A single layer uses the fast path, too.
        let single = layer("head", other.shallow_clone());
        assert_eq!(tch::no_grad(|| single.apply(&x)), ours);
        assert!(single.apply(&x).requires_grad());
    }
}
