//! Converts the engine's token ids to text for users and rewards, and preprocessed records to the engine's input.

use std::sync::Arc;

use unveil_core::mention::overlapping_tokens;
use unveil_core::{Attention, Record, Response};
use unveil_data::image_store::ContentHash;
use unveil_engine::{AttentionRows, PromptInput, RawResponse};
use unveil_preprocess::preprocessor::ModelInput;
use unveil_preprocess::tokenizer::Tokenizer;
use unveil_reward::Scoring;

/// Builds the engine's input for a preprocessed record; `hash` is the content hash of its image.
pub(crate) fn group_input(id: &str, hash: Option<ContentHash>, prepared: ModelInput) -> (PromptInput, ImageGeometry) {
    let geometry = ImageGeometry { sizes: prepared.image.sizes(), grid: prepared.image.merged };
    let input = PromptInput {
        id: id.to_owned(),
        prompt: prepared.prompt,
        patches: Arc::new(prepared.image.patches),
        hashes: hash.iter().map(|h| *h.as_bytes()).collect(),
    };
    (input, geometry)
}

/// Sizes and token grid of an image, kept after its patches have been moved to the engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ImageGeometry {
    pub sizes: unveil_preprocess::codec::Sizes,
    pub grid: unveil_core::Grid,
}

impl ImageGeometry {
    /// Returns the width and height of the original image in pixels.
    pub(crate) fn original(&self) -> [u32; 2] {
        [self.sizes.original.0, self.sizes.original.1]
    }

    /// Converts attention rows of the engine to rows over this image's grid.
    pub(crate) fn attention(&self, rows: Option<&AttentionRows>) -> Option<Attention> {
        rows.and_then(|r| r.to_attention(self.grid))
    }
}

/// Decodes response tokens; returns the text and the bytes of it that each token covers.
pub(crate) fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> (String, Vec<(usize, usize)>) {
    let decoded = tokenizer.decode_offsets(tokens);
    let mut offsets: Vec<usize> = decoded.text.char_indices().map(|(byte, _)| byte).collect();
    offsets.push(decoded.text.len());
    let byte = |chars: usize| offsets.get(chars).copied().unwrap_or(decoded.text.len());
    let spans = decoded.spans.iter().map(|&[begin, end]| (byte(begin), byte(end))).collect();
    (decoded.text, spans)
}

/// Returns the tokens of the first mention of the class of `record` in the answer.
pub(crate) fn naming_tokens(scoring: &Scoring, record: &Record, text: &str, spans: &[(usize, usize)]) -> Vec<usize> {
    scoring.find_mention(record, text).map(|mention| overlapping_tokens(&mention, spans)).unwrap_or_default()
}

/// Decodes a generated response; returns it with the byte spans of its tokens and its attention rows.
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
