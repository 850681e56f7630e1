//! Low-rank adapters (LoRA, arXiv 2106.09685): `y = W x + s B A x` with A `[r, in]`, B `[out, r]` and `s = alpha / r`, beside
//! matrices that stay as they are. Which layers have one, how a fresh one is filled, the switch that turns all of them off.
//!
//! There is no dropout on `x`: rollout and learner compute the same log-probabilities for the same weights, and a random part
//! that only one of them has would break that.
//!
//! Knows no files (`peft`) and does not change matrices (`merge`).

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use regex::Regex;
use tch::Tensor;

use crate::linear::Linear;
use crate::ops::{duplicate, wide};
use crate::spec::{Fill, TensorSpec};
use crate::weights::check_names;
use crate::{ModelError, Result, Vlm};

const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// Which adapters a model gets.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSpec {
    /// r: from 1 to the shorter side of every matrix that is adapted.
    pub rank: i64,
    /// Above 0.
    pub alpha: f64,
    /// `s = alpha / sqrt(r)` instead of `alpha / r` (rsLoRA, arXiv 2312.03732).
    pub rank_stabilised: bool,
    /// Layers by name, or by the end of their name behind a dot; `*` is any text. A pattern means layers of the decoder, unless
    /// it begins with `visual.`.
    pub targets: Vec<String>,
}

impl LoraSpec {
    /// The factor s of what an adapter adds.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rank_stabilised { rank.sqrt() } else { rank }
    }

    fn check(&self) -> Result<()> {
        if self.rank < 1 || !(self.alpha > 0.0 && self.alpha.is_finite()) {
            let (rank, alpha) = (self.rank, self.alpha);
            return Err(ModelError::input(format!("adapters of rank {rank} and alpha {alpha}: both must be above 0")));
        }
        Ok(())
    }
}

/// The adapter of one layer.
pub(crate) struct Adapter {
    a: Tensor,
    b: Tensor,
    scale: f64,
    on: Arc<AtomicBool>,
}

impl Adapter {
    /// What is added to the layer's output for `x [.., in]`: `[.., out]`; none while adapters are off.
    pub(crate) fn apply(&self, x: &Tensor) -> Option<Tensor> {
        self.on
            .load(Ordering::Relaxed)
            .then(|| (x.linear(&self.a, None::<&Tensor>) * self.scale).linear(&self.b, None::<&Tensor>))
    }
}

/// The adapters of a model.
pub struct Adapters {
    spec: LoraSpec,
    named: Vec<(String, Tensor)>,
    on: Arc<AtomicBool>,
}

impl Adapters {
    /// What they were made from. The targets are full names where they were read from files.
    pub fn spec(&self) -> &LoraSpec {
        &self.spec
    }

    /// `LAYER.lora_A.weight [r, in]` and `LAYER.lora_B.weight [out, r]` of each layer, in the model's order. Leaf tensors in fp32
    /// (fp64 where the model is).
    pub fn named_parameters(&self) -> &[(String, Tensor)] {
        &self.named
    }

    /// Turns gradients on or off.
    pub fn set_trainable(&self, on: bool) {
        for (_, tensor) in &self.named {
            let _ = tensor.set_requires_grad(on);
        }
    }

    /// Whether they take part in what the model computes.
    pub(crate) fn on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Turns them on or off, and gives what was before.
    pub(crate) fn switch(&self, on: bool) -> bool {
        self.on.swap(on, Ordering::Relaxed)
    }
}

/// The two matrices of one layer.
pub(crate) struct Pair<'a> {
    pub layer: &'a str,
    pub a: &'a Tensor,
    pub b: &'a Tensor,
}

/// Puts tensors together that belong to one layer, in the order of the A's. `place` says in errors where they are from.
pub(crate) fn pairs<'a>(place: &Path, named: &'a [(String, Tensor)]) -> Result<Vec<Pair<'a>>> {
    let fault = |what: String| ModelError::corrupt(place, what);
    let mut seen = HashSet::new();
    for (name, _) in named {
        if !name.ends_with(A) && !name.ends_with(B) {
            return Err(fault(format!("`{name}` is no tensor of an adapter: those end in {A} or {B}")));
        }
        if !seen.insert(name) {
            return Err(fault(format!("`{name}` is there twice")));
        }
    }
    let of = |end: &'static str| named.iter().filter_map(move |(n, t)| n.strip_suffix(end).map(|layer| (layer, t)));
    let missing = |layer: &str, end: &str| fault(format!("`{layer}{end}` is missing"));
    if let Some((layer, _)) = of(B).find(|(layer, _)| of(A).all(|(l, _)| l != *layer)) {
        return Err(missing(layer, A));
    }
    let second: HashMap<&str, &Tensor> = of(B).collect();
    of(A).map(|(layer, a)| Ok(Pair { layer, a, b: second.get(layer).ok_or_else(|| missing(layer, B))? })).collect()
}

/// Whether a tensor of this name belongs to an adapter.
pub fn is_adapter(name: &str) -> bool {
    name.ends_with(A) || name.ends_with(B)
}

/// Checks the shapes of adapters against the model's layers.
pub(crate) fn check_pairs(place: &Path, vlm: &Vlm, pairs: &[Pair<'_>]) -> Result<()> {
    let layers: HashMap<&str, &Linear> = vlm.linears().map(|l| (l.name.as_str(), l)).collect();
    for p in pairs {
        let Some(layer) = layers.get(p.layer) else {
            let what = format!("adapts `{}`, but the model has no such linear layer", p.layer);
            return Err(ModelError::corrupt(place, what));
        };
        let (size, rank) = (layer.weight.size(), p.a.size().first().copied().unwrap_or(0));
        for (end, found, expected) in [(A, p.a.size(), vec![rank, size[1]]), (B, p.b.size(), vec![size[0], rank])] {
            if found != expected {
                let name = format!("{}{end}", p.layer);
                return Err(ModelError::Shape { path: place.to_owned(), name, expected, found });
            }
        }
    }
    Ok(())
}

/// Checks that adapters have the rank that their configuration says.
pub(crate) fn check_rank(place: &Path, pairs: &[Pair<'_>], rank: i64) -> Result<()> {
    match pairs.iter().map(|p| (p.layer, p.a.size())).find(|(_, size)| size.first() != Some(&rank)) {
        Some((layer, size)) => {
            Err(ModelError::corrupt(place, format!("`{layer}{A}` is {size:?}, but the configuration says rank {rank}")))
        }
        None => Ok(()),
    }
}

impl Vlm {
    /// Gives the layers that `spec` names fresh adapters: A uniform within `1 / sqrt(in)` (Kaiming's with a gain of `sqrt(1/3)`, as
    /// peft fills it), B 0, so that the model computes what it did. A depends on `seed` and the layer's name alone.
    ///
    /// # Errors
    /// A target that no layer has (the message names those that there are), a rank above a matrix' shorter side, a model that has
    /// adapters already.
    pub fn adapt(&mut self, spec: &LoraSpec, seed: u64) -> Result<()> {
        spec.check()?;
        let kind = wide(self.kind());
        let mut named = Vec::new();
        for layer in targeted(self, &spec.targets)? {
            let (size, device) = (layer.weight.size(), layer.weight.device());
            let [out, width] = [size[0], size[1]];
            if spec.rank > out.min(width) {
                return Err(ModelError::input(format!(
                    "rank {} is above the shorter side of `{}`, which is [{out}, {width}]",
                    spec.rank, layer.name
                )));
            }
            let (a, b) = (format!("{}{A}", layer.name), format!("{}{B}", layer.name));
            let values = uniform(seed, &a, (spec.rank * width) as usize, (width as f64).powf(-0.5));
            let values = Tensor::f_from_slice(&values)?.f_view([spec.rank, width])?;
            named.push((a, values.f_to_kind(kind)?.f_to_device(device)?));
            named.push((b, Tensor::f_zeros([out, spec.rank], (kind, device))?));
        }
        self.attach(spec.clone(), named)
    }

    /// Gives layers the adapters `named`, as [`Adapters::named_parameters`] has them.
    ///
    /// # Errors
    /// Names the tensor that does not fit; the model is as it was then.
    pub fn adapt_with(&mut self, place: &Path, spec: LoraSpec, named: &[(String, Tensor)]) -> Result<()> {
        spec.check()?;
        let pairs = pairs(place, named)?;
        check_pairs(place, self, &pairs)?;
        check_rank(place, &pairs, spec.rank)?;
        let (kind, device) = (wide(self.kind()), self.device());
        let own = |t: &Tensor| -> Result<Tensor> { duplicate(&t.f_to_kind(kind)?.f_to_device(device)?) };
        let mut copies = Vec::with_capacity(named.len());
        for layer in self.linears() {
            if let Some(p) = pairs.iter().find(|p| p.layer == layer.name) {
                copies.push((format!("{}{A}", layer.name), own(p.a)?));
                copies.push((format!("{}{B}", layer.name), own(p.b)?));
            }
        }
        self.attach(spec, copies)
    }

    fn attach(&mut self, spec: LoraSpec, named: Vec<(String, Tensor)>) -> Result<()> {
        if self.adapters.is_some() {
            return Err(ModelError::input("the model has adapters already"));
        }
        let on = Arc::new(AtomicBool::new(true));
        for p in pairs(Path::new("adapters"), &named)? {
            let (a, b, on) = (p.a.shallow_clone(), p.b.shallow_clone(), on.clone());
            if let Some(layer) = self.linears().find(|l| l.name == p.layer) {
                layer.adapter.get_or_init(|| Adapter { a, b, scale: spec.scale(), on });
            }
        }
        self.adapters = Some(Adapters { spec, named, on });
        Ok(())
    }

    /// The adapters, where the model has some.
    pub fn adapters(&self) -> Option<&Adapters> {
        self.adapters.as_ref()
    }

    /// Overwrites the adapters in place. Nothing is touched unless every name and shape fits.
    ///
    /// # Errors
    /// Names what is missing, extra or misshapen; the model has no adapters.
    pub fn load_adapters(&mut self, named: &[(String, Tensor)]) -> Result<()> {
        let Some(own) = &mut self.adapters else { return Err(ModelError::input("the model has no adapters to load")) };
        let specs = own.named.iter().map(|(n, t)| (n.clone(), t.size()));
        let specs: Vec<_> = specs.map(|(name, shape)| TensorSpec { name, shape, fill: Fill::Zeros }).collect();
        let found = named.iter().map(|(n, t)| (n.as_str(), t.size())).collect();
        check_names(Path::new("adapter state"), &specs, &found)?;
        let new: HashMap<&str, &Tensor> = named.iter().map(|(n, t)| (n.as_str(), t)).collect();
        tch::no_grad(|| {
            for (name, tensor) in &mut own.named {
                if let Some(new) = new.get(name.as_str()) {
                    tensor.f_copy_(new)?;
                }
            }
            Ok(())
        })
    }

    /// Runs `work` with the adapters off: the model computes what it did before it had any.
    pub fn without_adapters<R>(&self, work: impl FnOnce(&Self) -> R) -> R {
        /// Turns them on again, also where `work` panics.
        struct Back<'a>(&'a Adapters, bool);
        impl Drop for Back<'_> {
            fn drop(&mut self) {
                self.0.switch(self.1);
            }
        }
        let _back = self.adapters.as_ref().map(|a| Back(a, a.switch(false)));
        work(self)
    }
}

/// The layers that match, in the model's order; every target must match one.
fn targeted<'a>(vlm: &'a Vlm, targets: &[String]) -> Result<Vec<&'a Linear>> {
    let mut chosen = HashSet::new();
    for target in targets {
        let pattern = regex::escape(target).replace(r"\*", ".*");
        let pattern = Regex::new(&format!(r"^(.*\.)?{pattern}$"))
            .map_err(|e| ModelError::input(format!("target `{target}`: {e}")))?;
        let visual = target.starts_with("visual.");
        let fits = |l: &&Linear| l.name.starts_with("visual.") == visual && pattern.is_match(&l.name);
        let mut any = false;
        for layer in vlm.linears().filter(fits) {
            chosen.insert(layer.name.as_str());
            any = true;
        }
        if !any {
            return Err(ModelError::input(format!("no linear layer is named `{target}`; there are {}", existing(vlm))));
        }
    }
    if chosen.is_empty() {
        return Err(ModelError::input("adapters need a target: name linear layers"));
    }
    Ok(vlm.linears().filter(|l| chosen.contains(l.name.as_str())).collect())
}

/// What targets can name, numbers written as `*`.
fn existing(vlm: &Vlm) -> String {
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

/// Numbers from -bound to bound.
fn uniform(seed: u64, name: &str, count: usize, bound: f64) -> Vec<f32> {
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes()).update(name.as_bytes());
    let mut rng = ChaCha8Rng::from_seed(*hash.finalize().as_bytes());
    (0..count).map(|_| ((rng.random::<f64>() * 2.0 - 1.0) * bound) as f32).collect()
}
