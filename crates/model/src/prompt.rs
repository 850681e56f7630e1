//! Prompts.

use crate::GridThw;

/// A prompt: token ids and image grids.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    /// Token ids, one image placeholder per merged image token.
    pub tokens: Vec<u32>,
    /// Grids of the images, in order.
    pub grids: Vec<GridThw>,
}
