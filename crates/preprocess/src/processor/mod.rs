//! Image processing without Python: resizes and normalises an RGB image and cuts it into the patches that a vision tower reads.
//!
//! Results equal those of the transformers processor with its default (torchvision) backend.

mod config;
mod resize;

use std::path::Path;

use unveil_core::{Grid, GridThw};
use unveil_data::image_store::Image;

pub use config::{PixelBounds, ProcessorConfig, smart_resize};
pub use resize::{Filter, resize};

use crate::codec::Sizes;
use crate::preprocess_error::PreprocessError;

/// Converts images to patches with the settings of a model directory.
#[derive(Debug, Clone)]
pub struct ImageProcessor {
    config: ProcessorConfig,
    /// Normalised value of each of the 256 pixel values, per channel.
    levels: [[f32; 256]; 3],
}

/// One image as input to the vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct ProcessedImage {
    /// `[t*h*w, patch_dim]`, row-major; patches in the order of transformers (merged cells row by row, patches within a cell row
    /// by row), values of a patch as channel, frame, row, column.
    pub patches: Vec<f32>,
    /// Number of values per patch: channels x frames x side x side.
    pub patch_dim: usize,
    /// Patches along time, height and width.
    pub grid_thw: GridThw,
    /// Grid of image tokens, i.e. of patches after merging.
    pub merged: Grid,
    /// Resized `(width, height)` in pixels.
    pub resized: (u32, u32),
    /// Original `(width, height)` in pixels.
    pub original: (u32, u32),
}

impl ProcessedImage {
    /// Returns the original and resized sizes, as box codecs need them.
    pub fn sizes(&self) -> Sizes {
        Sizes { original: self.original, resized: self.resized }
    }

    /// Returns the number of patches.
    pub fn n_patches(&self) -> usize {
        self.grid_thw.iter().product::<i64>() as usize
    }

    /// Returns the number of image tokens.
    pub fn image_tokens(&self) -> usize {
        self.grid_thw[0] as usize * self.merged.tokens()
    }
}

impl ImageProcessor {
    /// Loads the settings of a model directory.
    pub fn load(dir: &Path) -> Result<Self, PreprocessError> {
        Ok(Self::new(ProcessorConfig::load(dir)?))
    }

    /// Creates a processor with these settings.
    pub fn new(config: ProcessorConfig) -> Self {
        Self { levels: std::array::from_fn(|c| levels(&config, c)), config }
    }

    /// Returns the settings.
    pub fn config(&self) -> &ProcessorConfig {
        &self.config
    }

    /// Returns the size `(width, height)` to which an image of size `(width, height)` is resized.
    pub fn resized_size(&self, size: (u32, u32)) -> Result<(u32, u32), PreprocessError> {
        self.config.resized_size(size)
    }

    /// Returns the grid of image tokens of an image of size `(width, height)`.
    pub fn merged_grid(&self, size: (u32, u32)) -> Result<Grid, PreprocessError> {
        let (w, h) = self.resized_size(size)?;
        let f = self.config.factor();
        Ok(Grid { rows: (h / f) as usize, cols: (w / f) as usize })
    }

    /// Resizes and normalises an image and cuts it into patches.
    pub fn process(&self, image: &Image) -> Result<ProcessedImage, PreprocessError> {
        let original = (image.width(), image.height());
        let merged = self.merged_grid(original)?;
        let f = self.config.factor();
        let resized = (merged.cols as u32 * f, merged.rows as u32 * f);
        let patches = if resized == original {
            self.patches(image, merged)
        } else {
            self.patches(&resize(image, resized.0, resized.1, self.config.filter), merged)
        };
        let (p, t, m) = self.sides();
        Ok(ProcessedImage {
            patches,
            patch_dim: 3 * t * p * p,
            grid_thw: [1, (merged.rows * m) as i64, (merged.cols * m) as i64],
            merged,
            resized,
            original,
        })
    }

    /// Returns patch side, frames per patch, and patches along one side of a merged cell.
    fn sides(&self) -> (usize, usize, usize) {
        let c = &self.config;
        (c.patch_size as usize, c.temporal_patch_size as usize, c.merge_size as usize)
    }

    fn patches(&self, image: &Image, merged: Grid) -> Vec<f32> {
        let (p, t, m) = self.sides();
        let stride = image.width() as usize * 3;
        let mut out = Vec::with_capacity(image.rgb().len() * t);
        for cell in 0..merged.tokens() {
            let row = cell / merged.cols * m;
            let col = cell % merged.cols * m;
            for inner in 0..m * m {
                let top = (row + inner / m) * p;
                let left = (col + inner % m) * p;
                for (c, levels) in self.levels.iter().enumerate() {
                    let start = out.len();
                    for y in top..top + p {
                        let line = &image.rgb()[y * stride + left * 3..][..p * 3];
                        out.extend(line.iter().skip(c).step_by(3).map(|v| levels[usize::from(*v)]));
                    }
                    for _ in 1..t {
                        out.extend_from_within(start..start + p * p);
                    }
                }
            }
        }
        out
    }
}

/// Returns the normalised values of 0..=255 in one channel, rounded as in the fused normalisation of transformers.
fn levels(config: &ProcessorConfig, channel: usize) -> [f32; 256] {
    let scale = if config.do_rescale { (1.0 / config.rescale_factor) as f32 } else { 1.0 };
    let mean = config.image_mean[channel] as f32 * scale;
    let std = config.image_std[channel] as f32 * scale;
    std::array::from_fn(|v| {
        let v = v as f32;
        match (config.do_normalize, config.do_rescale) {
            (true, _) => (v - mean) / std,
            (false, true) => v * config.rescale_factor as f32,
            (false, false) => v,
        }
    })
}
