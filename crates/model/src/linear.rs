//! Linear layers: a matrix, its bias, and the adapter that it may have; and layers that meet the same input. Knows no model.

use std::cell::OnceCell;

use tch::Tensor;

use crate::Result;
use crate::family::Get;
use crate::lora::Adapter;
use crate::ops::linear;

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

    fn trained(&self) -> bool {
        self.weight.requires_grad() || self.bias.as_ref().is_some_and(Tensor::requires_grad)
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
        let plain = if self.parts.iter().any(Linear::trained) {
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
