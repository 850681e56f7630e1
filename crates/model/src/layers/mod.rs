//! Attention, linear layers, rotary positions and tensor operations that decoder, vision tower and caches share.

pub(crate) mod attention;
pub(crate) mod dropout;
pub(crate) mod linear;
pub(crate) mod ops;
pub(crate) mod rope;
