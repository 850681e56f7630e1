//! A whole model: parameters by name, vision tower, decoder and output matrix, with loading, saving, weight swaps, and the three ways of
//! running it (teacher-forced, packed groups, generation).

mod adapters;
mod generate;
mod heads;
pub(crate) mod merge;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};
use unveil_core::{Compute, GridThw};
use unveil_torch_ext::{ExtError, keep_wide_gradient, select_gpu};

use crate::adapters::lora::Adapters;
use crate::compute::{cache_kind, prepare};
use crate::config::parameters;
use crate::decoder::{AttentionMask, Decoder, SequenceOptions, SequenceOut};
use crate::family::build_tower;
use crate::layers::attention::{Capture, CaptureSpec};
use crate::layers::linear::Linear;
use crate::layers::ops::{FEW_ROWS, activation_kind, linear, minus_infinity_where};
use crate::training::packed::PackedBatch;
use crate::training::tape::{Tape, TapeMode, Var};
use crate::vision::VisionTower;
use crate::weights::fused_weights::fuse_weights;
use crate::weights::shards::{MAX_SHARD_BYTES, ShardPlan};
use crate::weights::{self, overwrite};
use crate::{ModelError, Result, VlmConfig};

/// Result of [`Vlm::forward`].
#[derive(Debug)]
pub struct ForwardOut {
    /// Hidden states after the final norm `[B, L, D]`.
    pub hidden: Tensor,
    /// Attention rows `[B, Q, V]`, fp32, if captured; 0 at padding.
    pub attention: Option<Tensor>,
}

/// Result of [`Vlm::forward_packed`].
#[derive(Debug)]
pub struct PackedOut {
    /// Hidden states `[N, D]` that predict each response token.
    pub hidden: Tensor,
    /// Attention rows `[N, V]` of each response token as query, fp32, if captured.
    pub attention: Option<Tensor>,
}

/// Positions in `B * L`, and the features that are added there after each of the first layers.
type Deepstack = (Tensor, Vec<Var>);

/// A vision-language model on one device.
#[derive(Debug)]
pub struct Vlm {
    config: VlmConfig,
    parameters: Vec<(String, Tensor)>,
    by_name: HashMap<String, usize>,
    vision: VisionTower,
    decoder: Decoder,
    pub(crate) adapters: Option<Adapters>,
    embedding: Tensor,
    head: Tensor,
}

impl Vlm {
    /// Loads a model directory in Hugging Face layout. No parameter needs gradients yet.
    ///
    /// # Errors
    /// Returns an error that names the file, and the tensor or key that is wrong.
    pub fn load(dir: &Path, device: Device, kind: Kind) -> Result<Self> {
        if let Device::Cuda(gpu) = device {
            // Operations without an explicit GPU must use the model's GPU on this thread. Without our CUDA library there are none.
            match select_gpu(gpu) {
                Ok(()) | Err(ExtError::Unavailable { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let mut config = VlmConfig::load(dir)?;
        let parameters = weights::load_dir(dir, &mut config, device, kind)?;
        Self::assemble(config, parameters)
    }

    pub(crate) fn assemble(config: VlmConfig, mut parameters: Vec<(String, Tensor)>) -> Result<Self> {
        let by_name: HashMap<String, usize> = parameters.iter().enumerate().map(|(i, (n, _))| (n.clone(), i)).collect();
        let index_of = |name: &str| -> Result<usize> {
            by_name.get(name).copied().ok_or_else(|| ModelError::input(format!("no tensor `{name}`")))
        };
        let fused = fuse_weights(&config, &mut parameters, &index_of)?;
        for (_, narrow) in parameters.iter().filter(|(_, t)| matches!(t.kind(), Kind::BFloat16 | Kind::Half)) {
            keep_wide_gradient(narrow)?;
        }
        let get = |name: &str| -> Result<Tensor> { Ok(parameters[index_of(name)?].1.shallow_clone()) };
        let fused = |first: &str| fused.get(first).map(Tensor::shallow_clone);
        let embedding = get("model.embed_tokens.weight")?;
        let head = if config.tie_word_embeddings { embedding.shallow_clone() } else { get("lm_head.weight")? };
        let vision = VisionTower::new(&config.vision, build_tower(config.family, &config.vision, &get)?);
        let decoder = Decoder::new(&config.text, &get, &fused)?;
        Ok(Self { vision, decoder, adapters: None, embedding, head, config, parameters, by_name })
    }

    /// Writes the weights (in shards if they are large), `config.json` and `generation_config.json`, each file atomically. Weights are
    /// stored in their current dtype, without adapters (see [`Vlm::merged`]).
    ///
    /// # Errors
    /// Returns [`ModelError::Io`] if a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.save_as(dir, self.kind())
    }

    /// [`Vlm::save`] with the weights converted to `kind`.
    ///
    /// # Errors
    /// Returns the same errors as [`Vlm::save`].
    pub fn save_as(&self, dir: &Path, kind: Kind) -> Result<()> {
        self.save_with_replacements(dir, kind, &HashMap::new())
    }

    /// [`Vlm::save_as`] with the tensors in `named`, of the same shapes, in place of the current weights of these names.
    ///
    /// # Errors
    /// Returns the same errors as [`Vlm::save`].
    pub fn save_with_replacements(&self, dir: &Path, kind: Kind, named: &HashMap<&str, &Tensor>) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|e| ModelError::io(dir, e))?;
        let mut config = self.config.clone();
        config.dtype = kind;
        let plan = ShardPlan::new(&config, &parameters::tensor_specs(&config), MAX_SHARD_BYTES);
        plan.write(dir, &mut |index| {
            let (name, current) = &self.parameters[index];
            Ok(named.get(name.as_str()).map_or(current, |t| *t).f_detach()?.f_to_kind(kind)?)
        })?;
        config.save(dir)
    }

    /// Returns the name of a parameter in published files of the family.
    pub fn published_name(&self, name: &str) -> String {
        parameters::published_name(self.config.family, name)
    }

    /// Returns the configuration.
    pub fn config(&self) -> &VlmConfig {
        &self.config
    }

    /// Returns the device of the parameters.
    pub fn device(&self) -> Device {
        self.embedding.device()
    }

    /// Returns the dtype of the parameters.
    pub fn kind(&self) -> Kind {
        self.embedding.kind()
    }

    /// Returns the parameters (leaf tensors) by name, always in the same order; a tied output matrix is not listed separately.
    pub fn named_parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// Returns a parameter by name.
    pub fn parameter(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|i| &self.parameters[*i].1)
    }

    /// Sets the precision of computation; caches that exist keep theirs.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] for TF32 without a GPU.
    pub fn set_compute(&mut self, compute: Compute) -> Result<()> {
        prepare(compute, self.device())?;
        self.decoder.compute = compute;
        self.vision.compute = compute;
        self.linears().for_each(|layer| layer.compute.set(compute));
        Ok(())
    }

    /// Returns the precision of computation.
    pub fn compute(&self) -> Compute {
        self.decoder.compute
    }

    /// Returns the dtype of keys and values in caches.
    pub fn cache_kind(&self) -> Kind {
        cache_kind(self.decoder.compute, activation_kind(self.kind()))
    }

    /// Returns all linear layers: the decoder's, then the vision tower's.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.decoder.linears().chain(self.vision.linears())
    }

    /// Makes exactly those parameters trainable for which `filter` returns true; returns their number.
    pub fn set_trainable(&self, filter: impl Fn(&str) -> bool) -> usize {
        let mut count = 0;
        for (name, tensor) in &self.parameters {
            let trainable = filter(name);
            let _ = tensor.set_requires_grad(trainable);
            count += usize::from(trainable);
        }
        count
    }

    /// Overwrites all parameters in place (weight swap), after checking all names and shapes.
    ///
    /// # Errors
    /// Returns an error that names the tensor that is missing, extra or of another shape.
    pub fn load_state(&mut self, named: &[(String, Tensor)]) -> Result<()> {
        overwrite(Path::new("weight state"), &self.parameters, named)
    }

    /// Overwrites only the given parameters in place, after checking all names and shapes.
    ///
    /// # Errors
    /// Returns an error that names the tensor that is unknown or of another shape.
    pub fn load_partial(&mut self, named: &[(String, Tensor)]) -> Result<()> {
        let given: HashSet<&str> = named.iter().map(|(n, _)| n.as_str()).collect();
        let given = self.parameters.iter().filter(|(n, _)| given.contains(n.as_str()));
        overwrite(Path::new("weight state"), given, named)
    }

    /// Computes the features `[sum merged, (1 + k) D]` of images from their patches `[sum t*h*w, patch_len]`, in the processor's order: the
    /// features that replace placeholders, then those of each of the k DeepStack levels (k = 0 in families without DeepStack).
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] if there is no image, or if a grid or the shape of the patches is invalid.
    pub fn encode_images(&self, pixel_values: &Tensor, grids: &[GridThw]) -> Result<Tensor> {
        Ok(self.vision.forward(&mut Tape::new(TapeMode::Graph), pixel_values, grids)?.tensor)
    }

    /// Computes the embeddings `[B, L, D]` of tokens `[B, L]`, with placeholders replaced by feature rows in row-major order, and the
    /// DeepStack features with their positions.
    ///
    /// # Errors
    /// Returns [`ModelError::ImageTokens`] if the numbers of placeholders and features differ, and [`ModelError::Input`] for tokens outside
    /// the vocabulary or features of another width.
    fn embed<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        tokens: &Tensor,
        image_features: Option<&Var>,
    ) -> Result<(Var, Option<Deepstack>)> {
        let vocab = self.config.text.vocab_size;
        let is_placeholder = tokens.eq(i64::from(self.config.image_token_id));
        let (fits, count) = check_tokens(tokens, &is_placeholder, vocab)?;
        if !fits {
            return Err(ModelError::input(format!("a token id is outside the vocabulary of {vocab}")));
        }
        let features = image_features.map(|f| f.tensor.size());
        let rows = features.as_ref().and_then(|f| f.first().copied()).unwrap_or(0);
        if count != rows {
            return Err(ModelError::ImageTokens { tokens: count, features: rows });
        }
        let ids = tokens.shallow_clone();
        let Some(features) = image_features.filter(|_| count > 0) else {
            return Ok((tape.call1(&[], move |_| self.embed_tokens(&ids)), None));
        };
        let d = self.config.text.hidden_size;
        let levels = self.config.vision.deepstack().len() as i64;
        if features.tensor.size() != [rows, d * (1 + levels)] {
            let size = features.tensor.size();
            return Err(ModelError::input(format!(
                "image features have shape {size:?}, expected [{rows}, {}]",
                d * (1 + levels)
            )));
        }
        let mut parts = tape.call(&[features], move |t| t[0].split(d, 1));
        let deepstack = parts.split_off(1);
        // Their number is known: neither this nor the backward pass waits for the device to count them.
        let positions = is_placeholder.f_flatten(0, 1)?.f_nonzero_static(count, 0)?.f_squeeze_dim(1)?;
        let targets = positions.shallow_clone();
        let embeds = tape.call1(&[&parts[0]], move |t| {
            let text = self.embed_tokens(&ids);
            text.flatten(0, 1).index_copy(0, &targets, &t[0]).view_as(&text)
        });
        Ok((embeds, (levels > 0).then_some((positions, deepstack))))
    }

    /// Runs a teacher-forced pass over tokens `[B, L]` at `positions [3, B, L]`. A `mask` of `None` is causal, a bool mask `[B, 1, L, L]` is
    /// true where a position may attend, and a mask of another dtype is added to the scores. No position may be masked entirely.
    ///
    /// # Errors
    /// Returns [`ModelError::ImageTokens`] if the numbers of placeholders and features differ, and [`ModelError::Input`] if shapes do not
    /// match, or a token or a captured layer does not exist.
    pub fn forward(
        &self,
        tokens: &Tensor,
        image_features: Option<&Tensor>,
        positions: &Tensor,
        mask: Option<&Tensor>,
        capture: Option<&Capture>,
    ) -> Result<ForwardOut> {
        let capture = capture.map(|c| Rc::new(c.shallow_clone()));
        let options = SequenceOptions { capture, ..SequenceOptions::default() };
        let mask = self.attention_mask(mask, tokens)?;
        let out = self.infer(tokens, image_features, positions, mask, options)?;
        let attention = out.attention.into_iter().map(|v| v.tensor).reduce(|a, b| a + b);
        Ok(ForwardOut { hidden: out.hidden.tensor, attention })
    }

    /// [`Vlm::run_sequences`] in one graph, with features that are constants.
    pub(crate) fn infer(
        &self,
        tokens: &Tensor,
        image_features: Option<&Tensor>,
        positions: &Tensor,
        mask: AttentionMask,
        options: SequenceOptions,
    ) -> Result<SequenceOut> {
        let features = image_features.map(|f| Var::constant(f.shallow_clone()));
        let mut tape = Tape::new(TapeMode::Graph);
        self.run_sequences(&mut tape, tokens, features.as_ref(), positions, mask, options)
    }

    /// [`Vlm::infer`] for packed groups.
    pub(crate) fn infer_packed(
        &self,
        batch: &PackedBatch,
        image_features: Option<&Tensor>,
        options: SequenceOptions,
    ) -> Result<SequenceOut> {
        self.infer(
            &batch.tokens,
            image_features,
            &batch.positions,
            AttentionMask::Packed(batch.attention.clone()),
            options,
        )
    }

    /// Checks shapes and runs the decoder.
    fn run_sequences<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        tokens: &Tensor,
        image_features: Option<&Var>,
        positions: &Tensor,
        mask: AttentionMask,
        options: SequenceOptions,
    ) -> Result<SequenceOut> {
        let size = tokens.size();
        let [b, l] = size[..] else {
            return Err(ModelError::input(format!("tokens have shape {size:?}, expected [B, L]")));
        };
        if positions.size() != [3, b, l] {
            return Err(ModelError::input(format!(
                "tokens {size:?} and positions {:?} do not match",
                positions.size()
            )));
        }
        if let Some(c) = &options.capture {
            c.set.check(&self.config.text)?;
        }
        let (embeds, deepstack) = self.embed(tape, tokens, image_features)?;
        Ok(self.decoder.run_sequences(tape, embeds, positions, mask, SequenceOptions { deepstack, ..options }))
    }

    /// Converts the mask that [`Vlm::forward`] is given to an additive one.
    fn attention_mask(&self, mask: Option<&Tensor>, tokens: &Tensor) -> Result<AttentionMask> {
        let (Some(m), &[b, l]) = (mask, &tokens.size()[..]) else { return Ok(AttentionMask::Causal) };
        if m.dim() != 4 || m.size()[2..] != [l, l] || ![1, b].contains(&m.size()[0]) {
            return Err(ModelError::input(format!("mask has shape {:?}, expected [{b}, 1, {l}, {l}]", m.size())));
        }
        let kind = activation_kind(self.kind());
        Ok(AttentionMask::Additive(match m.kind() {
            Kind::Bool => minus_infinity_where(&m.logical_not(), kind),
            _ => m.to_kind(kind),
        }))
    }

    /// Computes the logits `[.., V]`, fp32, of hidden states `[.., D]`. Pass only the rows that are needed.
    pub fn lm_head(&self, hidden: &Tensor) -> Tensor {
        linear(hidden, &self.head, None, self.decoder.compute)
    }

    /// [`Vlm::lm_head`] for the rows of a decode step: on the CPU the logits of a row do not depend on the number of other rows.
    pub fn step_logits(&self, hidden: &Tensor) -> Tensor {
        if hidden.device() != Device::Cpu || hidden.size()[0] <= FEW_ROWS {
            return self.lm_head(hidden);
        }
        Tensor::cat(&hidden.split(FEW_ROWS, 0).iter().map(|rows| self.lm_head(rows)).collect::<Vec<_>>(), 0)
    }

    /// Runs a teacher-forced pass over packed groups.
    ///
    /// # Errors
    /// Returns the same errors as [`Vlm::forward`].
    pub fn forward_packed(
        &self,
        batch: &PackedBatch,
        image_features: Option<&Tensor>,
        capture: Option<CaptureSpec>,
    ) -> Result<PackedOut> {
        let features = image_features.map(|f| Var::constant(f.shallow_clone()));
        let (hidden, attention) =
            self.run_packed(&mut Tape::new(TapeMode::Graph), batch, features.as_ref(), capture)?;
        Ok(PackedOut { hidden: hidden.tensor, attention: attention.map(|a| a.tensor) })
    }

    /// [`Vlm::forward_packed`] on a tape, starting from the pixels of all images, in order. Returns hidden states `[N, D]` and attention rows
    /// `[N, V]`.
    ///
    /// # Errors
    /// Returns the same errors as [`Vlm::encode_images`] and [`Vlm::forward`].
    pub fn train_packed<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        batch: &PackedBatch,
        images: Option<(&Tensor, &[GridThw])>,
        capture: Option<CaptureSpec>,
    ) -> Result<(Var, Option<Var>)> {
        let features = images.map(|(pixels, grids)| self.vision.forward(tape, pixels, grids)).transpose()?;
        self.run_packed(tape, batch, features.as_ref(), capture)
    }

    fn run_packed<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        batch: &PackedBatch,
        features: Option<&Var>,
        capture: Option<CaptureSpec>,
    ) -> Result<(Var, Option<Var>)> {
        if capture.is_some() && batch.attention.is_shared() {
            return Err(ModelError::input("attention cannot be captured from groups that share a row"));
        }
        let capture = capture.map(|c| {
            Rc::new(Capture {
                set: c.set,
                queries: batch.query_index.shallow_clone(),
                image_index: batch.image_index.shallow_clone(),
                image_valid: batch.image_valid.shallow_clone(),
                differentiable: c.differentiable,
                pool: None,
            })
        });
        let rows = Some(batch.predict_index.shallow_clone());
        let options = SequenceOptions { capture, rows, ..SequenceOptions::default() };
        let out = self.run_sequences(
            tape,
            &batch.tokens,
            features,
            &batch.positions,
            AttentionMask::Packed(batch.attention.clone()),
            options,
        )?;
        let attention = (!out.attention.is_empty()).then(|| {
            let index = batch.query_flat.shallow_clone();
            tape.call1(&out.attention.iter().collect::<Vec<_>>(), move |layers| {
                let sum = layers.iter().skip(1).fold(layers[0].shallow_clone(), |sum, rows| sum + rows);
                sum.flatten(0, 1).index_select(0, &index)
            })
        });
        Ok((out.hidden, attention))
    }

    /// Returns the embeddings of token ids that are within the vocabulary.
    fn embed_tokens(&self, tokens: &Tensor) -> Tensor {
        Tensor::embedding(&self.embedding, tokens, -1, false, false).to_kind(activation_kind(self.kind()))
    }

    /// Like [`Vlm::embed_tokens`], but returns errors of libtorch.
    fn try_embed_tokens(&self, tokens: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_embedding(&self.embedding, tokens, -1, false, false)?.f_to_kind(activation_kind(self.kind()))?)
    }
}

/// Returns whether all tokens are within a vocabulary of `vocab`, and the number of placeholders among them; one copy to the host.
fn check_tokens(tokens: &Tensor, is_placeholder: &Tensor, vocab: i64) -> Result<(bool, i64)> {
    if tokens.numel() == 0 {
        return Ok((true, 0));
    }
    let facts = [tokens.f_min()?, tokens.f_max()?, is_placeholder.f_sum(Kind::Int64)?];
    let facts = Vec::<i64>::try_from(Tensor::f_stack(&facts, 0)?)?;
    Ok((facts[0] >= 0 && facts[1] < vocab, facts[2]))
}
