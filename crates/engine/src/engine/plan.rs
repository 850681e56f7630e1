//! The memory plan: computes, before anything runs, how much memory a group needs and how many groups fit.

use std::borrow::Borrow;

use unveil_model::{AttentionSet, Vlm};
use unveil_plan::{GenerationMemory, GroupSize, Numerics, USABLE_FRACTION};
use unveil_torch_ext::free_memory;

use crate::{Engine, EngineError, Result};

/// Memory of a batch of groups, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachePlan {
    /// Available for caches and activations.
    pub available: u64,
    /// KV cache of one group (its prompt once, and its responses), with its logits.
    pub per_group: u64,
    /// Activations of the largest forward pass.
    pub activations: u64,
    /// Number of groups that run at a time.
    pub slots: usize,
}

/// Maximum sizes over the groups of a batch, which a plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MaxSizes {
    /// Responses per group.
    pub n: usize,
    /// Prompt tokens.
    pub prompt: usize,
    /// Image tokens per prompt.
    pub images: usize,
    /// Response tokens.
    pub response: usize,
}

impl MaxSizes {
    fn group(&self) -> GroupSize {
        GroupSize {
            n: self.n as u64,
            prompt: self.prompt as u64,
            images: self.images as u64,
            response: self.response as u64,
        }
    }
}

impl<V: Borrow<Vlm>> Engine<V> {
    /// Plans how many groups of these sizes run at a time. Errors name group `id`.
    ///
    /// # Errors
    /// Returns [`EngineError::Memory`] if not even one group fits.
    pub fn plan_memory(&self, id: &str, max: &MaxSizes) -> Result<CachePlan> {
        let vlm = self.vlm.borrow();
        let free = || free_memory(vlm.device()).map_or(u64::MAX, |free| (free as f64 * USABLE_FRACTION) as u64);
        let available = self.options.memory_limit.unwrap_or_else(|| free().saturating_add(self.cache_bytes()));
        let captured_layers = self.options.capture.as_ref().map_or(0, AttentionSet::layer_count) as u64;
        let float = size_of::<f32>() as u64;
        let numerics = Numerics {
            weight: vlm.kind().elt_size_in_bytes() as u64,
            activation: float,
            operand: float,
            cache: vlm.cache_kind().elt_size_in_bytes() as u64,
            keeps_normalised: false,
        };
        let prefill_tokens = self.options.prefill_tokens as u64;
        let memory =
            GenerationMemory::of(&vlm.config().shape(), &max.group(), &numerics, captured_layers, prefill_tokens);
        let per_group = memory.kv_per_group + memory.logits_per_group;
        let activations = memory.prefill;
        let slots = memory.slots(available, self.options.max_rows as u64, max.n as u64) as usize;
        if slots > 0 {
            return Ok(CachePlan { available, per_group, activations, slots });
        }
        Err(EngineError::Memory {
            group: id.to_owned(),
            needed: activations + per_group,
            available,
            n: max.n,
            prompt: max.prompt,
            new: max.response,
        })
    }
}
