//! Adapters merged into the matrices beside which they lie: `W + s B A`, always from a copy of W as it was, never by taking an
//! earlier product off again, so that no error gathers over many merges.
//!
//! Must not know: where adapters come from, training.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Tensor;

use crate::lora::{Pair, check_pairs, pairs};
use crate::ops::{duplicate, wide};
use crate::{ModelError, Result, Vlm};

/// What merged matrices were before; one copy of each, on its device.
#[derive(Default)]
pub struct Merger {
    pristine: BTreeMap<String, Tensor>,
}

impl Merger {
    /// Makes the matrices of `vlm` those of its own weights and `adapters` (`LAYER.lora_A.weight` and `LAYER.lora_B.weight`, on any
    /// device) times `scale`. Computed in fp32 (fp64 where the model is), rounded once. A matrix that was merged before and has no
    /// adapter now becomes what it was. The model's own adapters, if any, stay as they are.
    ///
    /// # Errors
    /// Names the tensor that does not fit; nothing has changed then.
    pub fn merge(&mut self, vlm: &mut Vlm, adapters: &[(String, Tensor)], scale: f64) -> Result<()> {
        let pairs = checked(vlm, adapters, scale)?;
        tch::no_grad(|| {
            let (kind, device) = (wide(vlm.kind()), vlm.device());
            for (layer, before) in &self.pristine {
                if pairs.iter().all(|p| p.layer != layer) {
                    weight(vlm, layer)?.f_copy_(before)?;
                }
            }
            self.pristine.retain(|layer, _| pairs.iter().any(|p| p.layer == layer));
            for p in &pairs {
                let mut weight = weight(vlm, p.layer)?;
                if !self.pristine.contains_key(p.layer) {
                    self.pristine.insert(p.layer.to_owned(), duplicate(&weight)?);
                }
                let Some(before) = self.pristine.get(p.layer) else { continue };
                let own = |t: &Tensor| t.f_detach()?.f_to_device(device)?.f_to_kind(kind);
                let product = own(p.b)?.f_matmul(&own(p.a)?)?.f_mul_scalar(scale)?;
                weight.f_copy_(&before.f_to_kind(kind)?.f_add(&product)?)?;
            }
            Ok(())
        })
    }

    /// Whether [`Merger::merge`] would take these; the error says why not.
    pub fn check(vlm: &Vlm, adapters: &[(String, Tensor)], scale: f64) -> Result<()> {
        checked(vlm, adapters, scale).map(|_| ())
    }

    /// Makes every merged matrix what it was, bit for bit.
    pub fn restore(&mut self, vlm: &mut Vlm) -> Result<()> {
        self.merge(vlm, &[], 1.0)
    }

    /// Forgets what matrices were: those of `vlm` have been overwritten, all or those that `overwritten` names.
    pub fn forget(&mut self, overwritten: impl Fn(&str) -> bool) {
        self.pristine.retain(|layer, _| !overwritten(&format!("{layer}.weight")));
    }
}

fn checked<'a>(vlm: &Vlm, adapters: &'a [(String, Tensor)], scale: f64) -> Result<Vec<Pair<'a>>> {
    let place = Path::new("adapters");
    let pairs = pairs(place, adapters)?;
    check_pairs(place, vlm, &pairs)?;
    if !scale.is_finite() {
        return Err(ModelError::input(format!("adapters cannot be merged with a factor of {scale}")));
    }
    Ok(pairs)
}

fn weight(vlm: &Vlm, layer: &str) -> Result<Tensor> {
    let found = vlm.parameter(&format!("{layer}.weight")).map(Tensor::shallow_clone);
    found.ok_or_else(|| ModelError::input(format!("no tensor `{layer}.weight`")))
}

impl Vlm {
    /// Runs `work` on the model with its adapters merged into the matrices, as generation and files want it; then the matrices are
    /// what they were, bit for bit. Takes the memory of one copy of the adapted matrices meanwhile.
    ///
    /// # Errors
    /// There is no memory for it; the matrices are what they were.
    pub fn merged<R>(&mut self, work: impl FnOnce(&mut Self) -> R) -> Result<R> {
        let Some(adapters) = self.adapters() else { return Ok(work(self)) };
        let named: Vec<_> = adapters.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        let (scale, was) = (adapters.spec().scale(), adapters.switch(false));
        let mut merger = Merger::default();
        let done = merger.merge(self, &named, scale).map(|()| work(self));
        let restored = merger.restore(self);
        if let Some(adapters) = self.adapters() {
            adapters.switch(was);
        }
        restored.and(done)
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
        vlm.adapt(&LoraSpec { rank: 2, alpha: 4.0, rank_stabilised: false, targets }, 0).unwrap();
        tch::manual_seed(seed);
        let own = vlm.adapters().unwrap().named_parameters();
        own.iter().map(|(n, t)| (n.clone(), t.randn_like())).collect()
    }

    /// Many merges are as good as one, and leave no trace.
    #[test]
    fn merges_do_not_drift() {
        let mut vlm = model();
        let (before, mut merger) = (state(&vlm), Merger::default());
        let last = adapters(9, &["q_proj", "down_proj", "visual.*.qkv"]);
        for seed in 0..5 {
            merger.merge(&mut vlm, &adapters(seed, &["q_proj", "up_proj"]), 0.5).unwrap();
        }
        merger.merge(&mut vlm, &last, 0.5).unwrap();
        let mut once = model();
        Merger::default().merge(&mut once, &last, 0.5).unwrap();
        let (found, changed) = (state(&vlm), state(&once));
        assert!(found == changed, "earlier merges are gone");
        let moved = changed.iter().zip(&before).filter(|(a, b)| a != b).count();
        assert_eq!(moved, last.len() / 2);
        let name = "model.layers.0.mlp.down_proj";
        let of =
            |list: &[(String, Tensor)], n: String| list.iter().find(|(name, _)| *name == n).unwrap().1.shallow_clone();
        let (a, b) = (of(&last, format!("{name}.lora_A.weight")), of(&last, format!("{name}.lora_B.weight")));
        let wanted = of(&before, format!("{name}.weight")).to_kind(Kind::Double)
            + b.to_kind(Kind::Double).matmul(&a.to_kind(Kind::Double)) * 0.5;
        let gap = (of(&found, format!("{name}.weight")) - wanted).abs().max().double_value(&[]);
        assert!(gap < 1e-5, "{gap}");
        merger.restore(&mut vlm).unwrap();
        assert!(state(&vlm) == before);
    }

    #[test]
    fn what_was_overwritten_is_the_new_ground() {
        let (mut vlm, mut merger) = (model(), Merger::default());
        let own = adapters(1, &["o_proj"]);
        merger.merge(&mut vlm, &own, 1.0).unwrap();
        let new: Vec<_> = state(&vlm).into_iter().map(|(n, t)| (n, t * 2.0)).collect();
        vlm.load_state(&new).unwrap();
        merger.forget(|_| true);
        merger.merge(&mut vlm, &own, 1.0).unwrap();
        merger.restore(&mut vlm).unwrap();
        assert!(state(&vlm) == new);
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let mut vlm = model();
        let (before, good) = (state(&vlm), adapters(1, &["q_proj"]));
        let copy = || good.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect::<Vec<_>>();
        let mut refuse = |named: Vec<(String, Tensor)>, scale: f64| {
            let e = Merger::default().merge(&mut vlm, &named, scale).unwrap_err().to_string();
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
        let mut wide = copy();
        wide[0].1 = Tensor::zeros([2, 7], (Kind::Float, Device::Cpu));
        let e = refuse(wide, 1.0);
        assert!(e.contains("q_proj.lora_A.weight") && e.contains("[2, 7]"), "{e}");
        assert!(refuse(vec![("model.norm.weight".into(), Tensor::new())], 1.0).contains("no tensor of an adapter"));
        assert!(refuse(copy(), f64::NAN).contains("NaN"));
    }
}
