//! The tokenizer of a model directory: token ids equal to those of transformers, special ids by name, and the characters of each token.

mod added;
pub mod stop;
pub mod tiny;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use tokenizers::{DecoderWrapper, Tokenizer as Inner};
use unveil_core::SpecialTokens;

use crate::preprocess_error::PreprocessError;
use crate::preprocess_error::read;

/// Tokens banned if the vocabulary has them, in addition to the four vision tokens that every tokenizer must have.
const BANNED_IF_PRESENT: [&str; 7] = [
    "<|vision_pad|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
];

/// Decoded text with the character range of each token.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Decoded {
    /// The text without special tokens.
    pub text: String,
    /// `[start, end)` of each token in *characters* of `text`; empty for a special or unknown token. A character that spans several
    /// tokens belongs to each of them.
    pub spans: Vec<[usize; 2]>,
}

/// A loaded tokenizer. Share it between threads in an `Arc`.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Inner,
    special: SpecialTokens,
    /// Tokens that are never sampled: image and video placeholders and vision markup.
    banned: Vec<u32>,
    /// Text of the special tokens, which decoding skips, by id.
    hidden: HashMap<u32, String>,
    /// Path of `tokenizer.json`.
    path: PathBuf,
    byte_by_char: HashMap<char, u8>,
    vocab_size: usize,
}

impl Tokenizer {
    /// Loads `tokenizer.json` of a model directory and the tokens that `tokenizer_config.json` adds.
    ///
    /// # Errors
    /// Returns [`PreprocessError::File`] for a missing file, [`PreprocessError::Format`] for a malformed file or a tokenizer that is not
    /// byte-level, [`PreprocessError::Config`] for conflicting added tokens, and [`PreprocessError::MissingToken`] for a missing special token.
    pub fn load(dir: &Path) -> Result<Self, PreprocessError> {
        let path = dir.join("tokenizer.json");
        let format = |cause: String| PreprocessError::Format { path: path.clone(), cause };
        let mut inner = Inner::from_bytes(read(&path)?).map_err(|e| format(e.to_string()))?;
        inner.with_truncation(None).map_err(|e| format(e.to_string()))?;
        inner.with_padding(None);
        added::add_configured_tokens(dir, &mut inner)?;
        if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(format(
                "its decoder is not ByteLevel, but the supported model families use byte-level tokenizers".to_owned(),
            ));
        }
        let id = |token: &'static str| {
            let known = inner.token_to_id(token).filter(|_| inner.get_added_vocabulary().is_special_token(token));
            known.ok_or_else(|| PreprocessError::MissingToken { path: path.clone(), token })
        };
        let special = SpecialTokens {
            image_pad: id("<|image_pad|>")?,
            video_pad: id("<|video_pad|>")?,
            vision_start: id("<|vision_start|>")?,
            vision_end: id("<|vision_end|>")?,
            im_start: id("<|im_start|>")?,
            im_end: id("<|im_end|>")?,
            end_of_text: id("<|endoftext|>")?,
        };
        let mut banned = special.vision().to_vec();
        banned.extend(BANNED_IF_PRESENT.iter().filter_map(|t| inner.token_to_id(t)));
        banned.sort_unstable();
        let added = inner.get_added_tokens_decoder();
        let hidden = added.iter().filter(|(_, t)| t.special).map(|(id, t)| (*id, t.content.clone())).collect();
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |m| *m as usize + 1);
        let byte_by_char = (0..=u8::MAX).map(|b| (byte_char(b), b)).collect();
        Ok(Self { special, banned, hidden, path, byte_by_char, vocab_size, inner })
    }

    /// Removes special tokens that answers are written with from the banned ones.
    ///
    /// # Errors
    /// Returns [`PreprocessError::MissingToken`] if the vocabulary lacks one of them.
    pub(crate) fn allow(&mut self, tokens: &[&'static str]) -> Result<(), PreprocessError> {
        for token in tokens {
            let missing = || PreprocessError::MissingToken { path: self.path.clone(), token };
            let id = self.id(token).filter(|id| self.hidden.contains_key(id)).ok_or_else(missing)?;
            self.banned.retain(|b| *b != id);
        }
        Ok(())
    }

    /// Checks that a tag is the same after encoding and decoding, which drops special tokens.
    ///
    /// # Errors
    /// Returns [`PreprocessError::Tag`] if it is not.
    pub(crate) fn check_tag(&self, tag: &str) -> Result<(), PreprocessError> {
        let decoded = self.decode(&self.encode(tag)?)?;
        if decoded == tag {
            return Ok(());
        }
        Err(PreprocessError::Tag { path: self.path.clone(), tag: tag.to_owned(), decoded })
    }

    /// Returns the largest token id plus one.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Returns the ids of the special tokens.
    pub fn special(&self) -> SpecialTokens {
        self.special
    }

    /// Returns the ids of the tokens that are never sampled, ascending: image and video placeholders and vision markup.
    pub fn banned(&self) -> &[u32] {
        &self.banned
    }

    /// Returns the id of a token by its exact text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Returns the text of a special token, or `None` for any other id.
    pub fn special_name(&self, id: u32) -> Option<&str> {
        self.hidden.get(&id).map(String::as_str)
    }

    /// Encodes a text; special tokens in it are recognised, none are added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, PreprocessError> {
        let e = self.inner.encode_fast(text, false).map_err(|e| PreprocessError::Tokenizer { cause: e.to_string() })?;
        Ok(e.get_ids().to_vec())
    }

    /// Encodes a text that must not contain special tokens (a question, a category).
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, PreprocessError> {
        let ids = self.encode(text)?;
        match ids.iter().find_map(|id| self.special_name(*id)) {
            None => Ok(ids),
            Some(token) => {
                Err(PreprocessError::SpecialInText { text: text.chars().take(80).collect(), token: token.to_owned() })
            }
        }
    }

    /// Decodes ids without special tokens; invalid UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, PreprocessError> {
        self.inner.decode(ids, true).map_err(|e| PreprocessError::Tokenizer { cause: e.to_string() })
    }

    /// Decodes ids to the same text as [`Tokenizer::decode`] together with the characters of each token, in linear time.
    pub fn decode_offsets(&self, ids: &[u32]) -> Decoded {
        let mut bytes = Vec::new();
        let ends: Vec<usize> = ids
            .iter()
            .map(|id| {
                self.append(*id, &mut bytes);
                bytes.len()
            })
            .collect();
        let mut text = String::with_capacity(bytes.len());
        // Index of the character to which each byte belongs.
        let mut char_of_byte = Vec::with_capacity(bytes.len());
        let mut chars = 0;
        for chunk in bytes.utf8_chunks() {
            for c in chunk.valid().chars() {
                text.push(c);
                char_of_byte.resize(char_of_byte.len() + c.len_utf8(), chars);
                chars += 1;
            }
            if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                char_of_byte.resize(char_of_byte.len() + chunk.invalid().len(), chars);
                chars += 1;
            }
        }
        let mut start = 0;
        let mut spans = Vec::with_capacity(ids.len());
        for end in ends {
            let char_index = |i: usize| char_of_byte.get(i).copied().unwrap_or(chars);
            spans.push(if end == start {
                [char_index(start); 2]
            } else {
                [char_index(start), char_index(end - 1) + 1]
            });
            start = end;
        }
        Decoded { text, spans }
    }

    /// Returns the bytes that a token adds to the text; none for a special or unknown token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let mut out = Vec::new();
        self.append(id, &mut out);
        out
    }

    /// Appends the bytes of a token as the byte-level decoder writes them; nothing for a special or unknown token.
    fn append(&self, id: u32, out: &mut Vec<u8>) {
        if self.hidden.contains_key(&id) {
            return;
        }
        let Some(token) = self.inner.id_to_token(id) else { return };
        match token.chars().map(|c| self.byte_by_char.get(&c).copied()).collect::<Option<Vec<u8>>>() {
            Some(bytes) => out.extend(bytes),
            None => out.extend(token.as_bytes()),
        }
    }
}

/// Returns the visible character that represents a byte in a byte-level vocabulary (GPT-2's table).
pub(crate) fn byte_char(byte: u8) -> char {
    let visible = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if visible(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|b| !visible(*b)).count() as u32;
    char::from_u32(256 + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        tiny::write_tiny(dir.path(), &tiny::TinyProcessorSpec::default()).unwrap();
        dir
    }

    #[test]
    fn spans_follow_the_characters() {
        let t = Tokenizer::load(tiny_dir().path()).unwrap();
        let mut ids = t.encode("[12,3,90,44], [1,2,3,1023] nodule").unwrap();
        ids.push(t.special().im_end);
        let d = t.decode_offsets(&ids);
        assert_eq!(d.text, "[12,3,90,44], [1,2,3,1023] nodule");
        assert_eq!(d.spans.len(), ids.len());
        assert_eq!(d.spans[ids.len() - 2], [26, 33]);
        assert_eq!(d.spans[ids.len() - 1], [33, 33]);
        assert_eq!(d.spans[1], [1, 3]);
        assert_eq!(ids.len(), 1 + 7 + 1 + 7 + 1 + 1 + 1);
    }

    #[test]
    fn split_characters_belong_to_each_token() {
        let t = Tokenizer::load(tiny_dir().path()).unwrap();
        let ids = t.encode("a\u{20ac}b").unwrap();
        assert_eq!(ids.len(), 5);
        let d = t.decode_offsets(&ids);
        assert_eq!((d.text.as_str(), &d.spans[..]), ("a\u{20ac}b", &[[0, 1], [1, 2], [1, 2], [1, 2], [2, 3]][..]));
        for cut in [&ids[..2], &ids[..3], &ids[2..], &[999_999][..]] {
            assert_eq!(t.decode_offsets(cut).text, t.decode(cut).unwrap());
        }
    }

    #[test]
    fn token_bytes_concatenate_to_the_text() {
        let t = Tokenizer::load(tiny_dir().path()).unwrap();
        let ids = t.encode("[1,2] \u{20ac}<|im_end|>no finding").unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|id| t.token_bytes(*id)).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), t.decode(&ids).unwrap());
        assert!(t.token_bytes(t.special().im_end).is_empty());
        let mut stop = stop::StopStrings::new(["\u{20ac}no"]);
        let hits: Vec<bool> = ids.iter().map(|id| stop.push(&t.token_bytes(*id))).collect();
        assert_eq!(hits.iter().position(|h| *h), Some(ids.len() - 2));
    }

    #[test]
    fn errors_name_file_and_token() {
        let dir = tiny_dir();
        let path = dir.path().join("tokenizer.json");
        let good = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, good.replace("<|image_pad|>", "<|picture|>")).unwrap();
        let e = Tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(e.contains("tokenizer.json") && e.contains("<|image_pad|>"), "{e}");
        std::fs::write(&path, &good[..good.len() / 2]).unwrap();
        assert!(Tokenizer::load(dir.path()).unwrap_err().to_string().contains("tokenizer.json"));
        std::fs::remove_file(&path).unwrap();
        assert!(Tokenizer::load(dir.path()).unwrap_err().to_string().contains("tokenizer.json"));
    }

    #[test]
    fn lfs_pointers_and_conflicting_ids_are_named() {
        let dir = tiny_dir();
        let path = dir.path().join("tokenizer.json");
        let config = dir.path().join("tokenizer_config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        let with = |list: serde_json::Value| {
            let mut map: serde_json::Value = serde_json::from_str(&text).unwrap();
            map["added_tokens_decoder"] = list;
            std::fs::write(&config, map.to_string()).unwrap();
            Tokenizer::load(dir.path()).map(|t| (t.id("<new>"), t.vocab_size()))
        };
        let (id, size) = with(serde_json::json!({})).unwrap();
        assert_eq!(id, None);
        let new = |id: usize| serde_json::json!({id.to_string(): {"content": "<new>", "special": true}});
        assert_eq!(with(new(size)).unwrap(), (Some(size as u32), size + 1));
        let e = with(new(size + 7)).unwrap_err().to_string();
        assert!(e.contains("tokenizer_config.json") && e.contains(&format!("{}", size + 7)), "{e}");
        assert!(
            with(serde_json::json!({"x": {"content": "<new>"}}))
                .unwrap_err()
                .to_string()
                .contains("\"x\" is not a token id")
        );
        std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7031645\n").unwrap();
        let e = Tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(e.contains("tokenizer.json") && e.contains("Git LFS pointer"), "{e}");
    }

    #[test]
    fn special_tokens_in_plain_text_are_refused() {
        let t = Tokenizer::load(tiny_dir().path()).unwrap();
        assert!(t.encode_plain("a <b> | nodule").is_ok());
        let e = t.encode_plain("a <|im_end|>").unwrap_err().to_string();
        assert!(e.contains("<|im_end|>"), "{e}");
    }
}
