//! The engine: a model, its options, the version of its weights, and what is checked before a step.

use std::borrow::{Borrow, BorrowMut};

use tch::{Kind, Tensor};
use unveil_core::WeightVersion;
use unveil_model::Vlm;

use crate::request::GroupInput;
use crate::{EngineError, Result};

/// What an engine does besides sampling.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Responses decoded at once; groups beyond wait until others have finished.
    pub max_rows: usize,
    /// Groups prefilled or scored in one forward pass.
    pub prefill_groups: usize,
    /// Decoder layer whose attention over the image tokens is returned; none = no attention.
    pub capture_layer: Option<usize>,
    /// Token ids that are never sampled, besides the model's vision tokens.
    pub banned: Vec<u32>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_rows: 256, prefill_groups: 16, capture_layer: None, banned: Vec::new() }
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
    /// Tokens sampled.
    pub tokens: u64,
}

/// Generates and scores groups with a model that it owns (`Engine<Vlm>`) or borrows (`Engine<&Vlm>`).
///
/// One thread owns it. Weights can change only between calls, so a response is made by one version.
pub struct Engine<V = Vlm> {
    pub(crate) vlm: V,
    pub(crate) options: EngineOptions,
    pub(crate) banned: Vec<u32>,
    pub(crate) version: WeightVersion,
    pub(crate) stats: Stats,
}

impl<V: Borrow<Vlm>> Engine<V> {
    /// An engine around `vlm`, whose weights count as version 0. Errors when `capture_layer` is not a layer of the model.
    pub fn new(vlm: V, options: EngineOptions) -> Result<Self> {
        let config = vlm.borrow().config();
        let layers = config.text.num_hidden_layers;
        if let Some(layer) = options.capture_layer.filter(|l| *l >= layers) {
            return Err(EngineError::request(
                "*",
                format!("layer {layer} is to be captured, the model has {layers} (0-based)"),
            ));
        }
        let mut banned = options.banned.clone();
        banned.extend([
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        ]);
        banned.retain(|&id| i64::from(id) < config.text.vocab_size);
        banned.sort_unstable();
        banned.dedup();
        Ok(Self { vlm, options, banned, version: 0, stats: Stats::default() })
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

    /// Layer that is captured.
    pub fn capture_layer(&self) -> Option<usize> {
        self.options.capture_layer
    }

    /// Checks a prompt against its image and the context, `new` tokens included. Returns its image tokens.
    pub(crate) fn check(&self, input: &GroupInput, new: usize) -> Result<usize> {
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
        let (prompt, context) = (input.prompt.tokens.len(), config.text.max_position_embeddings.max(0) as usize);
        if prompt + new > context {
            return Err(EngineError::Context { group: input.id.clone(), prompt, new, context });
        }
        Ok(features)
    }

    /// Image features of several prompts in one pass; none when there is no image.
    pub(crate) fn encode<'a>(&mut self, inputs: impl Iterator<Item = &'a GroupInput>) -> Result<Option<Tensor>> {
        let (mut values, mut grids) = (Vec::new(), Vec::new());
        for input in inputs {
            values.extend_from_slice(&input.patches);
            grids.extend_from_slice(&input.prompt.grids);
        }
        if grids.is_empty() {
            return Ok(None);
        }
        let vlm = self.vlm.borrow();
        let pixels = Tensor::f_from_slice(&values)?
            .f_view([-1, vlm.config().vision.patch_len()])?
            .f_to_device(vlm.device())?
            .f_to_kind(vlm.kind())?;
        let features = vlm.encode_images(&pixels, &grids)?;
        self.stats.images_encoded += grids.len() as u64;
        Ok(Some(features))
    }
}

impl<V: BorrowMut<Vlm>> Engine<V> {
    /// Takes over weights in place: all parameters by name, with the model's shapes. They are `version` from here on.
    /// After an error the model may hold a mixture: load again before generating.
    pub fn load_weights(&mut self, version: WeightVersion, named: &[(String, Tensor)]) -> Result<()> {
        self.vlm.borrow_mut().load_state(named)?;
        self.version = version;
        Ok(())
    }
}

/// Device values as a flat host vector of f32.
pub(crate) fn host(t: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::<f32>::try_from(t.f_to_kind(Kind::Float)?.f_contiguous()?.f_view(-1)?)?)
}
