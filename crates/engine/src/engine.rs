//! The engine: a model, its options, the requests that wait and the batch that runs, the version of the weights, and what
//! is checked before a step.

use std::borrow::{Borrow, BorrowMut};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Kind, Tensor};
use unveil_core::WeightVersion;
use unveil_model::{AttentionSet, Merger, Vlm};

use crate::batch::Batch;
use crate::images::ImageCache;
use crate::request::{GroupInput, GroupOutput, GroupRequest};
use crate::{EngineError, Result};

/// Names of the vision tower's parameters begin so; image features depend on no others.
const VISION: &str = "visual.";

/// What an engine does besides sampling.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Responses decoded at once; groups beyond wait until others have finished.
    pub max_rows: usize,
    /// Tokens (prompts padded to the longest) prefilled or scored in one forward pass; one group always runs.
    pub prefill_tokens: usize,
    /// Layers and heads whose attention over the image tokens is returned; none = no attention.
    pub capture: Option<AttentionSet>,
    /// Token ids that are never sampled, besides the model's vision tokens.
    pub banned: Vec<u32>,
    /// Bytes that caches and work may take; none = what is free, with a reserve.
    pub memory: Option<u64>,
    /// Steps take all rows in shapes that repeat, whatever has ended; always so on a GPU, where they are recorded as graphs.
    pub steady: bool,
    /// Bytes of image features that are kept for images that come again.
    pub image_memory: u64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_rows: 256,
            prefill_tokens: 8192,
            capture: None,
            banned: Vec::new(),
            memory: None,
            steady: false,
            image_memory: 256 << 20,
        }
    }
}

/// Counters since the engine was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Images that went through the vision tower.
    pub images_encoded: u64,
    /// Prompts prefilled.
    pub prompts_prefilled: u64,
    /// Decode steps (all rows at once).
    pub decode_steps: u64,
    /// Decode steps that ran as recorded GPU graphs.
    pub graph_steps: u64,
    /// Tokens fed in decode steps; those of responses that had ended are not among them.
    pub tokens_fed: u64,
    /// Tokens sampled.
    pub tokens: u64,
    /// Groups whose caches were made again because weights were swapped under them.
    pub groups_refilled: u64,
}

/// Names a submitted group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// A group that waits.
pub(crate) struct Waiting {
    pub ticket: Ticket,
    pub request: GroupRequest,
}

/// Generates and scores groups with a model that it owns (`Engine<Vlm>`) or borrows (`Engine<&Vlm>`).
///
/// One thread owns it. [`Engine::generate`] runs given groups to their end; [`Engine::submit`], [`Engine::step`] and
/// [`Engine::cancel`] run a stream of groups, between whose steps weights may change.
pub struct Engine<V = Vlm> {
    pub(crate) vlm: V,
    pub(crate) options: EngineOptions,
    pub(crate) banned: Vec<u32>,
    pub(crate) ends: Vec<u32>,
    pub(crate) version: WeightVersion,
    pub(crate) stats: Stats,
    pub(crate) images: ImageCache,
    pub(crate) waiting: VecDeque<Waiting>,
    pub(crate) batch: Option<Batch>,
    pub(crate) graph_fault: Option<String>,
    /// What matrices were before adapters were merged into them.
    merger: Merger,
    next_ticket: u64,
}

impl<V: Borrow<Vlm>> Engine<V> {
    /// An engine around `vlm`, whose weights count as version 0. Errors when the model does not have the layers and heads
    /// that are to be captured.
    pub fn new(vlm: V, options: EngineOptions) -> Result<Self> {
        let config = vlm.borrow().config();
        if let Some(set) = &options.capture {
            set.check(&config.text)?;
        }
        let mut banned = options.banned.clone();
        banned.extend([
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        ]);
        // Rows of the embedding that no token has are never trained: they would be noise.
        banned.retain(|&id| i64::from(id) < config.text.vocab_size);
        banned.sort_unstable();
        banned.dedup();
        Ok(Self {
            ends: config.eos_token_ids(),
            images: ImageCache::new(options.image_memory),
            vlm,
            options,
            banned,
            version: 0,
            stats: Stats::default(),
            waiting: VecDeque::new(),
            batch: None,
            graph_fault: None,
            merger: Merger::default(),
            next_ticket: 0,
        })
    }

    /// The model.
    pub fn vlm(&self) -> &Vlm {
        self.vlm.borrow()
    }

    /// Token ids that are never sampled, sorted. The learner must leave out the same ones.
    pub fn banned(&self) -> &[u32] {
        &self.banned
    }

    /// Version of the weights.
    pub fn version(&self) -> WeightVersion {
        self.version
    }

    /// Says which version the present weights are.
    pub fn set_version(&mut self, version: WeightVersion) {
        self.version = version;
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Why the newest decode step could not be recorded as a GPU graph, if so: steps run one operation after another until a later try
    /// succeeds.
    pub fn graph_fault(&self) -> Option<&str> {
        self.graph_fault.as_deref()
    }

    pub(crate) fn steady(&self) -> bool {
        self.options.steady || self.vlm().device().is_cuda()
    }

    /// Layers and heads that are captured.
    pub fn capture(&self) -> Option<&AttentionSet> {
        self.options.capture.as_ref()
    }

    /// Bytes of keys and values held at present.
    pub fn cache_bytes(&self) -> u64 {
        self.batch.as_ref().map_or(0, |b| b.bytes(&self.vlm.borrow().config().text))
    }

    /// Whether nothing runs and nothing waits.
    pub fn idle(&self) -> bool {
        self.batch.is_none() && self.waiting.is_empty()
    }

    /// Takes a group in; [`Engine::step`] gives it back when it is done.
    ///
    /// # Errors
    /// The group cannot run; the message names it. Nothing has changed then.
    pub fn submit(&mut self, request: GroupRequest) -> Result<Ticket> {
        self.check_request(&request)?;
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.waiting.push_back(Waiting { ticket, request });
        Ok(ticket)
    }

    /// Ends a group at once: its responses so far, marked [`unveil_core::Finish::Cancelled`] where they had not ended. Its
    /// memory is free for others. None for a group that is not here any more.
    pub fn cancel(&mut self, ticket: Ticket) -> Option<GroupOutput> {
        if let Some(at) = self.waiting.iter().position(|w| w.ticket == ticket) {
            return self.waiting.remove(at).map(|w| GroupOutput::nothing(w.request.sampling.n));
        }
        let batch = self.batch.as_mut()?;
        let out = batch.cancel(ticket);
        if batch.is_empty() {
            self.batch = None;
        }
        out
    }

    /// Generates the responses of every group, in the order of `requests`.
    ///
    /// Each image is encoded once and each prompt prefilled once. When `cancel` becomes true, what is under way ends with
    /// [`unveil_core::Finish::Cancelled`] after the present step, and groups that wait end with no tokens.
    ///
    /// Errors before any step when a request cannot run; the message names the group.
    pub fn generate(&mut self, requests: &[GroupRequest], cancel: Option<&AtomicBool>) -> Result<Vec<GroupOutput>> {
        requests.iter().try_for_each(|r| self.check_request(r))?;
        if !self.idle() {
            return Err(EngineError::request(
                "*",
                "the engine is in the middle of other groups: step it to their end first",
            ));
        }
        let tickets = requests.iter().map(|r| self.submit(r.clone())).collect::<Result<Vec<_>>>()?;
        let mut done: std::collections::HashMap<Ticket, GroupOutput> = std::collections::HashMap::new();
        while !self.idle() {
            if cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
                done.extend(tickets.iter().filter_map(|t| self.cancel(*t).map(|out| (*t, out))));
                break;
            }
            done.extend(self.step()?);
        }
        let out = tickets.iter().zip(requests);
        Ok(out.map(|(t, r)| done.remove(t).unwrap_or_else(|| GroupOutput::nothing(r.sampling.n))).collect())
    }

    fn check_request(&self, r: &GroupRequest) -> Result<()> {
        let images = self.check(&r.input, r.sampling.max_new_tokens)?;
        let s = &r.sampling;
        let refuse = |m: String| Err(EngineError::request(&r.input.id, m));
        if s.n == 0 || s.max_new_tokens == 0 {
            return refuse("n and max_new_tokens must be at least 1".into());
        }
        if !(s.temperature >= 0.0 && s.temperature.is_finite()) {
            return refuse(format!("temperature {} must be 0 or more", s.temperature));
        }
        if !(s.top_p > 0.0 && s.top_p <= 1.0) {
            return refuse(format!("top_p {} must be above 0 and at most 1", s.top_p));
        }
        if !(0.0..=1.0).contains(&s.min_p) {
            return refuse(format!("min_p {} must be from 0 to 1", s.min_p));
        }
        let longest =
            crate::Longest { n: s.n, prompt: r.input.prompt.tokens.len(), images, response: s.max_new_tokens };
        self.plan(&r.input.id, &longest).map(|_| ())
    }

    /// Checks a prompt against its image and the context, `new` tokens included. Returns its image tokens.
    ///
    /// # Errors
    /// Why it does not fit; the message names the group.
    pub fn check(&self, input: &GroupInput, new: usize) -> Result<usize> {
        let config = self.vlm().config();
        let refuse = |m: String| EngineError::request(&input.id, m);
        if input.prompt.tokens.is_empty() {
            return Err(refuse("the prompt has no tokens".into()));
        }
        let vocab = config.text.vocab_size;
        if let Some(id) = input.prompt.tokens.iter().find(|&&t| i64::from(t) >= vocab) {
            return Err(refuse(format!(
                "token id {id} is outside the model's vocabulary of {vocab}: tokenizer and model do not belong together"
            )));
        }
        let mut features = 0;
        for grid in &input.prompt.grids {
            features += config.merged_tokens(*grid).map_err(|e| refuse(e.to_string()))?;
        }
        let tokens = input.prompt.tokens.iter().filter(|&&t| t == config.image_token_id).count();
        if tokens != features {
            return Err(EngineError::ImageTokens { group: input.id.clone(), tokens, features });
        }
        let rows: i64 = input.prompt.grids.iter().map(|g| g.iter().product::<i64>()).sum();
        let expected = rows * config.vision.patch_len();
        if input.patches.len() as i64 != expected {
            return Err(refuse(format!("{} patch values where {expected} are needed", input.patches.len())));
        }
        if !input.hashes.is_empty() && input.hashes.len() != input.prompt.grids.len() {
            return Err(refuse(format!("{} hashes for {} images", input.hashes.len(), input.prompt.grids.len())));
        }
        let (prompt, context) = (input.prompt.tokens.len(), config.text.max_position_embeddings.max(0) as usize);
        if prompt + new > context {
            return Err(EngineError::Context { group: input.id.clone(), prompt, images: features, new, context });
        }
        Ok(features)
    }
}

impl<V: BorrowMut<Vlm>> Engine<V> {
    /// Takes over weights in place: all parameters by name, with the model's shapes. They are `version` from here on. Groups
    /// under way go on: the keys and values of what they hold are made again with the new weights, so that each token's
    /// log-probability is that of its version.
    ///
    /// # Errors
    /// A name or shape does not fit: nothing has changed. After any other error the model may hold a mixture: load again
    /// before generating.
    pub fn load_weights(&mut self, version: WeightVersion, named: &[(String, Tensor)]) -> Result<()> {
        self.vlm.borrow_mut().load_state(named)?;
        self.merger.forget(|_| true);
        self.images.clear();
        self.version = version;
        self.refill()
    }

    /// [`Engine::load_weights`] for the parameters that differ from the present ones; the others stay.
    ///
    /// # Errors
    /// As there.
    pub fn load_changed(&mut self, version: WeightVersion, named: &[(String, Tensor)]) -> Result<()> {
        self.vlm.borrow_mut().load_some(named)?;
        self.merger.forget(|weight| named.iter().any(|(name, _)| name == weight));
        if named.iter().any(|(name, _)| name.starts_with(VISION)) {
            self.images.clear();
        }
        self.version = version;
        self.refill()
    }

    /// [`Engine::load_weights`] where adapters (`LAYER.lora_A.weight`, `LAYER.lora_B.weight`, times `scale`) lie beside the weights:
    /// groups are generated with both merged, from the weights as they were loaded. `base` has all parameters; with none those of the
    /// last load stay. A copy of the adapted matrices is kept beside the model.
    ///
    /// # Errors
    /// As there.
    pub fn load_adapted(
        &mut self,
        version: WeightVersion,
        base: Option<&[(String, Tensor)]>,
        adapters: &[(String, Tensor)],
        scale: f64,
    ) -> Result<()> {
        let vlm = self.vlm.borrow_mut();
        Merger::check(vlm, adapters, scale)?;
        if let Some(base) = base {
            vlm.load_state(base)?;
            self.merger.forget(|_| true);
        }
        self.merger.merge(vlm, adapters, scale)?;
        if base.is_some() || adapters.iter().any(|(name, _)| name.starts_with(VISION)) {
            self.images.clear();
        }
        self.version = version;
        self.refill()
    }
}

/// Device values as a flat host vector of f32.
pub(crate) fn host(t: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::<f32>::try_from(t.f_to_kind(Kind::Float)?.f_contiguous()?.f_view(-1)?)?)
}
