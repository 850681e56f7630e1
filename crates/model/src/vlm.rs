//! A whole model: parameters by name, vision tower, decoder, output matrix; loading, saving, weight swaps, and the
//! three ways of running it (teacher-forced, packed groups, generation).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};
use unveil_torch_ext::{ExtError, own_gpu};

use crate::attention::{AttentionSet, Capture, CaptureSpec};
use crate::cache::{CacheShape, DecodeOut, GroupCache, Prefill};
use crate::decoder::{Decoder, Reach, SequenceAsk, SequenceOut};
use crate::fuse::fuse;
use crate::linear::Linear;
use crate::lora::Adapters;
use crate::ops::{FEW, linear, wide};
use crate::packed::{PackedBatch, PackedGroup, image_positions, padding_token};
use crate::place::Place;
use crate::rope::rope_positions;
use crate::shards::{Plan, SHARD_BYTES};
use crate::tape::{Mode, Tape, Var};
use crate::vision::Vision;
use crate::weights::{self, check_names};
use crate::{GridThw, ModelError, Result, VlmConfig, graph, spec};

/// A prompt as the model takes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    /// Token ids, one image placeholder per merged image token.
    pub tokens: Vec<u32>,
    /// The images' grids in order.
    pub grids: Vec<GridThw>,
}

/// Result of [`Vlm::forward`].
pub struct ForwardOut {
    /// Hidden states after the final norm `[B, L, D]`.
    pub hidden: Tensor,
    /// Attention rows `[B, Q, V]`, fp32, if captured; 0 at image tokens that are padding.
    pub attention: Option<Tensor>,
}

/// Result of [`Vlm::forward_packed`].
pub struct PackedOut {
    /// Hidden states that predict each response token `[N, D]`.
    pub hidden: Tensor,
    /// Row `[N, V]` of the pass whose input is that response token, fp32, if captured.
    pub attention: Option<Tensor>,
}

/// Positions in `B * L`, and what is added there after each of the first layers.
type Deepstack = (Tensor, Vec<Var>);

/// A vision-language model on one device.
pub struct Vlm {
    config: VlmConfig,
    parameters: Vec<(String, Tensor)>,
    by_name: HashMap<String, usize>,
    vision: Vision,
    decoder: Decoder,
    pub(crate) adapters: Option<Adapters>,
    embedding: Tensor,
    head: Tensor,
}

impl Vlm {
    /// Loads a model directory in Hugging Face layout; no parameter asks for gradients yet.
    pub fn load(dir: &Path, device: Device, kind: Kind) -> Result<Self> {
        if let Device::Cuda(gpu) = device {
            // What names no GPU means the one of the model, in this thread. Without the CUDA part nothing asks.
            match own_gpu(gpu) {
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
        let place = |name: &str| -> Result<usize> {
            by_name.get(name).copied().ok_or_else(|| ModelError::input(format!("no tensor `{name}`")))
        };
        let fused = fuse(&config, &mut parameters, &place)?;
        let get = |name: &str| -> Result<Tensor> { Ok(parameters[place(name)?].1.shallow_clone()) };
        let whole = |first: &str| fused.get(first).map(Tensor::shallow_clone);
        let embedding = get("model.embed_tokens.weight")?;
        let head = if config.tie_word_embeddings { embedding.shallow_clone() } else { get("lm_head.weight")? };
        let vision = Vision::new(&config.vision, config.family.tower(&config.vision, &get)?);
        let decoder = Decoder::new(&config.text, &get, &whole)?;
        Ok(Self { vision, decoder, adapters: None, embedding, head, config, parameters, by_name })
    }

    /// Writes the weights (in shards where they are large), `config.json` and `generation_config.json`, each file whole or not
    /// at all. Weights are stored in the kind that they have here, without adapters (see [`Vlm::merged`]).
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.save_as(dir, self.kind())
    }

    /// [`Vlm::save`] in another kind of numbers.
    pub fn save_as(&self, dir: &Path, kind: Kind) -> Result<()> {
        self.save_with(dir, kind, &HashMap::new())
    }

    /// [`Vlm::save_as`] with other weights than the present ones where `named` has some, of the same shapes.
    pub fn save_with(&self, dir: &Path, kind: Kind, named: &HashMap<&str, &Tensor>) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|e| ModelError::io(dir, e))?;
        let mut config = self.config.clone();
        config.dtype = kind;
        let plan = Plan::new(&config, &spec::tensors(&config), SHARD_BYTES);
        plan.write(dir, &mut |index| {
            let (name, own) = &self.parameters[index];
            Ok(named.get(name.as_str()).map_or(own, |t| *t).f_detach()?.f_to_kind(kind)?)
        })?;
        config.save(dir)
    }

    /// How published files of the family spell a parameter's name.
    pub fn published_name(&self, name: &str) -> String {
        self.config.family.stored_name(name)
    }

    /// The configuration.
    pub fn config(&self) -> &VlmConfig {
        &self.config
    }

    /// Where the parameters are.
    pub fn device(&self) -> Device {
        self.embedding.device()
    }

    /// What kind of numbers the parameters are.
    pub fn kind(&self) -> Kind {
        self.embedding.kind()
    }

    /// Leaf tensors by published name, always in the same order; a tied output matrix is not listed again.
    pub fn named_parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// One parameter.
    pub fn parameter(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|i| &self.parameters[*i].1)
    }

    /// All linear layers: the decoder's, then the vision tower's.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.decoder.linears().chain(self.vision.linears())
    }

    /// Asks for gradients exactly where `filter` says so; returns the number of such parameters.
    pub fn set_trainable(&self, filter: impl Fn(&str) -> bool) -> usize {
        let mut on = 0;
        for (name, tensor) in &self.parameters {
            let train = filter(name);
            let _ = tensor.set_requires_grad(train);
            on += usize::from(train);
        }
        on
    }

    /// Overwrites all parameters in place (weight swap). Nothing is touched unless every name and shape fits.
    pub fn load_state(&mut self, named: &[(String, Tensor)]) -> Result<()> {
        self.overwrite(named, &spec::tensors(&self.config))
    }

    /// Overwrites the named parameters in place; the others stay. Nothing is touched unless every name and shape fits.
    pub fn load_some(&mut self, named: &[(String, Tensor)]) -> Result<()> {
        let given: std::collections::HashSet<&str> = named.iter().map(|(n, _)| n.as_str()).collect();
        let specs = spec::tensors(&self.config).into_iter().filter(|s| given.contains(s.name.as_str()));
        self.overwrite(named, &specs.collect::<Vec<_>>())
    }

    fn overwrite(&mut self, named: &[(String, Tensor)], specs: &[spec::TensorSpec]) -> Result<()> {
        let found = named.iter().map(|(n, t)| (n.as_str(), t.size())).collect::<BTreeMap<_, _>>();
        check_names(Path::new("weight state"), specs, &found)?;
        tch::no_grad(|| {
            for (name, new) in named {
                if let Some(index) = self.by_name.get(name) {
                    self.parameters[*index].1.f_copy_(new)?;
                }
            }
            Ok::<(), ModelError>(())
        })
    }

    /// Features of images given as patches `[sum t*h*w, patch_len]`, in the processor's order: `[sum merged, (1 + k) D]`, what
    /// replaces placeholders and then what each of k deepstack levels adds in the decoder (k = 0 in families without).
    pub fn encode_images(&self, pixel_values: &Tensor, grids: &[GridThw]) -> Result<Tensor> {
        Ok(self.vision.forward(&mut Tape::new(Mode::Graph), pixel_values, grids)?.tensor)
    }

    /// Embeddings `[B, L, D]` of tokens `[B, L]`, placeholders replaced by feature rows in row-major order, and what
    /// deepstack adds where.
    ///
    /// Errors with [`ModelError::ImageTokens`] when placeholders and features differ in number.
    fn embed<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        tokens: &Tensor,
        image_features: Option<&Var>,
    ) -> Result<(Var, Option<Deepstack>)> {
        let vocab = self.config.text.vocab_size;
        if tokens.numel() > 0 && (tokens.max().int64_value(&[]) >= vocab || tokens.min().int64_value(&[]) < 0) {
            return Err(ModelError::input(format!("a token id is outside the vocabulary of {vocab}")));
        }
        let places = tokens.eq(i64::from(self.config.image_token_id));
        let count = places.sum(Kind::Int64).int64_value(&[]);
        let features = image_features.map(|f| f.tensor.size());
        let rows = features.as_ref().and_then(|f| f.first().copied()).unwrap_or(0);
        if count != rows {
            return Err(ModelError::ImageTokens { tokens: count, features: rows });
        }
        let ids = tokens.shallow_clone();
        let Some(features) = image_features.filter(|_| count > 0) else {
            return Ok((tape.call1(&[], move |_| self.look_up(&ids)), None));
        };
        let (d, levels) = (self.config.text.hidden_size, self.config.vision.deepstack().len() as i64);
        if features.tensor.size() != [rows, d * (1 + levels)] {
            let found = features.tensor.size();
            return Err(ModelError::input(format!(
                "image features have shape {found:?}, expected [{rows}, {}]",
                d * (1 + levels)
            )));
        }
        let mut parts = tape.call(&[features], move |t| t[0].split(d, 1));
        let added = parts.split_off(1);
        let at = (levels > 0).then(|| places.flatten(0, 1).nonzero().squeeze_dim(1));
        let places = places.unsqueeze(-1);
        let embeds = tape.call1(&[&parts[0]], move |t| self.look_up(&ids).masked_scatter(&places, &t[0]));
        Ok((embeds, at.map(|at| (at, added))))
    }

    /// Teacher-forced pass over tokens `[B, L]`. `positions [3, B, L]`; `mask` none is causal, bool `[B, 1, L, L]` is true where a
    /// row may attend, any other kind is added to the scores. No row may be masked entirely.
    pub fn forward(
        &self,
        tokens: &Tensor,
        image_features: Option<&Tensor>,
        positions: &Tensor,
        mask: Option<&Tensor>,
        capture: Option<&Capture>,
    ) -> Result<ForwardOut> {
        let capture = capture.map(|c| Rc::new(c.share()));
        let ask = SequenceAsk { capture, ..SequenceAsk::default() };
        let features = image_features.map(|f| Var::constant(f.shallow_clone()));
        let mut tape = Tape::new(Mode::Graph);
        let out = self.sequences(&mut tape, tokens, features.as_ref(), positions, self.reach(mask, tokens)?, ask)?;
        let attention = out.attention.into_iter().map(|v| v.tensor).reduce(|a, b| a + b);
        Ok(ForwardOut { hidden: out.hidden.tensor, attention })
    }

    /// Checks shapes, runs the decoder.
    pub(crate) fn sequences<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        tokens: &Tensor,
        image_features: Option<&Var>,
        positions: &Tensor,
        reach: Reach,
        ask: SequenceAsk,
    ) -> Result<SequenceOut> {
        let size = tokens.size();
        let [b, l] = size[..] else {
            return Err(ModelError::input(format!("tokens have shape {size:?}, expected [B, L]")));
        };
        if positions.size() != [3, b, l] {
            return Err(ModelError::input(format!("tokens {size:?} and positions {:?} do not fit", positions.size())));
        }
        if let Some(c) = &ask.capture {
            c.set.check(&self.config.text)?;
        }
        let (embeds, deepstack) = self.embed(tape, tokens, image_features)?;
        Ok(self.decoder.sequences(tape, embeds, positions, reach, SequenceAsk { deepstack, ..ask }))
    }

    /// A mask as it is given to [`Vlm::forward`], additive.
    fn reach(&self, mask: Option<&Tensor>, tokens: &Tensor) -> Result<Reach> {
        let (Some(m), &[b, l]) = (mask, &tokens.size()[..]) else { return Ok(Reach::Causal) };
        if m.dim() != 4 || m.size()[2..] != [l, l] || ![1, b].contains(&m.size()[0]) {
            return Err(ModelError::input(format!("mask has shape {:?}, expected [{b}, 1, {l}, {l}]", m.size())));
        }
        let kind = wide(self.kind());
        Ok(Reach::Mask(match m.kind() {
            Kind::Bool => {
                Tensor::zeros(m.size().as_slice(), (kind, m.device())).masked_fill(&m.logical_not(), f64::NEG_INFINITY)
            }
            _ => m.to_kind(kind),
        }))
    }

    pub(crate) fn tree(&self, batch: &PackedBatch) -> Reach {
        Reach::Tree(batch.tree.of_kind(wide(self.kind())))
    }

    /// Logits `[.., V]`, fp32, of hidden states `[.., D]`; give it only the rows that are needed.
    pub fn lm_head(&self, hidden: &Tensor) -> Tensor {
        linear(hidden, &self.head, None)
    }

    /// [`Vlm::lm_head`] of the rows of a decode step: on the CPU a row's logits do not depend on how many others there are.
    pub fn step_logits(&self, hidden: &Tensor) -> Tensor {
        if hidden.device() != Device::Cpu || hidden.size()[0] <= FEW {
            return self.lm_head(hidden);
        }
        Tensor::cat(&hidden.split(FEW, 0).iter().map(|rows| self.lm_head(rows)).collect::<Vec<_>>(), 0)
    }

    /// Teacher-forced pass over packed groups.
    pub fn forward_packed(
        &self,
        batch: &PackedBatch,
        image_features: Option<&Tensor>,
        capture: Option<CaptureSpec>,
    ) -> Result<PackedOut> {
        let features = image_features.map(|f| Var::constant(f.shallow_clone()));
        let (hidden, attention) = self.packed(&mut Tape::new(Mode::Graph), batch, features.as_ref(), capture)?;
        Ok(PackedOut { hidden: hidden.tensor, attention: attention.map(|a| a.tensor) })
    }

    /// [`Vlm::forward_packed`] on a tape, from the pixels of all images in order: hidden states `[N, D]` and attention rows
    /// `[N, V]`.
    pub fn train_packed<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        batch: &PackedBatch,
        images: Option<(&Tensor, &[GridThw])>,
        capture: Option<CaptureSpec>,
    ) -> Result<(Var, Option<Var>)> {
        let features = images.map(|(pixels, grids)| self.vision.forward(tape, pixels, grids)).transpose()?;
        self.packed(tape, batch, features.as_ref(), capture)
    }

    fn packed<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        batch: &PackedBatch,
        features: Option<&Var>,
        capture: Option<CaptureSpec>,
    ) -> Result<(Var, Option<Var>)> {
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
        let ask = SequenceAsk { capture, rows, ..SequenceAsk::default() };
        let out = self.sequences(tape, &batch.tokens, features, &batch.positions, self.tree(batch), ask)?;
        let attention = (!out.attention.is_empty()).then(|| {
            let index = batch.query_flat.shallow_clone();
            tape.call1(&out.attention.iter().collect::<Vec<_>>(), move |layers| {
                let sum = layers.iter().skip(1).fold(layers[0].shallow_clone(), |sum, rows| sum + rows);
                sum.flatten(0, 1).index_select(0, &index)
            })
        });
        Ok((out.hidden, attention))
    }

    /// Runs prompts and keeps their keys and values. `image_features` holds all images of all prompts, in order.
    pub fn prefill(&self, prompts: &[Prompt], image_features: Option<&Tensor>) -> Result<Prefill> {
        let l = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
        if let Some(empty) = prompts.iter().position(|p| p.tokens.is_empty()) {
            return Err(ModelError::input(format!("prompt {empty} is empty")));
        }
        if l == 0 {
            return Err(ModelError::input("no prompt was given"));
        }
        let filler = padding_token(&self.config);
        let (mut tokens, mut positions, mut next) = (Vec::new(), Vec::new(), Vec::new());
        for (index, prompt) in prompts.iter().enumerate() {
            let (own, after) = rope_positions(&prompt.tokens, &prompt.grids, &self.config)
                .map_err(|e| ModelError::input(format!("prompt {index}: {e}")))?;
            tokens.extend(prompt.tokens.iter().map(|t| i64::from(*t)).chain(std::iter::repeat(filler)).take(l));
            positions.extend(own.into_iter().chain(std::iter::repeat([0; 3])).take(l).flatten());
            next.push(after);
        }
        let (g, device) = (prompts.len() as i64, self.device());
        let tokens = Tensor::from_slice(&tokens).view([g, l as i64]).to_device(device);
        let positions = Tensor::from_slice(&positions).view([g, l as i64, 3]).to_device(device).permute([2, 0, 1]);
        let lengths: Vec<i64> = prompts.iter().map(|p| p.tokens.len() as i64).collect();
        let last: Vec<i64> = lengths.iter().enumerate().map(|(i, len)| (i * l) as i64 + len - 1).collect();
        let last = Tensor::from_slice(&last).to_device(device);
        let ask = SequenceAsk { rows: Some(last), keep_kv: true, ..SequenceAsk::default() };
        let features = image_features.map(|f| Var::constant(f.shallow_clone()));
        let mut tape = Tape::new(Mode::Graph);
        let out = self.sequences(&mut tape, &tokens, features.as_ref(), &positions, Reach::Causal, ask)?;
        let images: Vec<Vec<i64>> = prompts.iter().map(|p| image_positions(&p.tokens, &self.config)).collect();
        Ok(Prefill {
            last_hidden: out.hidden.tensor,
            image_tokens: images.iter().map(Vec::len).collect(),
            layers: out.kv,
            lengths,
            next,
            images,
            responses: Vec::new(),
        })
    }

    /// Runs prompts and what has been fed of their responses (which may be empty) under the present weights, for caches that
    /// were filled under other ones. All groups have equally many responses.
    pub fn refill(&self, groups: &[PackedGroup], image_features: Option<&Tensor>) -> Result<Prefill> {
        let batch = PackedBatch::pack(groups, &self.config, self.device())?;
        let lengths: Vec<i64> = groups.iter().map(|g| g.prompt.tokens.len() as i64).collect();
        let l = batch.tokens.size()[1];
        let last: Vec<i64> = lengths.iter().enumerate().map(|(i, len)| i as i64 * l + len - 1).collect();
        let last = Tensor::from_slice(&last).to_device(self.device());
        let ask = SequenceAsk { rows: Some(last), keep_kv: true, ..SequenceAsk::default() };
        let features = image_features.map(|f| Var::constant(f.shallow_clone()));
        let mut tape = Tape::new(Mode::Graph);
        let out =
            self.sequences(&mut tape, &batch.tokens, features.as_ref(), &batch.positions, self.tree(&batch), ask)?;
        let ranges = |g: &PackedGroup| {
            let mut at = g.prompt.tokens.len() as i64;
            let one = |r: &Vec<u32>| {
                at += r.len() as i64;
                at - r.len() as i64..at
            };
            g.responses.iter().map(one).collect()
        };
        let images: Vec<Vec<i64>> = groups.iter().map(|g| image_positions(&g.prompt.tokens, &self.config)).collect();
        Ok(Prefill {
            last_hidden: out.hidden.tensor,
            image_tokens: batch.image_tokens,
            layers: out.kv,
            lengths,
            next: batch.next,
            images,
            responses: groups.iter().map(ranges).collect(),
        })
    }

    /// Empty caches for this model; see [`GroupCache::new`].
    pub fn cache(&self, shape: CacheShape, capture: Option<AttentionSet>, steady: bool) -> Result<GroupCache> {
        GroupCache::new(&self.config.text, shape, capture, steady, self.device())
    }

    /// Feeds one token `[A]` to each of `rows` (ascending) and returns what predicts the next. Run it without gradients:
    /// caches are written in place.
    pub fn decode_step(&self, cache: &mut GroupCache, tokens: &Tensor, rows: &[usize]) -> Result<DecodeOut> {
        if tokens.size() != [rows.len() as i64] || rows.is_empty() || !rows.is_sorted_by(|a, b| a < b) {
            return Err(ModelError::input(format!("{:?} tokens for rows {rows:?}", tokens.size())));
        }
        cache.check_room(rows)?;
        let tokens = tokens.f_to_device(self.device())?;
        let (hidden, attention) = if cache.steady() && rows.len() < cache.rows() {
            let index: Vec<i64> = rows.iter().map(|r| *r as i64).collect();
            let index = Tensor::from_slice(&index).to_device(self.device());
            let all = Tensor::zeros([cache.rows() as i64], (Kind::Int64, self.device())).index_copy(0, &index, &tokens);
            let (hidden, attention) = self.run_step(cache, &all, &(0..cache.rows()).collect::<Vec<_>>())?;
            (hidden.index_select(0, &index), attention.map(|a| a.index_select(0, &index)))
        } else {
            self.run_step(cache, &tokens, rows)?
        };
        cache.advance(rows);
        Ok(DecodeOut { hidden, attention })
    }

    fn run_step(&self, cache: &mut GroupCache, tokens: &Tensor, rows: &[usize]) -> Result<(Tensor, Option<Tensor>)> {
        let _guard = tch::no_grad_guard();
        if self.decoder.on_host() && self.adapters.as_ref().is_none_or(|a| !a.on()) {
            return self.decoder.host_step(&self.embed_text(tokens)?, cache, &cache.seats(rows));
        }
        let place = cache.place(rows);
        match self.device() {
            Device::Cuda(gpu) if cache.steady() => graph::step(self, cache, gpu, tokens, place),
            _ => self.step(tokens, cache, &place),
        }
    }

    /// Embeddings of ids that are known to be within the vocabulary.
    fn look_up(&self, tokens: &Tensor) -> Tensor {
        Tensor::embedding(&self.embedding, tokens, -1, false, false).to_kind(wide(self.kind()))
    }

    fn embed_text(&self, tokens: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_embedding(&self.embedding, tokens, -1, false, false)?.f_to_kind(wide(self.kind()))?)
    }

    /// The tensor work of a decode step: nothing but the values in `tokens` and `place` changes between steps of one shape.
    pub(crate) fn step(&self, tokens: &Tensor, cache: &GroupCache, place: &Place) -> Result<(Tensor, Option<Tensor>)> {
        Ok(self.decoder.step(&self.embed_text(tokens)?, cache, place))
    }
}
