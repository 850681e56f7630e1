//! Prompts.

/// Image size in patches before merging: `[t, h, w]` (`image_grid_thw` of the Hugging Face processors).
pub type GridThw = [i64; 3];

/// A prompt: token ids and image grids.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    /// Token ids, one image placeholder per merged image token.
    pub tokens: Vec<u32>,
    /// Grids of the images, in order.
    pub grids: Vec<GridThw>,
}
