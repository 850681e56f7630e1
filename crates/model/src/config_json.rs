//! `config.json` as text: parsing with defaults and messages that name the key, and the canonical form that is written.

use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;

use crate::config::{TextConfig, VisionConfig, VlmConfig};
use crate::{ModelError, Result};

impl VlmConfig {
    /// Parses the content of `config.json`. The error is a message that names the key.
    pub fn from_json(root: &Map<String, Value>) -> Result<Self, String> {
        if let Some(family) = root.get("model_type").and_then(Value::as_str)
            && family != "qwen2_5_vl"
        {
            return Err(format!("model_type `{family}` is not supported, expected `qwen2_5_vl`"));
        }
        // Published checkpoints keep the decoder's keys at the top.
        let text = match root.get("text_config") {
            Some(Value::Object(text)) => Section { map: text, name: "text_config." },
            None | Some(Value::Null) => Section { map: root, name: "" },
            Some(_) => return Err("text_config is not an object".into()),
        };
        let vision = match root.get("vision_config") {
            Some(Value::Object(vision)) => Section { map: vision, name: "vision_config." },
            _ => return Err("vision_config is missing".into()),
        };
        let top = Section { map: root, name: "" };
        let text_tied = text.map.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false);
        let dtype = root.get("dtype").or_else(|| root.get("torch_dtype")).or_else(|| text.map.get("dtype"));
        let config = Self {
            image_token_id: top.id("image_token_id", 151655)?,
            video_token_id: top.id("video_token_id", 151656)?,
            vision_start_token_id: top.id("vision_start_token_id", 151652)?,
            vision_end_token_id: top.id("vision_end_token_id", 151653)?,
            tie_word_embeddings: root.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false) || text_tied,
            dtype: kind_of(dtype.and_then(Value::as_str).unwrap_or("float32"))?,
            text: text_config(&text, root)?,
            vision: vision_config(&vision)?,
            generation: None,
        };
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<(), String> {
        let (t, v) = (&self.text, &self.vision);
        let positive = [
            ("text_config.vocab_size", t.vocab_size),
            ("text_config.hidden_size", t.hidden_size),
            ("text_config.intermediate_size", t.intermediate_size),
            ("text_config.num_hidden_layers", t.num_hidden_layers as i64),
            ("text_config.num_attention_heads", t.num_attention_heads),
            ("text_config.num_key_value_heads", t.num_key_value_heads),
            ("vision_config.hidden_size", v.hidden_size),
            ("vision_config.intermediate_size", v.intermediate_size),
            ("vision_config.num_heads", v.num_heads),
            ("vision_config.in_channels", v.in_channels),
            ("vision_config.patch_size", v.patch_size),
            ("vision_config.temporal_patch_size", v.temporal_patch_size),
            ("vision_config.spatial_merge_size", v.spatial_merge_size),
        ];
        if let Some((key, value)) = positive.iter().find(|(_, value)| *value < 1) {
            return Err(format!("{key} is {value}, must be at least 1"));
        }
        let divides = [
            ("text_config.hidden_size", t.hidden_size, "num_attention_heads", t.num_attention_heads),
            ("text_config.num_attention_heads", t.num_attention_heads, "num_key_value_heads", t.num_key_value_heads),
            ("vision_config.hidden_size", v.hidden_size, "num_heads", v.num_heads),
        ];
        if let Some((a, x, b, y)) = divides.iter().find(|(_, x, _, y)| x % y != 0) {
            return Err(format!("{a} ({x}) is not a multiple of {b} ({y})"));
        }
        if t.head_dim() % 2 != 0 || t.mrope_section.iter().sum::<i64>() * 2 != t.head_dim() {
            return Err(format!(
                "rope_parameters.mrope_section {:?} must sum to half the head size ({})",
                t.mrope_section,
                t.head_dim() / 2
            ));
        }
        if (v.hidden_size / v.num_heads) % 4 != 0 {
            return Err(format!("vision head size {} is not a multiple of 4", v.hidden_size / v.num_heads));
        }
        if v.window_cells() < 1 {
            return Err(format!("vision_config.window_size {} is smaller than one merged cell", v.window_size));
        }
        if v.out_hidden_size != t.hidden_size {
            return Err(format!(
                "vision_config.out_hidden_size ({}) differs from text_config.hidden_size ({})",
                v.out_hidden_size, t.hidden_size
            ));
        }
        Ok(())
    }

    pub(crate) fn to_json(&self) -> Value {
        let (t, v) = (&self.text, &self.vision);
        json!({
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "dtype": kind_name(self.dtype),
            "image_token_id": self.image_token_id,
            "model_type": "qwen2_5_vl",
            "text_config": {
                "attention_dropout": 0.0,
                "bos_token_id": t.bos_token_id,
                "dtype": kind_name(self.dtype),
                "eos_token_id": ids_json(&t.eos_token_ids),
                "hidden_act": "silu",
                "hidden_size": t.hidden_size,
                "initializer_range": t.initializer_range,
                "intermediate_size": t.intermediate_size,
                "layer_types": vec!["full_attention"; t.num_hidden_layers],
                "max_position_embeddings": t.max_position_embeddings,
                "max_window_layers": t.num_hidden_layers,
                "model_type": "qwen2_5_vl_text",
                "num_attention_heads": t.num_attention_heads,
                "num_hidden_layers": t.num_hidden_layers,
                "num_key_value_heads": t.num_key_value_heads,
                "pad_token_id": t.pad_token_id,
                "rms_norm_eps": t.rms_norm_eps,
                "rope_parameters": {"mrope_section": t.mrope_section, "rope_theta": t.rope_theta, "rope_type": "default"},
                "sliding_window": null,
                "use_cache": true,
                "use_sliding_window": false,
                "vocab_size": t.vocab_size,
            },
            "tie_word_embeddings": self.tie_word_embeddings,
            "transformers_version": "5.23.0",
            "video_token_id": self.video_token_id,
            "vision_config": {
                "depth": v.depth,
                "dtype": kind_name(self.dtype),
                "fullatt_block_indexes": v.fullatt_block_indexes,
                "hidden_act": "silu",
                "hidden_size": v.hidden_size,
                "in_channels": v.in_channels,
                "initializer_range": v.initializer_range,
                "intermediate_size": v.intermediate_size,
                "model_type": "qwen2_5_vl_vision",
                "num_heads": v.num_heads,
                "out_hidden_size": v.out_hidden_size,
                "patch_size": v.patch_size,
                "rope_parameters": {"rope_theta": v.rope_theta, "rope_type": "axial"},
                "spatial_merge_size": v.spatial_merge_size,
                "temporal_patch_size": v.temporal_patch_size,
                "tokens_per_second": v.tokens_per_second,
                "window_size": v.window_size,
            },
            "vision_end_token_id": self.vision_end_token_id,
            "vision_start_token_id": self.vision_start_token_id,
        })
    }
}

fn text_config(s: &Section, root: &Map<String, Value>) -> Result<TextConfig, String> {
    s.expect_str("hidden_act", "silu")?;
    if s.map.get("use_sliding_window").and_then(Value::as_bool) == Some(true) {
        return Err(format!("{}use_sliding_window = true is not supported", s.name));
    }
    // `rope_parameters` (transformers 5) and `rope_scaling` + `rope_theta` (published) say the same thing.
    let object = |key: &str| s.map.get(key).or_else(|| root.get(key)).and_then(Value::as_object);
    let rope = object("rope_scaling").or_else(|| object("rope_parameters"));
    let kind = rope.and_then(|r| r.get("rope_type").or_else(|| r.get("type"))).and_then(Value::as_str);
    if let Some(kind) = kind.filter(|k| !matches!(*k, "default" | "mrope")) {
        return Err(format!("rope_type `{kind}` is not supported, expected `default`"));
    }
    let theta = rope.and_then(|r| r.get("rope_theta")).or_else(|| s.map.get("rope_theta"));
    let section = match rope.and_then(|r| r.get("mrope_section")) {
        None => [16, 24, 24],
        Some(value) => serde_json::from_value(value.clone())
            .map_err(|_| format!("{}rope_parameters.mrope_section is not a list of three numbers", s.name))?,
    };
    let heads = s.int("num_attention_heads", 64)?;
    let kv = if s.map.get("num_key_value_heads").is_some_and(Value::is_null) { heads } else { 8 };
    Ok(TextConfig {
        vocab_size: s.int("vocab_size", 152064)?,
        hidden_size: s.int("hidden_size", 8192)?,
        intermediate_size: s.int("intermediate_size", 29568)?,
        num_hidden_layers: s.count("num_hidden_layers", 80)?,
        num_attention_heads: heads,
        num_key_value_heads: s.int("num_key_value_heads", kv)?,
        max_position_embeddings: s.int("max_position_embeddings", 32768)?,
        rms_norm_eps: s.float("rms_norm_eps", 1e-5)?,
        rope_theta: theta.and_then(Value::as_f64).unwrap_or(1_000_000.0),
        mrope_section: section,
        initializer_range: s.float("initializer_range", 0.02)?,
        bos_token_id: s.map.get("bos_token_id").and_then(Value::as_u64).map(|v| v as u32),
        eos_token_ids: s.map.get("eos_token_id").and_then(ids).unwrap_or_default(),
        pad_token_id: s.map.get("pad_token_id").and_then(Value::as_u64).map(|v| v as u32),
    })
}

fn vision_config(s: &Section) -> Result<VisionConfig, String> {
    s.expect_str("hidden_act", "silu")?;
    let rope = s.map.get("rope_parameters").and_then(Value::as_object);
    let full = match s.map.get("fullatt_block_indexes") {
        None => vec![7, 15, 23, 31],
        Some(value) => serde_json::from_value(value.clone())
            .map_err(|_| format!("{}fullatt_block_indexes is not a list of numbers", s.name))?,
    };
    Ok(VisionConfig {
        depth: s.count("depth", 32)?,
        hidden_size: s.int("hidden_size", 3584)?,
        intermediate_size: s.int("intermediate_size", 3420)?,
        num_heads: s.int("num_heads", 16)?,
        in_channels: s.int("in_channels", 3)?,
        patch_size: s.square("patch_size", 14)?,
        temporal_patch_size: s.square("temporal_patch_size", 2)?,
        spatial_merge_size: s.int("spatial_merge_size", 2)?,
        window_size: s.int("window_size", 112)?,
        out_hidden_size: s.int("out_hidden_size", 3584)?,
        fullatt_block_indexes: full,
        tokens_per_second: s.int("tokens_per_second", 4)?,
        rope_theta: rope.and_then(|r| r.get("rope_theta")).and_then(Value::as_f64).unwrap_or(10_000.0),
        initializer_range: s.float("initializer_range", 0.02)?,
    })
}

/// One object of the file, with its name for messages.
struct Section<'a> {
    map: &'a Map<String, Value>,
    name: &'static str,
}

impl Section<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn int(&self, key: &str, default: i64) -> Result<i64, String> {
        self.get(key).map_or(Ok(default), |v| {
            v.as_i64().ok_or_else(|| format!("{}{key} is {v}, expected a whole number", self.name))
        })
    }

    fn count(&self, key: &str, default: usize) -> Result<usize, String> {
        let value = self.int(key, default as i64)?;
        usize::try_from(value).map_err(|_| format!("{}{key} is {value}, expected at least 0", self.name))
    }

    fn id(&self, key: &str, default: u32) -> Result<u32, String> {
        let value = self.int(key, i64::from(default))?;
        u32::try_from(value).map_err(|_| format!("{}{key} is {value}, expected a token id", self.name))
    }

    fn float(&self, key: &str, default: f64) -> Result<f64, String> {
        self.get(key)
            .map_or(Ok(default), |v| v.as_f64().ok_or_else(|| format!("{}{key} is {v}, expected a number", self.name)))
    }

    /// A whole number, or a list of equal ones.
    fn square(&self, key: &str, default: i64) -> Result<i64, String> {
        match self.get(key).and_then(Value::as_array) {
            None => self.int(key, default),
            Some(list) => {
                let first = list.first().and_then(Value::as_i64);
                first
                    .filter(|f| list.iter().all(|v| v.as_i64() == Some(*f)))
                    .ok_or_else(|| format!("{}{key} must be one number, or equal numbers", self.name))
            }
        }
    }

    fn expect_str(&self, key: &str, expected: &str) -> Result<(), String> {
        match self.get(key).and_then(Value::as_str) {
            Some(found) if found != expected => {
                Err(format!("{}{key} `{found}` is not supported, expected `{expected}`", self.name))
            }
            _ => Ok(()),
        }
    }
}

pub(crate) fn ids(value: &Value) -> Option<Vec<u32>> {
    match value {
        Value::Number(n) => n.as_u64().map(|v| vec![v as u32]),
        Value::Array(list) => Some(list.iter().filter_map(Value::as_u64).map(|v| v as u32).collect()),
        _ => None,
    }
}

pub(crate) fn ids_json(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    }
}

fn kind_of(name: &str) -> Result<Kind, String> {
    match name.trim_start_matches("torch.") {
        "float32" => Ok(Kind::Float),
        "bfloat16" => Ok(Kind::BFloat16),
        "float16" => Ok(Kind::Half),
        other => Err(format!("dtype `{other}` is not supported, expected float32, bfloat16 or float16")),
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

pub(crate) fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).map_err(|e| ModelError::io(path, e))?;
    serde_json::from_str(&text).map_err(|e| ModelError::config(path, format!("not a JSON object: {e}")))
}

pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| ModelError::config(path, e.to_string()))?;
    text.push('\n');
    crate::weights::write_atomic(path, |tmp| std::fs::write(tmp, &text).map_err(|e| ModelError::io(tmp, e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published() -> Map<String, Value> {
        let value = json!({
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "bfloat16",
            "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
            "max_position_embeddings": 128000, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
            "use_sliding_window": false, "vocab_size": 151936,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2}
        });
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn flat_layout_of_published_checkpoints() {
        let config = VlmConfig::from_json(&published()).expect("parses");
        assert_eq!(
            (config.text.hidden_size, config.text.head_dim(), config.text.mrope_section),
            (2048, 128, [16, 24, 24])
        );
        assert!(config.tie_word_embeddings);
        assert_eq!(config.dtype, Kind::BFloat16);
        assert_eq!(config.default_capture_layer(), 24);
        assert_eq!(config.merged_tokens([1, 8, 12]).expect("fits"), 24);
        assert!(config.merged_tokens([1, 7, 12]).is_err());
    }

    #[test]
    fn writes_what_it_reads() {
        let config = VlmConfig::from_json(&published()).expect("parses");
        let nested = config.to_json();
        let again = VlmConfig::from_json(nested.as_object().expect("object")).expect("parses");
        assert_eq!(config, again);
    }

    #[test]
    fn impossible_values_name_the_key() {
        for (key, value, word) in [
            ("hidden_size", json!(2050), "hidden_size"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("model_type", json!("llava"), "llava"),
            ("num_hidden_layers", json!("many"), "num_hidden_layers"),
            ("rope_scaling", json!({"type": "mrope", "mrope_section": [1, 2, 3]}), "mrope_section"),
            ("rope_scaling", json!({"type": "yarn"}), "yarn"),
        ] {
            let mut map = published();
            map.insert(key.into(), value);
            let message = VlmConfig::from_json(&map).expect_err("must fail");
            assert!(message.contains(word), "{message}");
        }
    }
}
