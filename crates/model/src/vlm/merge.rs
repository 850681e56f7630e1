//! Merging of adapters into the matrices of their layers: `W + s B A`, always computed from a copy of the original `W`, never by
//! subtracting an earlier product, so that no error accumulates over many merges.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Tensor;

use crate::adapters::lora::{LoraPair, check_pairs, lora_pairs};
use crate::layers::ops::{activation_kind, detached_copy};
use crate::{ModelError, Result, Vlm};

/// Merges adapters into a model; keeps one copy of each original matrix, on its device.
#[derive(Default, Debug)]
pub struct AdapterMerger {
    originals: BTreeMap<String, Tensor>,
}

impl AdapterMerger {
    /// Sets the matrices of `vlm` to its original weights plus `adapters` (`LAYER.lora_A.weight` and `LAYER.lora_B.weight`, on any device)
    /// times `scale`. Computed in fp32 (fp64 in an fp64 model) and rounded once. A matrix that was merged before and has no adapter now
    /// is restored. Adapters attached to the model are unchanged.
    ///
    /// # Errors
    /// Returns an error that names the tensor that does not fit; the model is unchanged then.
    pub fn merge(&mut self, vlm: &mut Vlm, adapters: &[(String, Tensor)], scale: f64) -> Result<()> {
        let pairs = checked_pairs(vlm, adapters, scale)?;
        tch::no_grad(|| {
            let kind = activation_kind(vlm.kind());
            let device = vlm.device();
            for (layer, original) in &self.originals {
                if pairs.iter().all(|p| p.layer != layer) {
                    weight(vlm, layer)?.f_copy_(original)?;
                }
            }
            self.originals.retain(|layer, _| pairs.iter().any(|p| p.layer == layer));
            for p in &pairs {
                let mut weight = weight(vlm, p.layer)?;
                if !self.originals.contains_key(p.layer) {
                    self.originals.insert(p.layer.to_owned(), detached_copy(&weight)?);
                }
                let Some(original) = self.originals.get(p.layer) else { continue };
                let converted = |t: &Tensor| t.f_detach()?.f_to_device(device)?.f_to_kind(kind);
                let product = converted(p.b)?.f_matmul(&converted(p.a)?)?.f_mul_scalar(scale)?;
                weight.f_copy_(&original.f_to_kind(kind)?.f_add(&product)?)?;
            }
            Ok(())
        })
    }

    /// Checks that [`AdapterMerger::merge`] would accept these adapters.
    ///
    /// # Errors
    /// Returns an error that names the tensor that does not fit.
    pub fn check(vlm: &Vlm, adapters: &[(String, Tensor)], scale: f64) -> Result<()> {
        checked_pairs(vlm, adapters, scale).map(|_| ())
    }

    /// Restores every merged matrix, bit for bit.
    ///
    /// # Errors
    /// Returns [`ModelError::Torch`] if a copy fails.
    pub fn restore(&mut self, vlm: &mut Vlm) -> Result<()> {
        self.merge(vlm, &[], 1.0)
    }

    /// Drops the copies of originals that are obsolete, because the weights for which `overwritten` returns true have been replaced.
    pub fn forget(&mut self, overwritten: impl Fn(&str) -> bool) {
        self.originals.retain(|layer, _| !overwritten(&format!("{layer}.weight")));
    }
}

fn checked_pairs<'a>(vlm: &Vlm, adapters: &'a [(String, Tensor)], scale: f64) -> Result<Vec<LoraPair<'a>>> {
    let source = Path::new("adapters");
    let pairs = lora_pairs(source, adapters)?;
    check_pairs(source, vlm.linears(), &pairs)?;
    if !scale.is_finite() {
        return Err(ModelError::input(format!("adapters cannot be merged with a scale of {scale}")));
    }
    Ok(pairs)
}

fn weight(vlm: &Vlm, layer: &str) -> Result<Tensor> {
    let weight = vlm.parameter(&format!("{layer}.weight")).map(Tensor::shallow_clone);
    weight.ok_or_else(|| ModelError::input(format!("no tensor `{layer}.weight`")))
}

impl Vlm {
    /// Runs `work` on the model with its adapters merged into the matrices, for generation or export, and then restores the matrices bit
    /// for bit. Needs memory for one copy of the adapted matrices meanwhile.
    ///
    /// # Errors
    /// Returns [`ModelError::Torch`] if there is not enough memory; the matrices are restored then.
    pub fn merged<R>(&mut self, work: impl FnOnce(&mut Self) -> R) -> Result<R> {
        let Some(adapters) = self.adapters() else { return Ok(work(self)) };
        let named: Vec<_> = adapters.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        let scale = adapters.spec().scale();
        let was_enabled = adapters.set_enabled(false);
        let mut merger = AdapterMerger::default();
        let output = merger.merge(self, &named, scale).map(|()| work(self));
        let restored = merger.restore(self);
        if let Some(adapters) = self.adapters() {
            adapters.set_enabled(was_enabled);
        }
        restored.and(output)
    }
}
