//! Merging of adapters into the matrices of their layers: `W + s B A`, always computed from a copy of the original `W`, never by
//! subtracting an earlier product, so that no error accumulates over many merges.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Tensor;

use crate::adapters::lora::{LoraPair, check_pairs, lora_pairs};
use crate::layers::ops::{activation_kind, detached_copy};
use crate::{ModelError, Result, Vlm};

/// Merges adapters into a model; keeps one copy of each original matrix, on its device.
#[derive(Default)]
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

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::{InitSpec, LoraSpec, SpecialIds, init};

    fn model() -> Vlm {
        let dir = tempfile::tempdir().unwrap();
        let special =
            SpecialIds { image_pad: 61, video_pad: 62, vision_start: 58, vision_end: 59, bos: None, eos: 60, pad: 63 };
        let spec = InitSpec { family: "qwen2_5_vl".into(), preset: "tiny".into(), vocab_size: 64, seed: 3, special };
        init(&spec, dir.path()).unwrap();
        Vlm::load(dir.path(), Device::Cpu, Kind::Float).unwrap()
    }

    fn state(vlm: &Vlm) -> Vec<(String, Tensor)> {
        vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.detach().copy())).collect()
    }

    fn adapters(seed: i64, targets: &[&str]) -> Vec<(String, Tensor)> {
        let targets = targets.iter().map(|t| (*t).to_owned()).collect();
        let mut vlm = model();
        vlm.init_adapters(&LoraSpec { rank: 2, alpha: 4.0, rank_stabilised: false, targets }, 0).unwrap();
        tch::manual_seed(seed);
        let parameters = vlm.adapters().unwrap().named_parameters();
        parameters.iter().map(|(n, t)| (n.clone(), t.randn_like())).collect()
    }

    /// Many merges equal one, and can be undone.
    #[test]
    fn merges_do_not_drift() {
        let mut vlm = model();
        let before = state(&vlm);
        let mut merger = AdapterMerger::default();
        let last = adapters(9, &["q_proj", "down_proj", "visual.*.qkv"]);
        for seed in 0..5 {
            merger.merge(&mut vlm, &adapters(seed, &["q_proj", "up_proj"]), 0.5).unwrap();
        }
        merger.merge(&mut vlm, &last, 0.5).unwrap();
        let mut once = model();
        AdapterMerger::default().merge(&mut once, &last, 0.5).unwrap();
        let merged = state(&vlm);
        let merged_once = state(&once);
        assert!(merged == merged_once, "earlier merges leave no trace");
        let moved = merged_once.iter().zip(&before).filter(|(a, b)| a != b).count();
        assert_eq!(moved, last.len() / 2);
        let name = "model.layers.0.mlp.down_proj";
        let find =
            |list: &[(String, Tensor)], n: String| list.iter().find(|(name, _)| *name == n).unwrap().1.shallow_clone();
        let a = find(&last, format!("{name}.lora_A.weight"));
        let b = find(&last, format!("{name}.lora_B.weight"));
        let expected = find(&before, format!("{name}.weight")).to_kind(Kind::Double)
            + b.to_kind(Kind::Double).matmul(&a.to_kind(Kind::Double)) * 0.5;
        let gap = (find(&merged, format!("{name}.weight")) - expected).abs().max().double_value(&[]);
        assert!(gap < 1e-5, "{gap}");
        merger.restore(&mut vlm).unwrap();
        assert!(state(&vlm) == before);
    }

    #[test]
    fn overwritten_weights_become_the_originals() {
        let mut vlm = model();
        let mut merger = AdapterMerger::default();
        let lora = adapters(1, &["o_proj"]);
        merger.merge(&mut vlm, &lora, 1.0).unwrap();
        let new: Vec<_> = state(&vlm).into_iter().map(|(n, t)| (n, t * 2.0)).collect();
        vlm.load_state(&new).unwrap();
        merger.forget(|_| true);
        merger.merge(&mut vlm, &lora, 1.0).unwrap();
        merger.restore(&mut vlm).unwrap();
        assert!(state(&vlm) == new);
    }

    #[test]
    fn invalid_adapters_leave_the_model_unchanged() {
        let mut vlm = model();
        let before = state(&vlm);
        let valid = adapters(1, &["q_proj"]);
        let copy = || valid.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect::<Vec<_>>();
        let mut refuse = |named: Vec<(String, Tensor)>, scale: f64| {
            let e = AdapterMerger::default().merge(&mut vlm, &named, scale).unwrap_err().to_string();
            assert!(state(&vlm) == before, "{e}");
            e
        };
        let e = refuse(copy().into_iter().skip(1).collect(), 1.0);
        assert!(e.contains("`model.layers.0.self_attn.q_proj.lora_A.weight` is missing"), "{e}");
        let e = refuse(copy().into_iter().take(1).collect(), 1.0);
        assert!(e.contains("`model.layers.0.self_attn.q_proj.lora_B.weight` is missing"), "{e}");
        let mut twice = copy();
        twice.extend(copy());
        assert!(refuse(twice, 1.0).contains("twice"));
        let mut other = copy();
        for (name, _) in &mut other {
            *name = name.replace("layers.0", "layers.99");
        }
        assert!(refuse(other, 1.0).contains("layers.99"));
        let mut misshapen = copy();
        misshapen[0].1 = Tensor::zeros([2, 7], (Kind::Float, Device::Cpu));
        let e = refuse(misshapen, 1.0);
        assert!(e.contains("q_proj.lora_A.weight") && e.contains("[2, 7]"), "{e}");
        assert!(refuse(vec![("model.norm.weight".into(), Tensor::new())], 1.0).contains("not a tensor of an adapter"));
        assert!(refuse(copy(), f64::NAN).contains("NaN"));
    }
}
