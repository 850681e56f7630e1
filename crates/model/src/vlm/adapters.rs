//! Adapters of a model: creation, loading, and switching off.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Tensor;
use unveil_core::selects_layer;

use crate::adapters::lora::{A_SUFFIX, Adapters, B_SUFFIX, LoraSpec, check_pairs, check_rank, lora_pairs};
use crate::adapters::modules::SavedModules;
use crate::layers::dropout::layer_key;
use crate::layers::linear::{Adapter, Linear};
use crate::layers::ops::{activation_kind, detached_copy};
use crate::vlm::Vlm;
use crate::weights::overwrite;
use crate::{ModelError, Result};

impl Vlm {
    /// Adds new adapters to the layers that `spec` selects: A is uniform within `1 / sqrt(in)` (Kaiming with a gain of `sqrt(1/3)`, as in
    /// peft) and B is 0, so that the model's output does not change. A depends only on `seed` and the layer's name.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] for a target without a layer (the message lists those available), a rank above the shorter side of
    /// a matrix, or a model that already has adapters.
    pub fn init_adapters(&mut self, spec: &LoraSpec, seed: u64) -> Result<()> {
        spec.check()?;
        let kind = activation_kind(self.kind());
        let mut named = Vec::new();
        for layer in matching_layers(self, &spec.targets)? {
            let size = layer.weight.size();
            let device = layer.weight.device();
            let out = size[0];
            let width = size[1];
            if spec.rank > out.min(width) {
                return Err(ModelError::input(format!(
                    "rank {} is above the shorter side of `{}`, which is [{out}, {width}]",
                    spec.rank, layer.name
                )));
            }
            let a = format!("{}{A_SUFFIX}", layer.name);
            let b = format!("{}{B_SUFFIX}", layer.name);
            let values = uniform(seed, &a, (spec.rank * width) as usize, (width as f64).powf(-0.5));
            let values = Tensor::f_from_slice(&values)?.f_view([spec.rank, width])?;
            named.push((a, values.f_to_kind(kind)?.f_to_device(device)?));
            named.push((b, Tensor::f_zeros([out, spec.rank], (kind, device))?));
        }
        self.install_adapters(spec.clone(), named)
    }

    /// Adds copies of the adapters `named`, in the form of [`Adapters::named_parameters`]. `source` is the path that errors name.
    ///
    /// # Errors
    /// Returns an error that names the tensor that does not fit; the model is unchanged then.
    pub fn attach_adapters(&mut self, source: &Path, spec: LoraSpec, named: &[(String, Tensor)]) -> Result<()> {
        spec.check()?;
        let pairs = lora_pairs(source, named)?;
        check_pairs(source, self.linears(), &pairs)?;
        check_rank(source, &pairs, spec.rank)?;
        let kind = activation_kind(self.kind());
        let device = self.device();
        let copy = |t: &Tensor| -> Result<Tensor> { detached_copy(&t.f_to_kind(kind)?.f_to_device(device)?) };
        let mut copies = Vec::with_capacity(named.len());
        for layer in self.linears() {
            if let Some(p) = pairs.iter().find(|p| p.layer == layer.name) {
                copies.push((format!("{}{A_SUFFIX}", layer.name), copy(p.a)?));
                copies.push((format!("{}{B_SUFFIX}", layer.name), copy(p.b)?));
            }
        }
        self.install_adapters(spec, copies)
    }

    fn install_adapters(&mut self, spec: LoraSpec, named: Vec<(String, Tensor)>) -> Result<()> {
        if self.adapters.is_some() {
            return Err(ModelError::input("the model already has adapters"));
        }
        let enabled = Arc::new(AtomicBool::new(true));
        let dropout = Arc::new(Mutex::new(None));
        for p in lora_pairs(Path::new("adapters"), &named)? {
            let a = p.a.shallow_clone();
            let b = p.b.shallow_clone();
            let enabled = enabled.clone();
            let dropout = dropout.clone();
            let key = layer_key(p.layer);
            if let Some(layer) = self.linears().find(|l| l.name == p.layer) {
                layer.adapter.get_or_init(|| Adapter { a, b, scale: spec.scale(), enabled, dropout, key });
            }
        }
        self.adapters = Some(Adapters { spec, named, enabled, dropout, modules: SavedModules::default() });
        Ok(())
    }

    /// Selects modules to be trained whole beside the adapters, by full name or by the last dot-separated parts of it. Their present
    /// values count as those of the base model.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] if the model has no adapters, a name selects no module, a module contains an adapter, or a module
    /// shares its matrix with another one.
    pub fn save_modules(&mut self, selectors: &[String]) -> Result<()> {
        let Some(adapters) = &mut self.adapters else {
            return Err(ModelError::input("modules can only be trained beside adapters, and the model has none"));
        };
        let modules = SavedModules::select(&self.parameters, selectors)?;
        let is_within = |name: &str| modules.parameters.iter().any(|(n, _)| n.strip_suffix(".weight") == Some(name));
        for p in lora_pairs(Path::new("adapters"), &adapters.named)? {
            if is_within(p.layer) {
                let layer = p.layer;
                return Err(ModelError::input(format!(
                    "`{layer}` has an adapter and is in a module that is trained whole"
                )));
            }
        }
        let embeds = |(n, _): &(String, Tensor)| n.starts_with("model.embed_tokens.");
        if self.config.tie_word_embeddings && modules.parameters.iter().any(embeds) {
            return Err(ModelError::input(
                "the embedding of this model is its output matrix, too, so it cannot be trained beside adapters",
            ));
        }
        adapters.modules = modules;
        Ok(())
    }

    /// Returns the adapters, if the model has any.
    pub fn adapters(&self) -> Option<&Adapters> {
        self.adapters.as_ref()
    }

    /// Overwrites the adapters, and the modules that are trained beside them, in place, after checking all names and shapes.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] if the model has no adapters, and an error that names the tensor that is missing, extra or of another
    /// shape.
    pub fn load_adapters(&mut self, named: &[(String, Tensor)]) -> Result<()> {
        let Some(adapters) = &self.adapters else {
            return Err(ModelError::input("the model has no adapters to load"));
        };
        overwrite(Path::new("adapter state"), adapters.saved_tensors(), named)
    }

    /// Runs `work` with the adapters disabled and the modules beside them as they were: the model is the base model meanwhile.
    pub fn without_adapters<R>(&self, work: impl FnOnce(&Self) -> R) -> R {
        /// Restores the previous state, even if `work` panics.
        struct Restore<'a>(&'a Adapters, bool);
        impl Drop for Restore<'_> {
            fn drop(&mut self) {
                self.0.set_enabled(self.1);
                self.0.modules.swap();
            }
        }
        let _restore = self.adapters.as_ref().map(|a| {
            a.modules.swap();
            Restore(a, a.set_enabled(false))
        });
        work(self)
    }
}

/// Returns the layers that match a target, in the order of the model; every target must match one.
fn matching_layers<'a>(vlm: &'a Vlm, targets: &[String]) -> Result<Vec<&'a Linear>> {
    let mut chosen = HashSet::new();
    for target in targets {
        let mut any = false;
        for layer in vlm.linears().filter(|l| selects_layer(target, &l.name)) {
            chosen.insert(layer.name.as_str());
            any = true;
        }
        if !any {
            return Err(ModelError::input(format!(
                "no linear layer is named `{target}`; available: {}",
                available_targets(vlm)
            )));
        }
    }
    if chosen.is_empty() {
        return Err(ModelError::input("adapters need a target: name at least one linear layer"));
    }
    Ok(vlm.linears().filter(|l| chosen.contains(l.name.as_str())).collect())
}

/// Lists the possible targets, with numbers as `*`.
fn available_targets(vlm: &Vlm) -> String {
    let mut names: Vec<String> = Vec::new();
    for layer in vlm.linears() {
        let parts = layer.name.split('.').map(|p| if p.bytes().all(|b| b.is_ascii_digit()) { "*" } else { p });
        let name = parts.collect::<Vec<_>>().join(".");
        let short =
            name.strip_prefix("model.layers.*.").map_or(name.as_str(), |rest| rest.rsplit('.').next().unwrap_or(rest));
        if !names.iter().any(|n| n == short) {
            names.push(short.to_owned());
        }
    }
    let (visual, decoder): (Vec<&str>, Vec<&str>) =
        names.iter().map(String::as_str).partition(|n| n.starts_with("visual."));
    let list = |names: Vec<&str>| names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    format!("{} in the decoder and {} in the vision tower", list(decoder), list(visual))
}

/// Draws uniformly distributed values between -bound and bound.
fn uniform(seed: u64, name: &str, count: usize, bound: f64) -> Vec<f32> {
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes()).update(name.as_bytes());
    let mut rng = ChaCha8Rng::from_seed(*hash.finalize().as_bytes());
    (0..count).map(|_| ((rng.random::<f64>() * 2.0 - 1.0) * bound) as f32).collect()
}
