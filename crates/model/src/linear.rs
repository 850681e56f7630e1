//! Linear layers: a matrix, its bias, and the adapter that it may have; and layers that meet the same input. Knows no model.

use std::cell::OnceCell;

use tch::Tensor;

use crate::Result;
use crate::family::Get;
use crate::lora::Adapter;
use crate::ops::{linear, recorded};

/// One layer: `W x + b`, and what its adapter adds.
pub(crate) struct Linear {
    /// Its matrix is the parameter `NAME.weight`.
    pub name: String,
    /// `[out, in]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
    pub adapter: OnceCell<Adapter>,
}

impl Linear {
    /// The layer of this name, with the parameter `NAME.bias` where it is `biased`.
    pub(crate) fn new(get: &Get<'_>, name: String, biased: bool) -> Result<Self> {
        let bias = biased.then(|| get(&format!("{name}.bias"))).transpose()?;
        Ok(Self { weight: get(&format!("{name}.weight"))?, bias, name, adapter: OnceCell::new() })
    }

    pub(crate) fn apply(&self, x: &Tensor) -> Tensor {
        let plain = linear(x, &self.weight, self.bias.as_ref());
        match self.added(x) {
            Some(added) => plain + added,
            None => plain,
        }
    }

    /// What the adapter adds; none without one, and while adapters are off.
    fn added(&self, x: &Tensor) -> Option<Tensor> {
        self.adapter.get().and_then(|a| a.apply(x))
    }

    fn recorded(&self) -> bool {
        recorded(std::iter::once(&self.weight).chain(&self.bias))
    }
}

/// Layers that meet the same input: queries, keys and values, or gate and up.
pub(crate) struct Fused {
    pub parts: Vec<Linear>,
    /// The tensors whose rows their matrices and biases are, where they are small: one product serves all then.
    whole: Option<(Tensor, Option<Tensor>)>,
}

impl Fused {
    /// `whole` is used where it has biases exactly if the parts do.
    pub(crate) fn new(parts: Vec<Linear>, whole: Option<(Tensor, Option<Tensor>)>) -> Self {
        let biased = parts.iter().any(|p| p.bias.is_some());
        Self { parts, whole: whole.filter(|(_, b)| b.is_some() == biased) }
    }

    /// The products side by side on the last dimension.
    pub(crate) fn apply(&self, x: &Tensor) -> Tensor {
        let Some((weight, bias)) = &self.whole else {
            return Tensor::cat(&self.parts.iter().map(|p| p.apply(x)).collect::<Vec<_>>(), -1);
        };
        let plain = if self.parts.iter().any(Linear::recorded) {
            // Gradients must reach the parameters, so those are joined anew.
            let bias: Vec<&Tensor> = self.parts.iter().filter_map(|p| p.bias.as_ref()).collect();
            let bias = (!bias.is_empty()).then(|| Tensor::cat(&bias, 0));
            let weights: Vec<&Tensor> = self.parts.iter().map(|p| &p.weight).collect();
            linear(x, &Tensor::cat(&weights, 0), bias.as_ref())
        } else {
            linear(x, weight, bias.as_ref())
        };
        let added: Vec<Option<Tensor>> = self.parts.iter().map(|p| p.added(x)).collect();
        if added.iter().all(Option::is_none) {
            return plain;
        }
        let mut size = x.size();
        let columns = added.into_iter().zip(&self.parts).map(|(added, part)| {
            added.unwrap_or_else(|| {
                if let Some(last) = size.last_mut() {
                    *last = part.weight.size()[0];
                }
                Tensor::zeros(size.as_slice(), (plain.kind(), plain.device()))
            })
        });
        let columns = Tensor::cat(&columns.collect::<Vec<_>>(), -1);
        plain + columns
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn random(size: &[i64]) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu))
    }

    /// Weights that are trained take the fast way where nothing is recorded: the joined matrix as it lies, and the kernels for few rows.
    #[test]
    fn what_is_not_recorded_takes_the_fast_way() {
        tch::manual_seed(5);
        let layer = |name: &str, weight: Tensor| Linear {
            name: name.into(),
            weight: weight.set_requires_grad(true),
            bias: None,
            adapter: OnceCell::new(),
        };
        let (x, other) = (random(&[3, 100]), random(&[14, 100]));
        let parts = || vec![layer("gate", random(&[7, 100])), layer("up", random(&[7, 100]))];
        // Another matrix than the parts', to see which is used.
        let fused = Fused::new(parts(), Some((other.shallow_clone(), None)));
        let recorded = fused.apply(&x);
        let joined = Tensor::cat(&[&fused.parts[0].weight, &fused.parts[1].weight], 0).detach();
        assert_eq!(recorded.detach(), x.linear(&joined, None::<Tensor>));
        recorded.sum(Kind::Float).backward();
        assert!(fused.parts.iter().all(|p| p.weight.grad().defined()));
        let ours = unveil_torch_ext::linear(&x, &other, None).unwrap();
        assert_ne!(ours, x.linear(&other, None::<Tensor>), "the two round differently here, or nothing is seen");
        assert_eq!(tch::no_grad(|| fused.apply(&x)), ours);
        // One layer, too.
        let one = layer("head", other.shallow_clone());
        assert_eq!(tch::no_grad(|| one.apply(&x)), ours);
        assert!(one.apply(&x).requires_grad());
    }
}
