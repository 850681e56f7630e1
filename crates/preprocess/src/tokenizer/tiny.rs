//! A small tokenizer and processor for models trained from scratch, as Hugging Face files that the auto classes of transformers load.
//!
//! Byte-level BPE in the form of Qwen2's tokenizer, built from a fixed list of words (no training, always the same files), the Qwen
//! special tokens, and one token per number 0..=1023: models of this size hardly learn coordinates spelt digit by digit.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};
use unveil_core::{Family, SpecialTokens};

use super::{Tokenizer, byte_char};
use crate::family::processor_class;
use crate::preprocess_error::PreprocessError;

/// Family and sizes of a tiny processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TinyProcessorSpec {
    /// Model family; it determines the processor class and the normalisation of pixel values.
    pub family: Family,
    /// Side of a patch in pixels.
    pub patch: u32,
    /// Patches along one side of an image token.
    pub merge: u32,
    /// Frames per patch.
    pub temporal: u32,
    /// Minimum number of pixels of a resized image.
    pub min_pixels: u64,
    /// Maximum number of pixels of a resized image.
    pub max_pixels: u64,
}

impl Default for TinyProcessorSpec {
    /// Returns a specification that keeps 96 x 96 pixels (36 image tokens) and resizes 640 x 480 to 128 x 96 (48 image tokens).
    fn default() -> Self {
        Self { family: Family::Qwen2_5Vl, patch: 8, merge: 2, temporal: 2, min_pixels: 96 * 96, max_pixels: 128 * 96 }
    }
}

/// The values of the tokenizer that a model's configuration needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TinyVocabulary {
    /// Number of tokens.
    pub vocab_size: u32,
    /// Ids of the special tokens.
    pub special: SpecialTokens,
    /// Ids of the numbers 0..=1023, in order.
    pub numbers: std::ops::Range<u32>,
}

/// Largest number represented by a single token.
pub const LARGEST_NUMBER: u32 = 1023;

const SPECIAL: [&str; 8] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
];

/// Words that become single tokens.
const WORDS: [&str; 38] = [
    " nodule",
    " cyst",
    " opacity",
    " polyp",
    " stone",
    " mass",
    " lesion",
    " white",
    " red",
    " blood",
    " cell",
    " platelet",
    "no",
    " finding",
    "What",
    "Where",
    " where",
    " is",
    " the",
    " and",
    " are",
    " a",
    " of",
    " in",
    " this",
    " image",
    " abnormal",
    " any",
    " there",
    "Is",
    "system",
    "user",
    "assistant",
    "],",
    " [",
    "Find",
    " all",
    " box",
];

/// Text between two boxes, a single token.
const BETWEEN_BOXES: &str = "], [";

/// Qwen2's rule for splitting text into words.
const WORD_RULE: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const CHAT_TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}";

/// Writes tokenizer, chat template and processor files into `dir` and reads the tokenizer back.
pub fn write_tiny(dir: &Path, spec: &TinyProcessorSpec) -> Result<TinyVocabulary, PreprocessError> {
    let files = [
        ("tokenizer.json", pretty_json(&tokenizer_json())),
        ("tokenizer_config.json", pretty_json(&tokenizer_config(spec.family))),
        ("special_tokens_map.json", pretty_json(&json!({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))),
        ("chat_template.jinja", CHAT_TEMPLATE.to_owned()),
        ("preprocessor_config.json", pretty_json(&image_config(spec))),
        ("video_preprocessor_config.json", pretty_json(&video_config(spec))),
    ];
    for (name, content) in files {
        let path = dir.join(name);
        unveil_core::write_atomic(&path, content.as_bytes()).map_err(|cause| PreprocessError::File { path, cause })?;
    }
    let tokenizer = Tokenizer::load(dir)?;
    let vocab_size = tokenizer.vocab_size() as u32;
    // The numbers are the last tokens of the vocabulary.
    let numbers = vocab_size - LARGEST_NUMBER - 1..vocab_size;
    Ok(TinyVocabulary { vocab_size, special: tokenizer.special(), numbers })
}

fn pretty_json(value: &Value) -> String {
    format!("{value:#}\n")
}

/// Returns the bytes as visible characters, without digits, which the number tokens always match.
fn alphabet() -> Vec<String> {
    (0..=u8::MAX).filter(|b| !b.is_ascii_digit()).map(|b| byte_char(b).to_string()).collect()
}

/// Returns merges that make every word a single token, earlier words first. A later merge never breaks an earlier word, because BPE applies
/// the earliest applicable merge.
fn merges() -> Vec<(String, String)> {
    let mut list: Vec<(String, String)> = Vec::new();
    let mut rank: HashMap<(String, String), usize> = HashMap::new();
    for word in WORDS {
        loop {
            let parts = split(word, &rank);
            let [first, second, ..] = &parts[..] else { break };
            let pair = (first.clone(), second.clone());
            rank.insert(pair.clone(), list.len());
            list.push(pair);
        }
    }
    list
}

/// Applies BPE to one word.
fn split(word: &str, rank: &HashMap<(String, String), usize>) -> Vec<String> {
    let mut parts: Vec<String> = word.bytes().map(|b| byte_char(b).to_string()).collect();
    loop {
        let best =
            (1..parts.len()).filter_map(|i| rank.get(&(parts[i - 1].clone(), parts[i].clone())).map(|r| (*r, i))).min();
        let Some((_, i)) = best else { return parts };
        let right = parts.remove(i);
        parts[i - 1].push_str(&right);
    }
}

fn tokenizer_json() -> Value {
    let merges = merges();
    let mut tokens = alphabet();
    tokens.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
    let base = tokens.len();
    let numbers = (0..=LARGEST_NUMBER).map(|n| (n.to_string(), false));
    let plain = std::iter::once((BETWEEN_BOXES.to_owned(), false)).chain(numbers);
    let added: Vec<Value> = SPECIAL
        .iter()
        .map(|s| ((*s).to_owned(), true))
        .chain(plain)
        .enumerate()
        .map(|(i, (content, special))| {
            json!({"id": base + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": special})
        })
        .collect();
    let vocab: serde_json::Map<String, Value> =
        tokens.into_iter().enumerate().map(|(i, t)| (t, Value::from(i))).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORD_RULE}, "behavior": "Isolated", "invert": false},
            byte_level,
        ]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab,
            "merges": merges.into_iter().map(|(a, b)| json!([a, b])).collect::<Vec<_>>(),
        },
    })
}

fn tokenizer_config(family: Family) -> Value {
    json!({
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": processor_class(family),
        "add_prefix_space": false,
        "bos_token": null,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": null,
        "clean_up_tokenization_spaces": false,
        "errors": "replace",
        "split_special_tokens": false,
        "model_max_length": 32768,
    })
}

fn image_config(spec: &TinyProcessorSpec) -> Value {
    let (mean, std) = match spec.family {
        Family::Qwen2_5Vl => ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        Family::Qwen3Vl => ([0.5; 3], [0.5; 3]),
    };
    json!({
        "processor_class": processor_class(spec.family),
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": true,
        "do_resize": true,
        "resample": 3,
        "size": {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": mean,
        "image_std": std,
        "patch_size": spec.patch,
        "temporal_patch_size": spec.temporal,
        "merge_size": spec.merge,
    })
}

/// Returns the video settings, which only the processor of transformers needs; Unveil does not read videos.
fn video_config(spec: &TinyProcessorSpec) -> Value {
    let mut config = image_config(spec);
    if let Some(map) = config.as_object_mut() {
        map.remove("image_processor_type");
        let processor = match spec.family {
            Family::Qwen2_5Vl => "Qwen2VLVideoProcessor",
            Family::Qwen3Vl => "Qwen3VLVideoProcessor",
        };
        map.insert("video_processor_type".to_owned(), Value::from(processor));
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vocabulary_is_small_and_deterministic() {
        let a = tempfile::tempdir().unwrap();
        let b = tempfile::tempdir().unwrap();
        let v = write_tiny(a.path(), &TinyProcessorSpec::default()).unwrap();
        assert_eq!(write_tiny(b.path(), &TinyProcessorSpec::default()).unwrap(), v);
        assert!((1300..1500).contains(&v.vocab_size), "{}", v.vocab_size);
        for entry in std::fs::read_dir(a.path()).unwrap() {
            let name = entry.unwrap().file_name();
            assert_eq!(std::fs::read(a.path().join(&name)).unwrap(), std::fs::read(b.path().join(&name)).unwrap());
        }
    }

    /// Runs are reproducible only as long as these files do not change.
    #[test]
    fn default_files_do_not_change() {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        let mut hash = blake3::Hasher::new();
        for name in names {
            hash.update(name.as_encoded_bytes());
            hash.update(&std::fs::read(dir.path().join(name)).unwrap());
        }
        assert_eq!(
            hash.finalize().to_hex().as_str(),
            "51cc4ebe90ebda99fc0012c6fa486ea90364e6c1308c80374aaf46794e6e98ff"
        );
    }

    #[test]
    fn words_and_numbers_are_single_tokens() {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
        let t = Tokenizer::load(dir.path()).unwrap();
        for word in WORDS.iter().map(|w| (*w).to_owned()).chain((0..=LARGEST_NUMBER).map(|n| n.to_string())) {
            assert_eq!(t.encode(&word).unwrap().len(), 1, "{word:?}");
        }
        let numbers: Vec<u32> = (0..=LARGEST_NUMBER).filter_map(|n| t.id(&n.to_string())).collect();
        assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1));
        assert_eq!(t.encode("no finding").unwrap().len(), 2);
        assert_eq!(t.encode("[1,2,3,4], [5,6,7,8] white blood cell").unwrap().len(), 1 + 7 + 1 + 7 + 1 + 3);
    }

    #[test]
    fn unwritable_directories_are_named() {
        let e = write_tiny(Path::new("/proc/none"), &TinyProcessorSpec::default()).unwrap_err().to_string();
        assert!(e.contains("/proc/none"), "{e}");
    }
}
