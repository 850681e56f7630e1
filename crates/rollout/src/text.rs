//! Between the engine's ids and the texts that people and rewards read; between prepared records and the engine's input.

use std::sync::Arc;

use unveil_core::{Attention, Record, Response};
use unveil_data::prepare::Prepared;
use unveil_data::store::ContentHash;
use unveil_data::tokenizer::Tokenizer;
use unveil_engine::{AttentionRows, GroupInput, RawResponse};
use unveil_model::Prompt;
use unveil_reward::Scoring;
use unveil_reward::mention::tokens_of;

/// The engine's input for a prepared record, whose image has this content.
pub(crate) fn group_input(id: &str, hash: Option<ContentHash>, prepared: Prepared) -> (GroupInput, Frame) {
    let frame = Frame { sizes: prepared.image.sizes(), grid: prepared.image.merged };
    let grid = prepared.image.grid_thw.map(|v| v as i64);
    let input = GroupInput {
        id: id.to_owned(),
        prompt: Prompt { tokens: prepared.prompt.ids, grids: vec![grid] },
        patches: Arc::new(prepared.image.patches),
        hashes: hash.iter().map(|h| *h.as_bytes()).collect(),
    };
    (input, frame)
}

/// What is left of an image once its patches are with the engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    pub sizes: unveil_data::codec::Sizes,
    pub grid: unveil_core::Grid,
}

impl Frame {
    /// Width and height of the image as it was given.
    pub fn original(&self) -> [u32; 2] {
        [self.sizes.original.0, self.sizes.original.1]
    }

    /// Attention rows on this image's grid.
    pub fn attention(&self, rows: Option<&AttentionRows>) -> Option<Attention> {
        rows.and_then(|r| r.to_attention(self.grid))
    }
}

/// Text of response tokens, and the bytes of it that each token wrote.
pub(crate) fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> (String, Vec<(usize, usize)>) {
    let decoded = tokenizer.decode_offsets(tokens);
    let mut at: Vec<usize> = decoded.text.char_indices().map(|(byte, _)| byte).collect();
    at.push(decoded.text.len());
    let byte = |chars: usize| at.get(chars).copied().unwrap_or(decoded.text.len());
    let spans = decoded.spans.iter().map(|&[begin, end]| (byte(begin), byte(end))).collect();
    (decoded.text, spans)
}

/// The tokens that name the class of `record` in the answer first.
pub(crate) fn named(scoring: &Scoring, record: &Record, text: &str, spans: &[(usize, usize)]) -> Vec<usize> {
    scoring.mention(record, text).map(|at| tokens_of(&at, spans)).unwrap_or_default()
}

/// A generated response with its text and byte spans.
pub(crate) fn response(
    tokenizer: &Tokenizer,
    raw: RawResponse,
) -> (Response, Vec<(usize, usize)>, Option<AttentionRows>) {
    let (text, spans) = decode(tokenizer, &raw.tokens);
    let response = Response {
        index: raw.index,
        tokens: raw.tokens,
        text,
        logprobs: raw.logprobs,
        versions: raw.versions,
        finish: raw.finish,
    };
    (response, spans, raw.attention)
}
