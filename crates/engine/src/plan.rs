//! The memory plan: what a group takes, how many fit, and what to lower when none does. Counted before anything starts.

use std::borrow::Borrow;

use unveil_model::{AttentionSet, CacheShape, GroupCache, Vlm, free_memory};

use crate::{Engine, EngineError, Result};

/// Share of the free memory that is used where no limit is given: the allocator keeps some for itself.
const USABLE: f64 = 0.9;

/// What a batch of groups takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// May be used for caches and work.
    pub available: u64,
    /// Keys and values of one group: its prompt once, and its responses.
    pub per_group: u64,
    /// Activations of the largest pass, and logits.
    pub work: u64,
    /// Groups at a time.
    pub slots: usize,
}

/// The sizes that a plan depends on: the longest of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Longest {
    /// Responses per group.
    pub n: usize,
    /// Prompt tokens.
    pub prompt: usize,
    /// Image tokens of a prompt.
    pub images: usize,
    /// Response tokens.
    pub response: usize,
}

impl<V: Borrow<Vlm>> Engine<V> {
    /// How many groups of such sizes run at a time. `id` is named in the error.
    ///
    /// # Errors
    /// Not even one group fits; the message says what it takes, what there is, and what to lower.
    pub fn plan(&self, id: &str, longest: &Longest) -> Result<MemoryPlan> {
        let vlm = self.vlm.borrow();
        let free = || free_memory(vlm.device()).map_or(u64::MAX, |free| (free as f64 * USABLE) as u64);
        let available = self.options.memory.unwrap_or_else(|| free().saturating_add(self.cache_bytes()));
        let (c, float) = (&vlm.config().text, size_of::<f32>() as u64);
        let positive = |v: i64| v.max(0) as u64;
        // One pass over a prompt: residual, norm, queries, keys and values, and the widest of the MLP twice, per token; while a
        // layer's keys and values are kept until they are in the cache.
        let token = 4 * positive(c.hidden_size)
            + positive(c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads))
            + 3 * positive(c.intermediate_size);
        let kept = c.num_hidden_layers as u64 * 2 * positive(c.head_dim * c.num_key_value_heads);
        let prefill = (token + kept) * self.options.prefill_tokens.max(longest.prompt) as u64;
        let per_slot = |rows: usize| 4 * positive(c.vocab_size) * rows as u64;
        let shape =
            CacheShape { slots: 1, n: longest.n, prompt: longest.prompt, response: longest.response, images: 0 };
        // Captured layers keep the image tokens' keys apart.
        let layers = self.options.capture.as_ref().map_or(0, AttentionSet::layers) as u64;
        let captured = layers * positive(c.head_dim * c.num_key_value_heads) * longest.images as u64 * float;
        let per_group = GroupCache::bytes(c, &shape) + per_slot(longest.n) * float + captured;
        let work = prefill * float;
        let fit = available.saturating_sub(work) / per_group.max(1);
        let slots = fit.min((self.options.max_rows / longest.n.max(1)).max(1) as u64) as usize;
        if slots > 0 {
            return Ok(MemoryPlan { available, per_group, work, slots });
        }
        Err(EngineError::Memory {
            group: id.to_owned(),
            needed: work + per_group,
            available,
            n: longest.n,
            prompt: longest.prompt,
            new: longest.response,
        })
    }
}
