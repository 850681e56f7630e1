//! The files of a model directory that rewards need: tokenizer and processor. No weights are read.

use std::path::{Path, PathBuf};

use unveil_core::mention::byte_spans;
use unveil_core::{BoxForm, InputSettings};
use unveil_preprocess::codec::Sizes;
use unveil_preprocess::preprocessor::Preprocessor;

use crate::RewardError;

/// Text and the bytes of it that each token covers.
type TextAndSpans = (String, Vec<(usize, usize)>);

/// Tokenizer and processor of a model directory.
pub(crate) struct ModelFiles {
    preprocessor: Preprocessor,
}

impl ModelFiles {
    /// Loads the tokenizer and processor files of `dir` with the settings of a run.
    pub(crate) fn load(dir: &Path, settings: &InputSettings) -> Result<Self, RewardError> {
        let fail = |e: unveil_preprocess::preprocessor::PreprocessError| RewardError::Model {
            path: PathBuf::from(dir),
            what: e.to_string(),
        };
        Ok(Self { preprocessor: Preprocessor::load_with(dir, settings).map_err(fail)? })
    }

    /// Returns the size of an image before and after the processor's resize.
    pub(crate) fn sizes(&self, original: (u32, u32)) -> Result<Sizes, String> {
        self.preprocessor.sizes(original).map_err(|e| e.to_string())
    }

    /// Returns the form in which answers give boxes.
    pub(crate) fn box_form(&self) -> BoxForm {
        self.preprocessor.box_form()
    }

    /// Decodes token ids to text, without special and unknown tokens.
    pub(crate) fn decode_tokens(&self, tokens: &[u32]) -> TextAndSpans {
        let decoded = self.preprocessor.tokenizer().decode_offsets(tokens);
        let spans = byte_spans(&decoded.text, &decoded.spans);
        (decoded.text, spans)
    }

    /// Removes the special tokens of a text and returns the spans of its tokens; no spans if decoding the tokens yields another text.
    pub(crate) fn tokenize_text(&self, text: String) -> Result<TextAndSpans, String> {
        let tokenizer = self.preprocessor.tokenizer();
        let tokens = tokenizer.encode(&text).map_err(|e| format!("`response`: {e}"))?;
        let (decoded, spans) = self.decode_tokens(&tokens);
        let special = tokens.iter().any(|t| tokenizer.special_name(*t).is_some());
        Ok(if decoded == text || special { (decoded, spans) } else { (text, Vec::new()) })
    }
}
