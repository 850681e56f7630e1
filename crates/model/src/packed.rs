//! Packed groups: one sequence holds a prompt and all responses to it, a tree keeps responses apart, and
//! positions start again for each response. A packed pass equals separate passes, at the cost of one prompt.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::rope::rope_positions;
use crate::tree::Tree;
use crate::vlm::Prompt;
use crate::{ModelError, Result, VlmConfig};

/// A prompt and its responses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedGroup {
    /// The prompt, image placeholders expanded.
    pub prompt: Prompt,
    /// Token ids of each response, at least one each, end token included where it was produced.
    pub responses: Vec<Vec<u32>>,
}

/// Groups as tensors, padded at the end to the longest. N counts all response tokens in the order
/// (group, response, position).
pub struct PackedBatch {
    /// Token ids `[B, L]`.
    pub tokens: Tensor,
    /// Rotary positions `[3, B, L]`.
    pub positions: Tensor,
    /// Who attends to whom: prompts causally, response tokens to the prompt and to earlier tokens of their own response.
    pub(crate) tree: Tree,
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
    /// Which of them are real `[B, V]`, bool.
    pub image_valid: Tensor,
    /// Image tokens by group.
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
    /// Packs groups. Errors: no group, an empty response, an image placeholder in a response, placeholders that do not
    /// fit the grids; the message says which group.
    pub fn build(groups: &[PackedGroup], config: &VlmConfig, device: Device) -> Result<Self> {
        for (index, group) in groups.iter().enumerate() {
            if let Some(r) = group.responses.iter().position(Vec::is_empty) {
                return Err(ModelError::input(format!("group {index} of the batch: response {r} is empty")));
            }
        }
        Self::pack(groups, config, device)
    }

    /// [`PackedBatch::build`], but responses may be empty.
    pub(crate) fn pack(groups: &[PackedGroup], config: &VlmConfig, device: Device) -> Result<Self> {
        if groups.is_empty() {
            return Err(ModelError::input("a batch needs at least one group"));
        }
        let len_of = |g: &PackedGroup| g.prompt.tokens.len() + g.responses.iter().map(Vec::len).sum::<usize>();
        let l = groups.iter().map(len_of).max().unwrap_or(0);
        let b = groups.len();
        let shapes: Vec<(usize, Vec<usize>)> =
            groups.iter().map(|g| (g.prompt.tokens.len(), g.responses.iter().map(Vec::len).collect())).collect();
        let mut rows = Rows { l, ..Rows::default() };
        for (index, group) in groups.iter().enumerate() {
            rows.push(index, group, config)?;
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
        let (bi, li) = (b as i64, l as i64);
        let tensor = |values: &[i64], shape: &[i64]| Tensor::from_slice(values).view(shape).to_device(device);
        Ok(Self {
            tokens: tensor(&rows.tokens, &[bi, li]),
            positions: tensor(&rows.positions, &[bi, li, 3]).permute([2, 0, 1]).contiguous(),
            tree: Tree::new(&shapes, l, device),
            predict_index: tensor(&rows.predict, &[-1]),
            input_index: tensor(&rows.input, &[-1]),
            targets: tensor(&rows.targets, &[-1]),
            image_index: tensor(&images, &[bi, -1]),
            image_valid: tensor(&image_valid, &[bi, -1]).to_kind(Kind::Bool),
            image_tokens: rows.image_positions.iter().map(Vec::len).collect(),
            query_index: tensor(&queries, &[bi, -1]),
            query_flat: tensor(&query_flat, &[-1]),
            count: rows.targets.len(),
            ranges: rows.ranges,
            next: rows.next,
        })
    }

    /// Response tokens in the batch (N).
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is no response token; never true for a batch that was built.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// The batch while it grows, one group after the other, as plain numbers.
#[derive(Default)]
struct Rows {
    l: usize,
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

impl Rows {
    fn push(&mut self, index: usize, group: &PackedGroup, config: &VlmConfig) -> Result<()> {
        let prompt = &group.prompt.tokens;
        let fault = |what: String| Err(ModelError::input(format!("group {index} of the batch: {what}")));
        if prompt.is_empty() {
            return fault("the prompt is empty".into());
        }
        let (positions, next) = match rope_positions(prompt, &group.prompt.grids, config) {
            Ok(found) => found,
            Err(e) => return fault(e.to_string()),
        };
        let (l, base) = (self.l, index * self.l);
        let p = prompt.len();
        self.tokens.extend(prompt.iter().map(|t| i64::from(*t)));
        self.positions.extend(positions.iter().flatten());
        let mut at = p;
        let mut ranges = Vec::with_capacity(group.responses.len());
        let mut queries = Vec::new();
        for (r, response) in group.responses.iter().enumerate() {
            if response.iter().any(|t| *t == config.image_token_id || *t == config.video_token_id) {
                return fault(format!("response {r} holds an image placeholder"));
            }
            let first = self.targets.len();
            for (i, token) in response.iter().enumerate() {
                let row = at + i;
                self.tokens.push(i64::from(*token));
                self.positions.extend([next + i as i64; 3]);
                self.predict.push((base + if i == 0 { p - 1 } else { row - 1 }) as i64);
                self.input.push((base + row) as i64);
                self.targets.push(i64::from(*token));
                queries.push(row as i64);
            }
            at += response.len();
            ranges.push(first..self.targets.len());
        }
        let filler = padding_token(config);
        self.tokens.resize(base + l, filler);
        self.positions.resize((base + l) * 3, 0);
        self.next.push(next);
        self.ranges.push(ranges);
        self.query_positions.push(queries);
        self.image_positions.push(image_positions(prompt, config));
        Ok(())
    }
}

/// Where the image placeholders of a prompt are.
pub(crate) fn image_positions(prompt: &[u32], config: &VlmConfig) -> Vec<i64> {
    prompt.iter().enumerate().filter(|(_, t)| **t == config.image_token_id).map(|(i, _)| i as i64).collect()
}

/// A token for padding that is not an image placeholder.
pub(crate) fn padding_token(config: &VlmConfig) -> i64 {
    (0..3).find(|t| ![i64::from(config.image_token_id), i64::from(config.video_token_id)].contains(t)).unwrap_or(0)
}

/// Lists padded with 0 to the longest (at least 1), and which entries are real.
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
