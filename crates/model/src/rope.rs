//! Multimodal rotary positions: which (temporal, height, width) position every token has, and the tables that a
//! position gives. Source: the Qwen2-VL report (arXiv 2409.12191, section 2.1), as the Hugging Face code numbers them.

use tch::{Device, Kind, Tensor};

use crate::ops::inverse_frequencies;
use crate::{GridThw, ModelError, Result, TextConfig, VlmConfig};

/// Positions of a token sequence with images, and the position that the next text token takes.
///
/// Text counts up on all three axes; an image's tokens take (start + t, start + row, start + column), and the text
/// after it goes on at start + max(rows, columns). Errors: placeholders and grids do not fit.
pub fn rope_positions(tokens: &[u32], grids: &[GridThw], config: &VlmConfig) -> Result<(Vec<[i64; 3]>, i64)> {
    let counts = grids.iter().map(|g| config.merged_tokens(*g)).collect::<Result<Vec<_>>>()?;
    let placeholders = tokens.iter().filter(|t| **t == config.image_token_id).count();
    let features: usize = counts.iter().sum();
    if placeholders != features {
        return Err(ModelError::ImageTokens { tokens: placeholders as i64, features: features as i64 });
    }
    if tokens.contains(&config.video_token_id) {
        return Err(ModelError::input("video tokens are not supported in prompts"));
    }
    let m = config.vision.spatial_merge_size;
    let mut positions: Vec<[i64; 3]> = Vec::with_capacity(tokens.len());
    let (mut next, mut image) = (0i64, 0usize);
    while positions.len() < tokens.len() {
        if tokens[positions.len()] != config.image_token_id {
            positions.push([next; 3]);
            next += 1;
            continue;
        }
        // The totals are equal, so an image is left; its run may still be cut by text.
        let [t, h, w] = grids[image];
        let at = positions.len();
        if tokens.get(at..at + counts[image]).is_none_or(|run| run.iter().any(|id| *id != config.image_token_id)) {
            return Err(ModelError::input(format!(
                "image {image} of the prompt needs {} image tokens in a row at position {at}",
                counts[image]
            )));
        }
        let (rows, cols) = (h / m, w / m);
        for f in 0..t {
            for r in 0..rows {
                positions.extend((0..cols).map(|c| [next + f, next + r, next + c]));
            }
        }
        next += rows.max(cols);
        image += 1;
    }
    let last = positions.iter().flatten().max().map_or(0, |p| p + 1);
    Ok((positions, last))
}

/// Turns positions into rotary tables.
pub(crate) struct Rotary {
    frequencies: Tensor,
    /// The axis that each frequency follows `[head_dim/2]`.
    axis: Tensor,
}

impl Rotary {
    pub(crate) fn new(config: &TextConfig, device: Device) -> Self {
        let frequencies =
            Tensor::from_slice(&inverse_frequencies(config.rope_theta, config.head_dim)).to_device(device);
        Self { frequencies, axis: Tensor::from_slice(&axes(config)).to_device(device) }
    }

    /// Half-dimension cosines and sines `[.., head_dim/2]`, fp32, for positions `[3, ..]`.
    pub(crate) fn tables(&self, positions: &Tensor) -> (Tensor, Tensor) {
        let by_frequency = positions.to_kind(Kind::Float).index_select(0, &self.axis).movedim_int(0, -1);
        let angles = by_frequency * &self.frequencies;
        (angles.cos(), angles.sin())
    }

    /// The same for positions `[..]` that are equal on all axes, as those of response tokens are.
    pub(crate) fn tables_of_text(&self, positions: &Tensor) -> (Tensor, Tensor) {
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * &self.frequencies;
        (angles.cos(), angles.sin())
    }
}

/// Which axis each frequency follows: one block of frequencies per axis, or the axes in turns for as long as the height's
/// and the width's sections last, the rest being temporal.
fn axes(config: &TextConfig) -> Vec<i64> {
    let section = config.mrope_section;
    if !config.mrope_interleaved {
        return (0i64..3).zip(section).flat_map(|(axis, len)| std::iter::repeat_n(axis, len.max(0) as usize)).collect();
    }
    (0..config.head_dim / 2)
        .map(|k| match k % 3 {
            1 if k < section[1] * 3 => 1,
            2 if k < section[2] * 3 => 2,
            _ => 0,
        })
        .collect()
}
