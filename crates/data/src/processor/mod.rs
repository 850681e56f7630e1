//! Image processors without Python: resize, normalise and cut an RGB image into the patches that a vision tower reads.
//!
//! Must not know: text, tokenizers, records. Equal to transformers' processor with its default (torchvision) backend.

mod config;
mod resize;

use std::path::Path;

use unveil_core::Grid;

pub use config::{ProcessorConfig, smart_resize};
pub use resize::{Filter, resize};

use crate::codec::Sizes;
use crate::prepare::PrepareError;
use crate::store::Image;

/// Turns images into patches by the settings of a model directory.
#[derive(Debug, Clone)]
pub struct ImageProcessor {
    config: ProcessorConfig,
    /// Normalised value of every level, per channel.
    levels: [[f32; 256]; 3],
}

/// One image, ready for the vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct Processed {
    /// `[t*h*w, patch_dim]`, row-major; patches in the order of transformers (merged cells row by row, patches within a cell row
    /// by row), values of a patch as channel, frame, row, column.
    pub patches: Vec<f32>,
    /// Values per patch: channels x frames x side x side.
    pub patch_dim: usize,
    /// Patches along time, height and width.
    pub grid_thw: [usize; 3],
    /// Image tokens: patches after merging.
    pub merged: Grid,
    /// Resized `(width, height)` in pixels.
    pub resized: (u32, u32),
    /// Original `(width, height)` in pixels.
    pub original: (u32, u32),
}

impl Processed {
    /// Original and resized size, as box codecs need them.
    pub fn sizes(&self) -> Sizes {
        Sizes { original: self.original, resized: self.resized }
    }

    /// Number of patches.
    pub fn n_patches(&self) -> usize {
        self.grid_thw.iter().product()
    }

    /// Number of image tokens.
    pub fn image_tokens(&self) -> usize {
        self.grid_thw[0] * self.merged.tokens()
    }
}

impl ImageProcessor {
    /// Reads the settings of a model directory.
    pub fn load(dir: &Path) -> Result<Self, PrepareError> {
        Ok(Self::new(ProcessorConfig::load(dir)?))
    }

    /// A processor with these settings.
    pub fn new(config: ProcessorConfig) -> Self {
        Self { levels: std::array::from_fn(|c| levels(&config, c)), config }
    }

    /// The settings.
    pub fn config(&self) -> &ProcessorConfig {
        &self.config
    }

    /// Size `(width, height)` that an image of size `(width, height)` is resized to.
    pub fn resized_size(&self, size: (u32, u32)) -> Result<(u32, u32), PrepareError> {
        self.config.resized_size(size)
    }

    /// Grid of image tokens of an image of size `(width, height)`.
    pub fn merged_grid(&self, size: (u32, u32)) -> Result<Grid, PrepareError> {
        let (w, h) = self.resized_size(size)?;
        let f = self.config.factor();
        Ok(Grid { rows: (h / f) as usize, cols: (w / f) as usize })
    }

    /// Resizes, normalises and cuts an image.
    pub fn process(&self, image: &Image) -> Result<Processed, PrepareError> {
        let original = (image.width(), image.height());
        let merged = self.merged_grid(original)?;
        let f = self.config.factor();
        let resized = (merged.cols as u32 * f, merged.rows as u32 * f);
        let patches = if resized == original {
            self.cut(image, merged)
        } else {
            self.cut(&resize(image, resized.0, resized.1, self.config.filter), merged)
        };
        let (p, t, m) = self.sides();
        Ok(Processed {
            patches,
            patch_dim: 3 * t * p * p,
            grid_thw: [1, merged.rows * m, merged.cols * m],
            merged,
            resized,
            original,
        })
    }

    /// Patch side, frames per patch, patches along a merged cell.
    fn sides(&self) -> (usize, usize, usize) {
        let c = &self.config;
        (c.patch_size as usize, c.temporal_patch_size as usize, c.merge_size as usize)
    }

    fn cut(&self, image: &Image, merged: Grid) -> Vec<f32> {
        let (p, t, m) = self.sides();
        let stride = image.width() as usize * 3;
        let mut out = Vec::with_capacity(image.rgb().len() * t);
        for cell in 0..merged.tokens() {
            let (row, col) = (cell / merged.cols * m, cell % merged.cols * m);
            for inner in 0..m * m {
                let (top, left) = ((row + inner / m) * p, (col + inner % m) * p);
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

/// Normalised values of the levels 0..=255 of one channel, with the roundings of transformers' fused form.
fn levels(config: &ProcessorConfig, channel: usize) -> [f32; 256] {
    let scale = if config.do_rescale { (1.0 / config.rescale_factor) as f32 } else { 1.0 };
    let (mean, std) = (config.image_mean[channel] as f32 * scale, config.image_std[channel] as f32 * scale);
    std::array::from_fn(|v| {
        let v = v as f32;
        match (config.do_normalize, config.do_rescale) {
            (true, _) => (v - mean) / std,
            (false, true) => v * config.rescale_factor as f32,
            (false, false) => v,
        }
    })
}
