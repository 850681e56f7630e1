//! The engine: a model with its weight version, the queue of requests, the running batch, and the validation of requests.

mod images;
mod plan;

use std::borrow::{Borrow, BorrowMut};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Kind, Tensor};
use unveil_core::WeightVersion;
use unveil_model::{AdapterMerger, AttentionSet, Vlm};

use crate::batch::Batch;
use crate::queue::{QueuedGroup, Ticket};
use crate::request::{GroupOutput, GroupRequest, PromptInput};
use crate::{EngineError, Result};

use images::ImageCache;

pub use plan::{CachePlan, MaxSizes};

/// Prefix of the vision tower's parameters, the only ones that image features depend on.
const VISION_PREFIX: &str = "visual.";

/// Options of an engine; those of sampling are in each request.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Maximum number of responses decoded in a step; further groups wait until others have finished.
    pub max_rows: usize,
    /// Maximum number of tokens (prompts padded to the longest) prefilled or scored in one forward pass; a single group may exceed it.
    pub prefill_tokens: usize,
    /// Layers and heads whose attention over the image tokens is returned; `None`: no attention is returned.
    pub capture: Option<AttentionSet>,
    /// Token ids that are never sampled, in addition to the model's vision tokens: in particular embedding rows without a token, which
    /// are never trained.
    pub banned: Vec<u32>,
    /// Maximum memory of caches and activations, in bytes; `None`: the free memory, less a reserve.
    pub memory_limit: Option<u64>,
    /// Whether decode steps always have the same shapes, whichever responses have ended. Always the case on a GPU, where steps are
    /// captured as CUDA graphs.
    pub fixed_shapes: bool,
    /// Maximum size of the cache of image features, in bytes.
    pub image_cache_bytes: u64,
    /// Whether the KV cache of a batch that has ended serves the next one, with the steps that were captured for it. Takes effect where
    /// decode steps have fixed shapes.
    pub reuse_cache: bool,
    /// Whether running groups keep their KV caches when weights are loaded. Their later tokens then have the version of the weights that
    /// filled the caches.
    pub keep_cache: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_rows: 256,
            prefill_tokens: 8192,
            capture: None,
            banned: Vec::new(),
            memory_limit: None,
            fixed_shapes: false,
            image_cache_bytes: 256 << 20,
            reuse_cache: true,
            keep_cache: false,
        }
    }
}

/// Counters since the engine was created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineStats {
    /// Images encoded by the vision tower.
    pub images_encoded: u64,
    /// Prompts prefilled.
    pub prompts_prefilled: u64,
    /// Decode steps, each of which feeds a token of every row.
    pub decode_steps: u64,
    /// Decode steps that ran as CUDA graphs.
    pub graph_steps: u64,
    /// Tokens fed in decode steps, without those of ended responses.
    pub tokens_fed: u64,
    /// Tokens sampled.
    pub tokens: u64,
    /// Groups whose KV caches were recomputed after a weight swap.
    pub groups_refilled: u64,
}

/// Generates and scores groups with a model that it owns (`Engine<Vlm>`) or borrows (`Engine<&Vlm>`).
///
/// One thread owns it. [`Engine::generate`] runs groups to completion; [`Engine::submit`], [`Engine::step`] and [`Engine::cancel`] run
/// a stream of groups, and weights may be swapped between steps.
#[derive(Debug)]
pub struct Engine<V = Vlm> {
    pub(crate) vlm: V,
    pub(crate) options: EngineOptions,
    pub(crate) banned: Vec<u32>,
    pub(crate) end_tokens: Vec<u32>,
    pub(crate) version: WeightVersion,
    pub(crate) stats: EngineStats,
    pub(crate) images: ImageCache,
    pub(crate) waiting: VecDeque<QueuedGroup>,
    pub(crate) batch: Option<Batch>,
    /// The batch that ended last, without groups, whose cache the next one may use.
    pub(crate) spare: Option<Batch>,
    pub(crate) graph_error: Option<String>,
    /// Merges adapters, and keeps the original matrices.
    merger: AdapterMerger,
    next_ticket: u64,
}

impl<V: Borrow<Vlm>> Engine<V> {
    /// Creates an engine for `vlm`, whose weights are version 0.
    ///
    /// # Errors
    /// Returns [`EngineError::Model`] if the model does not have the layers and heads to capture.
    pub fn new(vlm: V, options: EngineOptions) -> Result<Self> {
        let config = vlm.borrow().config();
        if let Some(set) = &options.capture {
            set.check(&config.text)?;
        }
        let banned = config.banned_ids(&options.banned);
        Ok(Self {
            end_tokens: config.eos_token_ids(),
            images: ImageCache::new(options.image_cache_bytes),
            vlm,
            options,
            banned,
            version: 0,
            stats: EngineStats::default(),
            waiting: VecDeque::new(),
            batch: None,
            spare: None,
            graph_error: None,
            merger: AdapterMerger::default(),
            next_ticket: 0,
        })
    }

    /// Returns the model.
    pub fn vlm(&self) -> &Vlm {
        self.vlm.borrow()
    }

    /// Returns the token ids that are never sampled, sorted. The learner must exclude the same ones.
    pub fn banned(&self) -> &[u32] {
        &self.banned
    }

    /// Returns the version of the weights.
    pub fn version(&self) -> WeightVersion {
        self.version
    }

    /// Sets the version of the current weights.
    pub fn set_version(&mut self, version: WeightVersion) {
        self.version = version;
    }

    /// Returns the counters.
    pub fn stats(&self) -> EngineStats {
        self.stats
    }

    /// Returns why the latest decode step could not be captured as a CUDA graph, if so; steps then run without graphs until a later
    /// capture succeeds.
    pub fn graph_error(&self) -> Option<&str> {
        self.graph_error.as_deref()
    }

    pub(crate) fn fixed_shapes(&self) -> bool {
        self.options.fixed_shapes || self.vlm().device().is_cuda()
    }

    /// Returns the layers and heads whose attention is captured.
    pub fn capture(&self) -> Option<&AttentionSet> {
        self.options.capture.as_ref()
    }

    /// Returns the current size of the KV cache, in bytes, including one that is kept for the next batch.
    pub fn cache_bytes(&self) -> u64 {
        self.batch.as_ref().or(self.spare.as_ref()).map_or(0, |b| b.cache_bytes(&self.vlm.borrow().config().text))
    }

    /// Returns whether no group is running or queued.
    pub fn is_idle(&self) -> bool {
        self.batch.is_none() && self.waiting.is_empty()
    }

    /// Queues a group; [`Engine::step`] returns its output when it is done.
    ///
    /// # Errors
    /// Returns [`EngineError::Request`] for an invalid request, and [`EngineError::ImageTokens`], [`EngineError::Context`] or
    /// [`EngineError::Memory`] if it does not fit. The engine is unchanged then.
    pub fn submit(&mut self, request: GroupRequest) -> Result<Ticket> {
        self.check_request(&request)?;
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.waiting.push_back(QueuedGroup { ticket, request });
        Ok(ticket)
    }

    /// Cancels a group and returns its responses so far; unfinished ones are marked [`unveil_core::Finish::Cancelled`]. Frees its
    /// memory. Returns `None` if the engine no longer has the group.
    pub fn cancel(&mut self, ticket: Ticket) -> Option<GroupOutput> {
        if let Some(index) = self.waiting.iter().position(|w| w.ticket == ticket) {
            return self.waiting.remove(index).map(|w| GroupOutput::cancelled(w.request.sampling.n));
        }
        let batch = self.batch.as_mut()?;
        let output = batch.cancel(ticket);
        if batch.is_empty() {
            self.end_batch();
        }
        output
    }

    /// Generates the responses of every group, in the order of `requests`.
    ///
    /// Each image is encoded once and each prompt prefilled once. When `cancel` becomes true, running responses end with
    /// [`unveil_core::Finish::Cancelled`] after the current step, and queued groups end without tokens.
    ///
    /// # Errors
    /// See [`Engine::submit`], before any step is run, and [`Engine::step`].
    pub fn generate(&mut self, requests: &[GroupRequest], cancel: Option<&AtomicBool>) -> Result<Vec<GroupOutput>> {
        requests.iter().try_for_each(|r| self.check_request(r))?;
        if !self.is_idle() {
            return Err(EngineError::request("*", "the engine is running other groups: step it until they are done"));
        }
        let tickets = requests.iter().map(|r| self.submit(r.clone())).collect::<Result<Vec<_>>>()?;
        let mut outputs: HashMap<Ticket, GroupOutput> = HashMap::new();
        while !self.is_idle() {
            if cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
                outputs.extend(tickets.iter().filter_map(|t| self.cancel(*t).map(|output| (*t, output))));
                break;
            }
            outputs.extend(self.step()?);
        }
        let in_order = tickets.iter().zip(requests);
        Ok(in_order.map(|(t, r)| outputs.remove(t).unwrap_or_else(|| GroupOutput::cancelled(r.sampling.n))).collect())
    }

    fn check_request(&self, r: &GroupRequest) -> Result<()> {
        let images = self.check_input(&r.input, r.sampling.max_new_tokens)?;
        let s = &r.sampling;
        let invalid = |message: String| Err(EngineError::request(&r.input.id, message));
        if s.n == 0 || s.max_new_tokens == 0 {
            return invalid("n and max_new_tokens must be at least 1".into());
        }
        if !(s.temperature >= 0.0 && s.temperature.is_finite()) {
            return invalid(format!("temperature {} must be 0 or more", s.temperature));
        }
        if !(s.top_p > 0.0 && s.top_p <= 1.0) {
            return invalid(format!("top_p {} must be above 0 and at most 1", s.top_p));
        }
        if !(0.0..=1.0).contains(&s.min_p) {
            return invalid(format!("min_p {} must be from 0 to 1", s.min_p));
        }
        let max = MaxSizes { n: s.n, prompt: r.input.prompt.tokens.len(), images, response: s.max_new_tokens };
        self.plan_memory(&r.input.id, &max).map(|_| ())
    }

    /// Checks that a prompt matches its images and, with up to `new` response tokens, fits the context. Returns its number of image
    /// tokens.
    ///
    /// # Errors
    /// Returns [`EngineError::Request`] for an invalid prompt, [`EngineError::ImageTokens`] if prompt and images do not match, and
    /// [`EngineError::Context`] if it is too long.
    pub fn check_input(&self, input: &PromptInput, new: usize) -> Result<usize> {
        let config = self.vlm().config();
        let invalid = |message: String| EngineError::request(&input.id, message);
        if input.prompt.tokens.is_empty() {
            return Err(invalid("the prompt has no tokens".into()));
        }
        let vocab = config.text.vocab_size;
        if let Some(id) = input.prompt.tokens.iter().find(|&&t| i64::from(t) >= vocab) {
            return Err(invalid(format!(
                "token id {id} is outside the model's vocabulary of {vocab}: tokenizer and model do not belong together"
            )));
        }
        let mut features = 0;
        for grid in &input.prompt.grids {
            features += config.merged_tokens(*grid).map_err(|e| invalid(e.to_string()))?;
        }
        let tokens = input.prompt.tokens.iter().filter(|&&t| t == config.image_token_id).count();
        if tokens != features {
            return Err(EngineError::ImageTokens { group: input.id.clone(), tokens, features });
        }
        let rows: i64 = input.prompt.grids.iter().map(|g| g.iter().product::<i64>()).sum();
        let expected = rows * config.vision.patch_len();
        if input.patches.len() as i64 != expected {
            return Err(invalid(format!("{} patch values, but the grids require {expected}", input.patches.len())));
        }
        if !input.hashes.is_empty() && input.hashes.len() != input.prompt.grids.len() {
            return Err(invalid(format!("{} hashes for {} images", input.hashes.len(), input.prompt.grids.len())));
        }
        let prompt = input.prompt.tokens.len();
        let context = config.text.max_position_embeddings.max(0) as usize;
        if prompt + new > context {
            return Err(EngineError::Context { group: input.id.clone(), prompt, images: features, new, context });
        }
        Ok(features)
    }
}

impl<V: BorrowMut<Vlm>> Engine<V> {
    /// Loads weights in place: all parameters by name, with the model's shapes. Their version is `version`. Running groups continue:
    /// their KV caches are recomputed with the new weights, so that each token's log-probability is that of its version; with
    /// [`EngineOptions::keep_cache`] they stay as they are.
    ///
    /// # Errors
    /// Returns [`EngineError::Model`] if a name or shape does not match; the model is unchanged then. After any other error the weights
    /// may be mixed: load again before generating.
    pub fn load_weights(&mut self, version: WeightVersion, named: &[(String, Tensor)]) -> Result<()> {
        self.vlm.borrow_mut().load_state(named)?;
        self.merger.forget(|_| true);
        self.images.clear();
        self.change_version(version)
    }

    /// Loads some parameters in place, and keeps the others; see [`Engine::load_weights`].
    ///
    /// # Errors
    /// See [`Engine::load_weights`].
    pub fn load_partial_weights(&mut self, version: WeightVersion, named: &[(String, Tensor)]) -> Result<()> {
        self.vlm.borrow_mut().load_partial(named)?;
        self.merger.forget(|weight| named.iter().any(|(name, _)| name == weight));
        if named.iter().any(|(name, _)| name.starts_with(VISION_PREFIX)) {
            self.images.clear();
        }
        self.change_version(version)
    }

    /// Loads weights with adapters (`LAYER.lora_A.weight`, `LAYER.lora_B.weight`, scaled by `scale`), which are merged into the original
    /// weights; see [`Engine::load_weights`]. `base` has all parameters; `None` keeps those of the last load. The engine keeps a copy of
    /// the original matrices.
    ///
    /// # Errors
    /// See [`Engine::load_weights`].
    pub fn load_with_adapters(
        &mut self,
        version: WeightVersion,
        base: Option<&[(String, Tensor)]>,
        adapters: &[(String, Tensor)],
        scale: f64,
    ) -> Result<()> {
        let vlm = self.vlm.borrow_mut();
        AdapterMerger::check(vlm, adapters, scale)?;
        if let Some(base) = base {
            vlm.load_state(base)?;
            self.merger.forget(|_| true);
        }
        self.merger.merge(vlm, adapters, scale)?;
        if base.is_some() || adapters.iter().any(|(name, _)| name.starts_with(VISION_PREFIX)) {
            self.images.clear();
        }
        self.change_version(version)
    }
}

/// Copies a tensor to a flat host vector of f32.
pub(crate) fn to_host(t: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::<f32>::try_from(t.f_to_kind(Kind::Float)?.f_contiguous()?.f_view(-1)?)?)
}
