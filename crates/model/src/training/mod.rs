//! Training: packed groups and their attention, gradient checkpointing, value head.

pub(crate) mod packed;
pub(crate) mod packed_attention;
pub(crate) mod tape;
pub(crate) mod value_head;
