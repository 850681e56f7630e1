//! The memory plan: computes, before anything runs, how much memory a group needs and how many groups fit.

use std::borrow::Borrow;

use unveil_model::{AttentionSet, CacheShape, GroupCache, Vlm};
use unveil_torch_ext::free_memory;

use crate::{Engine, EngineError, Result};

/// Share of the free memory to use without a configured limit: the allocator needs a reserve.
const USABLE_FRACTION: f64 = 0.9;

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

impl<V: Borrow<Vlm>> Engine<V> {
    /// Plans how many groups of these sizes run at a time. Errors name group `id`.
    ///
    /// # Errors
    /// Returns [`EngineError::Memory`] if not even one group fits.
    pub fn plan_memory(&self, id: &str, max: &MaxSizes) -> Result<CachePlan> {
        let vlm = self.vlm.borrow();
        let free = || free_memory(vlm.device()).map_or(u64::MAX, |free| (free as f64 * USABLE_FRACTION) as u64);
        let available = self.options.memory_limit.unwrap_or_else(|| free().saturating_add(self.cache_bytes()));
        let c = &vlm.config().text;
        let float = size_of::<f32>() as u64;
        let positive = |v: i64| v.max(0) as u64;
        // Values per token of a prefill: residual, norm, queries, keys and values, and the MLP's intermediate activations. The keys
        // and values of all layers are kept until they are copied into the cache.
        let activations_per_token = 4 * positive(c.hidden_size)
            + positive(c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads))
            + 3 * positive(c.intermediate_size);
        let kv_per_token = c.num_hidden_layers as u64 * 2 * positive(c.head_dim * c.num_key_value_heads);
        let prefill_tokens = self.options.prefill_tokens.max(max.prompt) as u64;
        let activations = (activations_per_token + kv_per_token) * prefill_tokens * float;
        let logits = 4 * positive(c.vocab_size) * max.n as u64 * float;
        let shape = CacheShape { slots: 1, n: max.n, prompt: max.prompt, response: max.response, images: 0 };
        // Captured layers have a separate copy of the image tokens' keys.
        let layers = self.options.capture.as_ref().map_or(0, AttentionSet::layer_count) as u64;
        let captured = layers * positive(c.head_dim * c.num_key_value_heads) * max.images as u64 * float;
        let per_group = GroupCache::bytes(c, &shape) + logits + captured;
        let fitting = available.saturating_sub(activations) / per_group.max(1);
        let slots = fitting.min((self.options.max_rows / max.n.max(1)).max(1) as u64) as usize;
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
