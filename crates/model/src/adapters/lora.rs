//! Low-rank adapters (LoRA, arXiv 2106.09685): `y = W x + s B A x` with A `[r, in]`, B `[out, r]` and `s = alpha / r`, while `W` stays
//! frozen: specification, tensors and checks. See `vlm::adapters` for their creation, `merge` for merged weights and `peft` for files.
//!
//! Dropout on `x` is for stage 1 alone: rollout and learner must compute the same log-probabilities for the same weights.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tch::Tensor;

use crate::adapters::modules::SavedModules;
use crate::layers::dropout::AdapterDropout;
use crate::layers::linear::Linear;
use crate::{ModelError, Result};

/// End of the name of an adapter's first matrix.
pub(crate) const A_SUFFIX: &str = ".lora_A.weight";
/// End of the name of an adapter's second matrix.
pub(crate) const B_SUFFIX: &str = ".lora_B.weight";

/// Specification of a model's adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSpec {
    /// Rank r, from 1 to the shorter side of every adapted matrix.
    pub rank: i64,
    /// Numerator of the scale; positive.
    pub alpha: f64,
    /// Whether `s = alpha / sqrt(r)` instead of `alpha / r` (rsLoRA, arXiv 2312.03732).
    pub rank_stabilised: bool,
    /// Layers, by full name or by the last dot-separated parts of it; `*` matches any text. A pattern selects layers of the decoder,
    /// unless it begins with `visual.`.
    pub targets: Vec<String>,
}

impl LoraSpec {
    /// Returns the scale s of the adapters.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rank_stabilised { rank.sqrt() } else { rank }
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.rank < 1 || !(self.alpha > 0.0 && self.alpha.is_finite()) {
            let rank = self.rank;
            let alpha = self.alpha;
            return Err(ModelError::input(format!("adapters of rank {rank} and alpha {alpha}: both must be positive")));
        }
        Ok(())
    }
}

/// The adapters of a model.
#[derive(Debug)]
pub struct Adapters {
    pub(crate) spec: LoraSpec,
    pub(crate) named: Vec<(String, Tensor)>,
    pub(crate) enabled: Arc<AtomicBool>,
    /// Dropout of the present pass.
    pub(crate) dropout: Arc<Mutex<Option<AdapterDropout>>>,
    /// Modules that are trained whole; the base model has other values there.
    pub(crate) modules: SavedModules,
}

impl Adapters {
    /// Returns the specification. The targets are full names if the adapters were read from files.
    pub fn spec(&self) -> &LoraSpec {
        &self.spec
    }

    /// Returns `LAYER.lora_A.weight [r, in]` and `LAYER.lora_B.weight [out, r]` of each layer, in the order of the model. Leaf tensors in
    /// fp32 (fp64 in an fp64 model).
    pub fn named_parameters(&self) -> &[(String, Tensor)] {
        &self.named
    }

    /// Returns the names of the modules that are trained whole beside the adapters.
    pub fn module_names(&self) -> &[String] {
        &self.modules.names
    }

    /// Returns the parameters of these modules, which are parameters of the model.
    pub fn module_parameters(&self) -> &[(String, Tensor)] {
        &self.modules.parameters
    }

    /// Iterates over all tensors that differ from the base model: those of the adapters, then those of the modules.
    pub fn saved_tensors(&self) -> impl Iterator<Item = &(String, Tensor)> {
        self.named.iter().chain(&self.modules.parameters)
    }

    /// Sets whether the adapters need gradients.
    pub fn set_trainable(&self, trainable: bool) {
        for (_, tensor) in &self.named {
            let _ = tensor.set_requires_grad(trainable);
        }
    }

    /// Sets the dropout of the adapters in the passes that follow; `None` disables it, as generation and evaluation need.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] if an adapter is in the vision tower, whose inputs have no positions.
    pub fn set_dropout(&self, dropout: Option<AdapterDropout>) -> Result<()> {
        let visual = self.named.iter().find(|(name, _)| name.starts_with("visual."));
        if let Some((name, _)) = visual.filter(|_| dropout.is_some()) {
            return Err(ModelError::input(format!(
                "`{name}` is in the vision tower: dropout is for adapters of the decoder"
            )));
        }
        *self.dropout.lock().unwrap_or_else(PoisonError::into_inner) = dropout;
        Ok(())
    }

    /// Returns whether the adapters contribute to the model's output.
    pub(crate) fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Enables or disables the adapters; returns the previous state.
    pub(crate) fn set_enabled(&self, enabled: bool) -> bool {
        self.enabled.swap(enabled, Ordering::Relaxed)
    }
}

/// The two adapter matrices of one layer.
pub(crate) struct LoraPair<'a> {
    pub layer: &'a str,
    pub a: &'a Tensor,
    pub b: &'a Tensor,
}

/// Pairs the tensors of each layer, in the order of the A's. `source` is the path that errors name.
pub(crate) fn lora_pairs<'a>(source: &Path, named: &'a [(String, Tensor)]) -> Result<Vec<LoraPair<'a>>> {
    let corrupt = |message: String| ModelError::corrupt(source, message);
    let mut seen = HashSet::new();
    for (name, _) in named {
        if !name.ends_with(A_SUFFIX) && !name.ends_with(B_SUFFIX) {
            return Err(corrupt(format!(
                "`{name}` is not a tensor of an adapter: their names end in {A_SUFFIX} or {B_SUFFIX}"
            )));
        }
        if !seen.insert(name) {
            return Err(corrupt(format!("`{name}` occurs twice")));
        }
    }
    let with_suffix =
        |suffix: &'static str| named.iter().filter_map(move |(n, t)| n.strip_suffix(suffix).map(|layer| (layer, t)));
    let missing = |layer: &str, suffix: &str| corrupt(format!("`{layer}{suffix}` is missing"));
    if let Some((layer, _)) = with_suffix(B_SUFFIX).find(|(layer, _)| with_suffix(A_SUFFIX).all(|(l, _)| l != *layer)) {
        return Err(missing(layer, A_SUFFIX));
    }
    let second: HashMap<&str, &Tensor> = with_suffix(B_SUFFIX).collect();
    with_suffix(A_SUFFIX)
        .map(|(layer, a)| Ok(LoraPair { layer, a, b: second.get(layer).ok_or_else(|| missing(layer, B_SUFFIX))? }))
        .collect()
}

/// Returns whether a tensor with this name belongs to an adapter.
pub fn is_adapter(name: &str) -> bool {
    name.ends_with(A_SUFFIX) || name.ends_with(B_SUFFIX)
}

/// Checks the names and shapes of adapters against the layers of the model.
pub(crate) fn check_pairs<'l>(
    source: &Path,
    layers: impl Iterator<Item = &'l Linear>,
    pairs: &[LoraPair<'_>],
) -> Result<()> {
    let layers: HashMap<&str, &Linear> = layers.map(|l| (l.name.as_str(), l)).collect();
    for p in pairs {
        let Some(layer) = layers.get(p.layer) else {
            let message = format!("adapts `{}`, but the model has no such linear layer", p.layer);
            return Err(ModelError::corrupt(source, message));
        };
        let size = layer.weight.size();
        let rank = p.a.size().first().copied().unwrap_or(0);
        for (suffix, found, expected) in
            [(A_SUFFIX, p.a.size(), vec![rank, size[1]]), (B_SUFFIX, p.b.size(), vec![size[0], rank])]
        {
            if found != expected {
                let name = format!("{}{suffix}", p.layer);
                return Err(ModelError::Shape { path: source.to_owned(), name, expected, found });
            }
        }
    }
    Ok(())
}

/// Checks that adapters have the rank of their configuration.
pub(crate) fn check_rank(source: &Path, pairs: &[LoraPair<'_>], rank: i64) -> Result<()> {
    match pairs.iter().map(|p| (p.layer, p.a.size())).find(|(_, size)| size.first() != Some(&rank)) {
        Some((layer, size)) => Err(ModelError::corrupt(
            source,
            format!("`{layer}{A_SUFFIX}` has shape {size:?}, but the configuration says rank {rank}"),
        )),
        None => Ok(()),
    }
}
