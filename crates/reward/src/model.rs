//! The model directory as far as rewards need it: tokenizer and resize. No weights are read.

use std::path::{Path, PathBuf};

use unveil_core::BoxForm;
use unveil_data::codec::Sizes;
use unveil_data::prepare::Preparer;

use crate::RewardError;
use crate::mention::byte_spans;

/// Text and, per token, the bytes of it that the token covers.
type TextAndSpans = (String, Vec<(usize, usize)>);

/// Tokenizer and processor of a model directory.
pub(crate) struct ModelSide {
    preparer: Preparer,
}

impl ModelSide {
    /// Reads the tokenizer and processor files of `dir`; boxes are written as `boxes` says, none: as the family does.
    pub(crate) fn load(dir: &Path, boxes: Option<BoxForm>) -> Result<Self, RewardError> {
        let fail = |e: unveil_data::prepare::PrepareError| RewardError::Model {
            path: PathBuf::from(dir),
            what: e.to_string(),
        };
        Ok(Self { preparer: Preparer::load_with(dir, boxes).map_err(fail)? })
    }

    /// Size of an image before and after the processor's resize.
    pub(crate) fn sizes(&self, original: (u32, u32)) -> Result<Sizes, String> {
        self.preparer.sizes(original).map_err(|e| e.to_string())
    }

    /// How boxes are written.
    pub(crate) fn box_form(&self) -> BoxForm {
        self.preparer.box_form()
    }

    /// Token ids as text, special and unknown tokens skipped.
    pub(crate) fn read_tokens(&self, tokens: &[u32]) -> TextAndSpans {
        let decoded = self.preparer.tokenizer().decode_offsets(tokens);
        let spans = byte_spans(&decoded.text, &decoded.spans);
        (decoded.text, spans)
    }

    /// A text without its special tokens and the spans of its own tokens; no spans when the tokens do not give the text back.
    pub(crate) fn read_text(&self, text: String) -> Result<TextAndSpans, String> {
        let tokenizer = self.preparer.tokenizer();
        let tokens = tokenizer.encode(&text).map_err(|e| format!("`response`: {e}"))?;
        let (back, spans) = self.read_tokens(&tokens);
        let special = tokens.iter().any(|t| tokenizer.special_name(*t).is_some());
        Ok(if back == text || special { (back, spans) } else { (text, Vec::new()) })
    }
}
