//! Multimodal rotary positions: the (temporal, height, width) position of every token, and the rotary tables. Source: the Qwen2-VL report
//! (arXiv 2409.12191, section 2.1), with positions numbered as in the Hugging Face code.

use tch::{Device, Kind, Tensor};
use unveil_core::GridThw;

use crate::layers::ops::inverse_frequencies;
use crate::{ModelError, Result, TextConfig, VlmConfig};

/// Returns the positions of a token sequence with images, and the position of the next text token.
///
/// Text counts up on all three axes. The tokens of an image have positions (start + t, start + row, start + column), and the text after
/// it continues at start + max(rows, columns).
///
/// # Errors
/// Returns [`ModelError::ImageTokens`] or [`ModelError::Input`] if placeholders and grids do not match.
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
    let mut next = 0i64;
    let mut image = 0usize;
    while positions.len() < tokens.len() {
        if tokens[positions.len()] != config.image_token_id {
            positions.push([next; 3]);
            next += 1;
            continue;
        }
        // The totals are equal, so an image is left; text may still interrupt its run of tokens.
        let [t, h, w] = grids[image];
        let start = positions.len();
        if tokens.get(start..start + counts[image]).is_none_or(|run| run.iter().any(|id| *id != config.image_token_id))
        {
            return Err(ModelError::input(format!(
                "image {image} of the prompt needs {} image tokens in a row at position {start}",
                counts[image]
            )));
        }
        let rows = h / m;
        let cols = w / m;
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

/// Computes rotary tables from positions.
#[derive(Debug)]
pub(crate) struct Rotary {
    frequencies: Tensor,
    /// Axis of each frequency `[head_dim/2]`.
    axis: Tensor,
}

impl Rotary {
    pub(crate) fn new(config: &TextConfig, device: Device) -> Self {
        let frequencies =
            Tensor::from_slice(&inverse_frequencies(config.rope_theta, config.head_dim)).to_device(device);
        Self { frequencies, axis: Tensor::from_slice(&axes(config)).to_device(device) }
    }

    /// Returns half-dimension cosines and sines `[.., head_dim/2]`, fp32, for positions `[3, ..]`.
    pub(crate) fn tables(&self, positions: &Tensor) -> (Tensor, Tensor) {
        let by_frequency = positions.to_kind(Kind::Float).index_select(0, &self.axis).movedim_int(0, -1);
        let angles = by_frequency * &self.frequencies;
        (angles.cos(), angles.sin())
    }

    /// Like [`Rotary::tables`] for positions `[..]` that are equal on all axes, such as those of response tokens.
    pub(crate) fn text_tables(&self, positions: &Tensor) -> (Tensor, Tensor) {
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * &self.frequencies;
        (angles.cos(), angles.sin())
    }
}

/// Returns the axis of each frequency: one block of frequencies per axis, or the axes interleaved for the length of the height and width
/// sections, and temporal for the rest.
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
