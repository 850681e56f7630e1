//! KV caches for generation: slots, the inputs of decode steps, and recorded CUDA graphs.

pub(crate) mod cache;
pub(crate) mod decode_slots;
pub(crate) mod decode_step;
mod graph;
