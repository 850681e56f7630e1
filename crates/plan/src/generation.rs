//! Memory of generation: KV cache, prefill and logits of groups that run at a time.

use crate::activations::Numerics;
use crate::shape::ModelShape;

/// Share of the free memory that a worker uses without a configured limit: the allocator needs a reserve.
pub const USABLE_FRACTION: f64 = 0.9;

/// Largest sizes of the groups of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GroupSize {
    /// Responses per group.
    pub n: u64,
    /// Prompt tokens.
    pub prompt: u64,
    /// Image tokens per prompt.
    pub images: u64,
    /// Tokens per response.
    pub response: u64,
}

/// Bytes that generation needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GenerationMemory {
    /// KV cache of one group: its prompt once, each response, and a second copy of captured image keys.
    pub kv_per_group: u64,
    /// Logits of one group's rows.
    pub logits_per_group: u64,
    /// Activations of the largest prefill.
    pub prefill: u64,
}

impl GenerationMemory {
    /// Computes the memory for groups of this size; `captured_layers` are those whose attention is read, and a pass prefills at most
    /// `prefill_tokens` tokens, or one prompt.
    pub fn of(shape: &ModelShape, size: &GroupSize, n: &Numerics, captured_layers: u64, prefill_tokens: u64) -> Self {
        let kv_width = shape.head_dim * shape.kv_heads;
        // Residual, norm, queries, keys and values, and the MLP's inner values. The keys and values of all layers are kept until they are
        // copied into the cache.
        let per_token =
            4 * shape.hidden + shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) + 3 * shape.intermediate;
        let captured = captured_layers * kv_width * size.images;
        Self {
            kv_per_group: kv_bytes(shape, 1, size, n.cache) + captured * n.cache,
            logits_per_group: 4 * shape.vocab * size.n * n.activation,
            prefill: (per_token * n.activation + shape.kv_values() * n.cache) * prefill_tokens.max(size.prompt),
        }
    }

    /// Returns how many groups run at a time within `available` bytes, with at most `max_rows` responses (one group may exceed it).
    pub fn slots(&self, available: u64, max_rows: u64, n: u64) -> u64 {
        let per_group = (self.kv_per_group + self.logits_per_group).max(1);
        (available.saturating_sub(self.prefill) / per_group).min((max_rows / n.max(1)).max(1))
    }

    /// Returns the bytes that `slots` groups need.
    pub fn total(&self, slots: u64) -> u64 {
        self.prefill + slots * (self.kv_per_group + self.logits_per_group)
    }
}

/// Returns the bytes of the KV caches of `slots` groups with `value_bytes` per key or value.
pub fn kv_bytes(shape: &ModelShape, slots: u64, size: &GroupSize, value_bytes: u64) -> u64 {
    shape.kv_values() * slots * (size.prompt + size.n * size.response) * value_bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::shape_7b;

    const FP32: Numerics = Numerics { weight: 4, activation: 4, operand: 4, cache: 4, keeps_normalised: true };

    #[test]
    fn cache_holds_a_prompt_once_and_each_response() {
        let shape = shape_7b();
        let size = GroupSize { n: 8, prompt: 1400, images: 1280, response: 256 };
        // 2 x 4 heads x 128 values in each of 28 layers.
        assert_eq!(kv_bytes(&shape, 3, &size, 4), 3 * 28 * 1024 * (1400 + 8 * 256) * 4);
        let memory = GenerationMemory::of(&shape, &size, &FP32, 2, 8192);
        assert_eq!(memory.kv_per_group, 28 * 1024 * (1400 + 8 * 256) * 4 + 2 * 512 * 1280 * 4);
        assert_eq!(memory.logits_per_group, 4 * 152_064 * 8 * 4);
    }

    #[test]
    fn slots_are_limited_by_memory_and_rows() {
        let memory = GenerationMemory { kv_per_group: 90, logits_per_group: 10, prefill: 50 };
        assert_eq!(memory.slots(1050, 1000, 8), 10);
        assert_eq!(memory.slots(1049, 1000, 8), 9);
        assert_eq!(memory.slots(1050, 24, 8), 3);
        assert_eq!(memory.slots(1050, 4, 8), 1);
        assert_eq!(memory.slots(149, 1000, 8), 0);
        assert_eq!(memory.total(3), 350);
    }

    #[test]
    fn prefill_takes_at_least_one_prompt() {
        let shape = shape_7b();
        let at = |prompt: u64| {
            let size = GroupSize { n: 1, prompt, images: 0, response: 1 };
            GenerationMemory::of(&shape, &size, &FP32, 0, 4096).prefill
        };
        assert_eq!(at(100), at(4096));
        assert_eq!(at(8192), 2 * at(4096));
    }
}
