//! Low-rank adapters: specification and tensors, and files in peft's format.

pub(crate) mod lora;
pub(crate) mod modules;
pub(crate) mod peft;
