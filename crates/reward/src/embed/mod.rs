//! Sentence embeddings by a BERT model directory, and their cosine as a score. Inference on the CPU in f32, without torch.
//!
//! Source: BERT (Devlin et al., arXiv 1810.04805) with mean pooling over the tokens (Reimers and Gurevych, arXiv 1908.10084).

mod bert;

use std::path::Path;

use serde::Deserialize;
use tokenizers::{Tokenizer, TruncationParams};

use crate::RewardError;
use bert::Bert;

/// A model that embeds texts as vectors.
#[derive(Debug)]
pub struct Embedder {
    tokenizer: Tokenizer,
    bert: Bert,
    version: String,
}

/// Pooling settings of sentence-transformers that are checked.
#[derive(Debug, Deserialize)]
struct Pooling {
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_max_tokens: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
}

#[derive(Debug, Deserialize)]
struct SentenceConfig {
    max_seq_length: usize,
}

impl Embedder {
    /// Loads `config.json`, `model.safetensors`, `tokenizer.json` and, if present, `1_Pooling/config.json` and
    /// `sentence_bert_config.json` of `dir`.
    ///
    /// # Errors
    /// Returns [`RewardError::Named`] if a file is missing or the model is not BERT with mean pooling.
    pub fn load(dir: &Path) -> Result<Self, RewardError> {
        let fail =
            |why: String| RewardError::Named { what: format!("reward.relevance.embedding_dir {}", dir.display()), why };
        let read = |name: &str| std::fs::read(dir.join(name)).map_err(|e| fail(format!("{name}: {e}")));
        let optional = |name: &str| if dir.join(name).is_file() { read(name).map(Some) } else { Ok(None) };
        if let Some(bytes) = optional("1_Pooling/config.json")? {
            let p: Pooling = serde_json::from_slice(&bytes).map_err(|e| fail(format!("1_Pooling/config.json: {e}")))?;
            if !p.pooling_mode_mean_tokens || p.pooling_mode_cls_token || p.pooling_mode_max_tokens {
                return Err(fail(
                    "1_Pooling/config.json asks for a pooling other than the mean of the tokens, which is not supported".to_owned(),
                ));
            }
        }
        let weights = read("model.safetensors")?;
        let bert = Bert::load(&read("config.json")?, &weights).map_err(fail)?;
        let longest = match optional("sentence_bert_config.json")? {
            Some(bytes) => {
                let c: SentenceConfig =
                    serde_json::from_slice(&bytes).map_err(|e| fail(format!("sentence_bert_config.json: {e}")))?;
                c.max_seq_length.min(bert.positions())
            }
            None => bert.positions(),
        };
        let mut tokenizer =
            Tokenizer::from_bytes(read("tokenizer.json")?).map_err(|e| fail(format!("tokenizer.json: {e}")))?;
        let truncation = TruncationParams { max_length: longest, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|e| fail(format!("tokenizer.json: {e}")))?;
        tokenizer.with_padding(None);
        let version = format!("embedding-1:{}", &blake3::hash(&weights).to_hex()[..12]);
        Ok(Self { tokenizer, bert, version })
    }

    /// Returns the version of the model, a hash of its weights.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Returns the mean of the last hidden states over the tokens of `text`, special tokens included; its length is the model's width.
    ///
    /// # Errors
    /// Returns a message if the text cannot be tokenised for this model.
    pub fn embed(&self, text: &str) -> Result<Vec<f32>, String> {
        let encoding = self.tokenizer.encode(text, true).map_err(|e| e.to_string())?;
        self.bert.mean_state(encoding.get_ids(), encoding.get_type_ids())
    }
}

/// Returns the cosine of two vectors, clamped at 0. Range `[0, 1]`; 0 if one of them is 0.
pub fn similarity(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { (dot(a, b) / norms).clamp(0.0, 1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similarity_is_the_clamped_cosine() {
        assert_eq!(similarity(&[1.0, 0.0], &[2.0, 0.0]), 1.0);
        assert_eq!(similarity(&[1.0, 0.0], &[-1.0, 0.0]), 0.0);
        assert_eq!(similarity(&[0.0, 0.0], &[1.0, 0.0]), 0.0);
        assert!((similarity(&[1.0, 1.0], &[1.0, 0.0]) - 0.5_f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn missing_directory_is_named() {
        let e = Embedder::load(Path::new("/no/such/dir")).unwrap_err().to_string();
        assert!(e.contains("/no/such/dir") && e.contains("model.safetensors"), "{e}");
    }
}
