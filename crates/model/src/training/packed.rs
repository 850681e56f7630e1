//! Packed groups: one sequence contains a prompt and all of its responses, attention separates the responses from each other, and positions
//! restart after the prompt for each response. A packed pass equals separate passes, but runs the prompt only once.

use std::ops::Range;

use tch::{Device, Kind, Tensor};
use unveil_core::Prompt;

use crate::layers::rope::rope_positions;
use crate::training::packed_attention::PackedAttention;
use crate::{ModelError, Result, VlmConfig};

/// A prompt and its responses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedGroup {
    /// The prompt, with image placeholders expanded.
    pub prompt: Prompt,
    /// Token ids of each response, at least one, including the end token if it was produced.
    pub responses: Vec<Vec<u32>>,
}

/// Groups as tensors, padded at the end to the longest. N is the number of all response tokens, in the order (group, response,
/// position).
#[derive(Debug)]
pub struct PackedBatch {
    /// Token ids `[B, L]`.
    pub tokens: Tensor,
    /// Rotary positions `[3, B, L]`.
    pub positions: Tensor,
    /// Attention: causal in prompts; response tokens attend to the prompt and to earlier tokens of their response.
    pub(crate) attention: PackedAttention,
    /// Index into `B * L` of the position that predicts each response token `[N]`.
    pub predict_index: Tensor,
    /// Index into `B * L` of each response token itself `[N]`.
    pub input_index: Tensor,
    /// The response tokens `[N]`.
    pub targets: Tensor,
    /// Range within N by group and response.
    pub ranges: Vec<Vec<Range<usize>>>,
    /// Sequence positions of image tokens `[B, V]`, padded with 0.
    pub image_index: Tensor,
    /// Whether each image token is real, not padding `[B, V]`, bool.
    pub image_valid: Tensor,
    /// Number of image tokens, by group.
    pub image_tokens: Vec<usize>,
    /// Sequence positions of response tokens `[B, Q]`, padded with 0.
    pub query_index: Tensor,
    /// Index into `B * Q` of each response token `[N]`.
    pub query_flat: Tensor,
    count: usize,
    /// Rotary position of the first response token, by group.
    pub(crate) next: Vec<i64>,
}

impl PackedBatch {
    /// Packs groups.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`], with the group, if there is no group, an empty response, an image placeholder in a response, or a
    /// mismatch of placeholders and grids.
    pub fn build(groups: &[PackedGroup], config: &VlmConfig, device: Device) -> Result<Self> {
        check_responses(groups)?;
        Self::pack(groups, config, device)
    }

    /// [`PackedBatch::build`] with all groups one after another in a single row without padding: positions restart with each group, and
    /// attention separates the groups. Attention rows cannot be captured from it.
    ///
    /// # Errors
    /// Returns the same errors as [`PackedBatch::build`].
    pub fn build_row(groups: &[PackedGroup], config: &VlmConfig, device: Device) -> Result<Self> {
        check_responses(groups)?;
        Self::assemble(groups, true, config, device)
    }

    /// [`PackedBatch::build`], but responses may be empty.
    pub(crate) fn pack(groups: &[PackedGroup], config: &VlmConfig, device: Device) -> Result<Self> {
        Self::assemble(groups, false, config, device)
    }

    /// Packs groups, each in a row that is padded to the longest, or all in a `single_row`.
    fn assemble(groups: &[PackedGroup], single_row: bool, config: &VlmConfig, device: Device) -> Result<Self> {
        if groups.is_empty() {
            return Err(ModelError::input("a batch needs at least one group"));
        }
        let shapes: Vec<(usize, Vec<usize>)> =
            groups.iter().map(|g| (g.prompt.tokens.len(), g.responses.iter().map(Vec::len).collect())).collect();
        let length_of = |(prompt, responses): &(usize, Vec<usize>)| prompt + responses.iter().sum::<usize>();
        let lengths: Vec<usize> = shapes.iter().map(length_of).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let (b, l) = if single_row { (1, lengths.iter().sum()) } else { (groups.len(), longest) };
        let mut rows = BatchBuilder { padded_len: (!single_row).then_some(l), ..BatchBuilder::default() };
        for (index, group) in groups.iter().enumerate() {
            rows.push(index, group, config)?;
        }
        let image_tokens = rows.image_positions.iter().map(Vec::len).collect();
        if single_row {
            rows.join_rows(&lengths);
        }
        let (images, image_valid) = pad(&rows.image_positions);
        let (queries, _) = pad(&rows.query_positions);
        let q = queries.len() / b;
        let query_flat: Vec<i64> = rows
            .query_positions
            .iter()
            .enumerate()
            .flat_map(|(g, list)| (0..list.len()).map(move |i| (g * q + i) as i64))
            .collect();
        let batch = b as i64;
        let length = l as i64;
        let tensor = |values: &[i64], shape: &[i64]| Tensor::from_slice(values).view(shape).to_device(device);
        Ok(Self {
            tokens: tensor(&rows.tokens, &[batch, length]),
            positions: tensor(&rows.positions, &[batch, length, 3]).permute([2, 0, 1]).contiguous(),
            attention: PackedAttention::new(&shapes, l, single_row, device)?,
            predict_index: tensor(&rows.predict, &[-1]),
            input_index: tensor(&rows.input, &[-1]),
            targets: tensor(&rows.targets, &[-1]),
            image_index: tensor(&images, &[batch, -1]),
            image_valid: tensor(&image_valid, &[batch, -1]).to_kind(Kind::Bool),
            image_tokens,
            query_index: tensor(&queries, &[batch, -1]),
            query_flat: tensor(&query_flat, &[-1]),
            count: rows.targets.len(),
            ranges: rows.ranges,
            next: rows.next,
        })
    }

    /// Returns the number of response tokens in the batch (N).
    pub fn len(&self) -> usize {
        self.count
    }

    /// Returns whether there is no response token; never true for a batch from [`PackedBatch::build`].
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// Checks that no response is empty.
fn check_responses(groups: &[PackedGroup]) -> Result<()> {
    for (index, group) in groups.iter().enumerate() {
        if let Some(r) = group.responses.iter().position(Vec::is_empty) {
            return Err(ModelError::input(format!("group {index} of the batch: response {r} is empty")));
        }
    }
    Ok(())
}

/// A batch under construction, group by group, as plain numbers.
#[derive(Default)]
struct BatchBuilder {
    /// Length to which each group is padded; `None` for groups that share a row.
    padded_len: Option<usize>,
    tokens: Vec<i64>,
    positions: Vec<i64>,
    predict: Vec<i64>,
    input: Vec<i64>,
    targets: Vec<i64>,
    ranges: Vec<Vec<Range<usize>>>,
    image_positions: Vec<Vec<i64>>,
    query_positions: Vec<Vec<i64>>,
    next: Vec<i64>,
}

impl BatchBuilder {
    fn push(&mut self, index: usize, group: &PackedGroup, config: &VlmConfig) -> Result<()> {
        let prompt = &group.prompt.tokens;
        let invalid = |message: String| Err(ModelError::input(format!("group {index} of the batch: {message}")));
        if prompt.is_empty() {
            return invalid("the prompt is empty".into());
        }
        let (positions, next) = match rope_positions(prompt, &group.prompt.grids, config) {
            Ok(positions) => positions,
            Err(e) => return invalid(e.to_string()),
        };
        let base = self.tokens.len();
        let p = prompt.len();
        self.tokens.extend(prompt.iter().map(|t| i64::from(*t)));
        self.positions.extend(positions.iter().flatten());
        let mut start = p;
        let mut ranges = Vec::with_capacity(group.responses.len());
        let mut queries = Vec::new();
        for (r, response) in group.responses.iter().enumerate() {
            if response.iter().any(|t| *t == config.image_token_id || *t == config.video_token_id) {
                return invalid(format!("response {r} contains an image placeholder"));
            }
            let first = self.targets.len();
            for (i, token) in response.iter().enumerate() {
                let row = start + i;
                self.tokens.push(i64::from(*token));
                self.positions.extend([next + i as i64; 3]);
                self.predict.push((base + if i == 0 { p - 1 } else { row - 1 }) as i64);
                self.input.push((base + row) as i64);
                self.targets.push(i64::from(*token));
                queries.push(row as i64);
            }
            start += response.len();
            ranges.push(first..self.targets.len());
        }
        if let Some(l) = self.padded_len {
            self.tokens.resize(base + l, padding_token(config));
            self.positions.resize((base + l) * 3, 0);
        }
        self.next.push(next);
        self.ranges.push(ranges);
        self.query_positions.push(queries);
        self.image_positions.push(image_positions(prompt, config));
        Ok(())
    }

    /// Makes the sequence positions of groups of these `lengths` count from the start of the row that they share.
    fn join_rows(&mut self, lengths: &[usize]) {
        for positions in [&mut self.image_positions, &mut self.query_positions] {
            let mut joined = Vec::new();
            let mut begin = 0;
            for (list, length) in positions.iter().zip(lengths) {
                joined.extend(list.iter().map(|p| p + begin));
                begin += *length as i64;
            }
            *positions = vec![joined];
        }
    }
}

/// Returns the positions of the image placeholders in a prompt.
pub(crate) fn image_positions(prompt: &[u32], config: &VlmConfig) -> Vec<i64> {
    prompt.iter().enumerate().filter(|(_, t)| **t == config.image_token_id).map(|(i, _)| i as i64).collect()
}

/// Returns a token for padding that is not an image placeholder.
pub(crate) fn padding_token(config: &VlmConfig) -> i64 {
    (0..3).find(|t| ![i64::from(config.image_token_id), i64::from(config.video_token_id)].contains(t)).unwrap_or(0)
}

/// Pads lists with 0 to the longest (at least 1). Returns the values and, as 1 or 0, whether each is real.
pub(crate) fn pad(lists: &[Vec<i64>]) -> (Vec<i64>, Vec<i64>) {
    let width = lists.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let mut values = Vec::with_capacity(width * lists.len());
    let mut valid = Vec::with_capacity(width * lists.len());
    for list in lists {
        values.extend(list.iter().copied().chain(std::iter::repeat(0)).take(width));
        valid.extend((0..width).map(|i| i64::from(i < list.len())));
    }
    (values, valid)
}
