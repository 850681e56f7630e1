//! The parts of `config.json` that families share: typed access with messages that name the key, the keys of the decoder, and the
//! checks that apply to every family.

use std::path::Path;

use serde_json::{Map, Value, json};
use unveil_core::{Family, UnknownFamily};

use crate::config::family::ConfigText;
use crate::config::{TextConfig, VisionAttention, VisionConfig, VlmConfig};
use crate::dtype::{dtype_name, parse_dtype};
use crate::error::quantised_error;
use crate::files::{read_json, write_json};
use crate::{ModelError, Result};

/// Defaults of a family for keys that the decoder's section omits, and the traits of its decoder.
pub(crate) struct TextDefaults {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub layers: usize,
    pub heads: i64,
    pub kv_heads: i64,
    /// `None`: the hidden size divided by the number of heads.
    pub head_dim: Option<i64>,
    pub max_positions: i64,
    pub eps: f64,
    pub rope_theta: f64,
    pub mrope_section: [i64; 3],
    pub mrope_interleaved: bool,
    pub qkv_bias: bool,
    pub qk_norm: bool,
}

/// Defaults of a family for keys that the vision tower's section omits.
pub(crate) struct VisionDefaults {
    pub depth: usize,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub patch_size: i64,
}

impl VlmConfig {
    /// Reads `config.json` and, if it exists, `generation_config.json` of a model directory.
    ///
    /// # Errors
    /// Returns [`ModelError::Io`] if a file cannot be read, and [`ModelError::Config`] or [`ModelError::Corrupt`] if its content is
    /// invalid.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let mut config = Self::from_json(&read_json(&path)?).map_err(|m| ModelError::config(&path, m))?;
        let path = dir.join("generation_config.json");
        if path.exists() {
            config.generation = Some(read_json(&path)?);
        }
        Ok(config)
    }

    /// Writes `config.json` and `generation_config.json`.
    ///
    /// # Errors
    /// Returns [`ModelError::Io`] if a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join("config.json"), &self.family.config_json(self))?;
        let generation = match &self.generation {
            Some(map) => Value::Object(map.clone()),
            None => json!({
                "_from_model_config": true,
                "bos_token_id": self.text.bos_token_id,
                "eos_token_id": ids_json(&self.text.eos_token_ids),
                "pad_token_id": self.text.pad_token_id,
                "transformers_version": "5.23.0",
                "use_cache": true,
            }),
        };
        write_json(&dir.join("generation_config.json"), &generation)
    }

    /// Returns the end tokens of `generation_config.json`, or of `config.json` if it names none.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        let generation_ids = self.generation.as_ref().and_then(|g| g.get("eos_token_id")).and_then(parse_ids);
        generation_ids.filter(|ids| !ids.is_empty()).unwrap_or_else(|| self.text.eos_token_ids.clone())
    }

    /// Parses the content of `config.json`.
    ///
    /// # Errors
    /// Returns a message that names the key.
    pub fn from_json(root: &Map<String, Value>) -> Result<Self, String> {
        let Some(name) = root.get("model_type").and_then(Value::as_str) else {
            return Err("model_type is missing".into());
        };
        let family: Family = name.parse().map_err(|e: UnknownFamily| e.to_string())?;
        let sections = [Some(root), root.get("text_config").and_then(Value::as_object)];
        if let Some(method) =
            sections.into_iter().flatten().find_map(|map| quantisation(map.get("quantization_config")?))
        {
            return Err(format!("quantization_config: {}", quantised_error(&method)));
        }
        let config = family.parse(root)?;
        config.validate()?;
        Ok(config)
    }

    /// Builds the configuration from the sections that every family reads in the same way.
    pub(crate) fn from_sections(
        family: Family,
        root: &Map<String, Value>,
        text: &JsonSection<'_>,
        defaults: &TextDefaults,
        vision: VisionConfig,
    ) -> Result<Self, String> {
        let top = JsonSection { map: root, name: "" };
        let tied = |map: &Map<String, Value>| map.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false);
        let dtype = root.get("dtype").or_else(|| root.get("torch_dtype")).or_else(|| text.map.get("dtype"));
        Ok(Self {
            family,
            image_token_id: top.id("image_token_id", 151655)?,
            video_token_id: top.id("video_token_id", 151656)?,
            vision_start_token_id: top.id("vision_start_token_id", 151652)?,
            vision_end_token_id: top.id("vision_end_token_id", 151653)?,
            tie_word_embeddings: tied(root) || tied(text.map),
            dtype: parse_dtype(dtype.and_then(Value::as_str).unwrap_or("float32").trim_start_matches("torch."))?,
            text: text_config(text, root, defaults)?,
            vision,
            generation: None,
        })
    }

    fn validate(&self) -> Result<(), String> {
        let t = &self.text;
        let v = &self.vision;
        let positive = [
            ("text_config.vocab_size", t.vocab_size),
            ("text_config.hidden_size", t.hidden_size),
            ("text_config.intermediate_size", t.intermediate_size),
            ("text_config.num_hidden_layers", t.num_hidden_layers as i64),
            ("text_config.num_attention_heads", t.num_attention_heads),
            ("text_config.num_key_value_heads", t.num_key_value_heads),
            ("text_config.head_dim", t.head_dim),
            ("vision_config.hidden_size", v.hidden_size),
            ("vision_config.intermediate_size", v.intermediate_size),
            ("vision_config.num_heads", v.num_heads),
            ("vision_config.in_channels", v.in_channels),
            ("vision_config.patch_size", v.patch_size),
            ("vision_config.temporal_patch_size", v.temporal_patch_size),
            ("vision_config.spatial_merge_size", v.spatial_merge_size),
        ];
        if let Some((key, value)) = positive.iter().find(|(_, value)| *value < 1) {
            return Err(format!("{key} is {value}, but must be at least 1"));
        }
        let divides = [
            ("text_config.num_attention_heads", t.num_attention_heads, "num_key_value_heads", t.num_key_value_heads),
            ("vision_config.hidden_size", v.hidden_size, "num_heads", v.num_heads),
        ];
        if let Some((a, x, b, y)) = divides.iter().find(|(_, x, _, y)| x % y != 0) {
            return Err(format!("{a} ({x}) is not a multiple of {b} ({y})"));
        }
        if t.head_dim % 2 != 0 || t.mrope_section.iter().sum::<i64>() * 2 != t.head_dim {
            return Err(format!(
                "rope_parameters.mrope_section {:?} must sum to half the head size ({})",
                t.mrope_section,
                t.head_dim / 2
            ));
        }
        if (v.hidden_size / v.num_heads) % 4 != 0 {
            return Err(format!("vision head size {} is not a multiple of 4", v.hidden_size / v.num_heads));
        }
        if v.out_hidden_size != t.hidden_size {
            return Err(format!(
                "vision_config.out_hidden_size ({}) differs from text_config.hidden_size ({})",
                v.out_hidden_size, t.hidden_size
            ));
        }
        if v.deepstack().len() > t.num_hidden_layers {
            let k = v.deepstack().len();
            let layers = t.num_hidden_layers;
            return Err(format!("vision_config.deepstack_visual_indexes names {k} blocks for {layers} decoder layers"));
        }
        Ok(())
    }

    /// Builds the whole file from the `text` and `vision` sections of the family.
    pub(crate) fn to_json(&self, architecture: &str, text: Value, vision: Value) -> Value {
        json!({
            "architectures": [architecture],
            "dtype": dtype_name(self.dtype),
            "image_token_id": self.image_token_id,
            "model_type": self.family.name(),
            "text_config": text,
            "tie_word_embeddings": self.tie_word_embeddings,
            "transformers_version": "5.23.0",
            "video_token_id": self.video_token_id,
            "vision_config": vision,
            "vision_end_token_id": self.vision_end_token_id,
            "vision_start_token_id": self.vision_start_token_id,
        })
    }
}

fn text_config(s: &JsonSection<'_>, root: &Map<String, Value>, d: &TextDefaults) -> Result<TextConfig, String> {
    s.expect_str("hidden_act", "silu")?;
    // `rope_parameters` (transformers 5) and `rope_scaling` + `rope_theta` (published checkpoints) are equivalent.
    let object = |key: &str| s.map.get(key).or_else(|| root.get(key)).and_then(Value::as_object);
    let rope = object("rope_scaling").or_else(|| object("rope_parameters"));
    let kind = rope.and_then(|r| r.get("rope_type").or_else(|| r.get("type"))).and_then(Value::as_str);
    if let Some(kind) = kind.filter(|k| !matches!(*k, "default" | "mrope")) {
        return Err(format!("rope_type `{kind}` is not supported, expected `default`"));
    }
    let theta = rope.and_then(|r| r.get("rope_theta")).or_else(|| s.map.get("rope_theta"));
    let mrope_section = match rope.and_then(|r| r.get("mrope_section")) {
        None => d.mrope_section,
        Some(value) => serde_json::from_value(value.clone())
            .map_err(|_| format!("{}rope_parameters.mrope_section is not a list of three numbers", s.name))?,
    };
    let hidden_size = s.int("hidden_size", d.hidden_size)?;
    let heads = s.int("num_attention_heads", d.heads)?;
    let kv = if s.map.get("num_key_value_heads").is_some_and(Value::is_null) { heads } else { d.kv_heads };
    let head_dim = match d.head_dim {
        Some(default) => s.int("head_dim", default)?,
        None if heads > 0 && hidden_size % heads == 0 => hidden_size / heads,
        None => {
            return Err(format!(
                "{}hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({heads})",
                s.name
            ));
        }
    };
    Ok(TextConfig {
        vocab_size: s.int("vocab_size", d.vocab_size)?,
        hidden_size,
        intermediate_size: s.int("intermediate_size", d.intermediate_size)?,
        num_hidden_layers: s.count("num_hidden_layers", d.layers)?,
        num_attention_heads: heads,
        num_key_value_heads: s.int("num_key_value_heads", kv)?,
        head_dim,
        qkv_bias: d.qkv_bias,
        qk_norm: d.qk_norm,
        max_position_embeddings: s.int("max_position_embeddings", d.max_positions)?,
        rms_norm_eps: s.float("rms_norm_eps", d.eps)?,
        rope_theta: theta.and_then(Value::as_f64).unwrap_or(d.rope_theta),
        mrope_section,
        mrope_interleaved: d.mrope_interleaved,
        initializer_range: s.float("initializer_range", 0.02)?,
        bos_token_id: s.map.get("bos_token_id").and_then(Value::as_u64).map(|v| v as u32),
        eos_token_ids: s.map.get("eos_token_id").and_then(parse_ids).unwrap_or_default(),
        pad_token_id: s.map.get("pad_token_id").and_then(Value::as_u64).map(|v| v as u32),
    })
}

/// Builds the decoder's section from the keys that families share, and `more`. transformers 4 reads `rope`, without its base, as
/// `rope_scaling`; transformers 5 reads either spelling.
pub(crate) fn text_json(config: &VlmConfig, rope: Value, more: &[(&str, Value)]) -> Value {
    let t = &config.text;
    let mut parameters = rope.clone();
    extend(&mut parameters, &[("rope_theta", json!(t.rope_theta))]);
    let mut out = json!({
        "attention_dropout": 0.0,
        "bos_token_id": t.bos_token_id,
        "dtype": dtype_name(config.dtype),
        "eos_token_id": ids_json(&t.eos_token_ids),
        "hidden_act": "silu",
        "hidden_size": t.hidden_size,
        "initializer_range": t.initializer_range,
        "intermediate_size": t.intermediate_size,
        "max_position_embeddings": t.max_position_embeddings,
        "model_type": format!("{}_text", config.family.name()),
        "num_attention_heads": t.num_attention_heads,
        "num_hidden_layers": t.num_hidden_layers,
        "num_key_value_heads": t.num_key_value_heads,
        "pad_token_id": t.pad_token_id,
        "rms_norm_eps": t.rms_norm_eps,
        "rope_parameters": parameters,
        "rope_scaling": rope,
        "rope_theta": t.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": true,
        "vocab_size": t.vocab_size,
    });
    extend(&mut out, more);
    out
}

/// Builds the vision tower's section from the keys that families share, and `more`.
pub(crate) fn vision_json(config: &VlmConfig, activation: &str, more: &[(&str, Value)]) -> Value {
    let v = &config.vision;
    let mut out = json!({
        "depth": v.depth,
        "dtype": dtype_name(config.dtype),
        "hidden_act": activation,
        "hidden_size": v.hidden_size,
        "in_channels": v.in_channels,
        "initializer_range": v.initializer_range,
        "intermediate_size": v.intermediate_size,
        "model_type": format!("{}_vision", config.family.name()),
        "num_heads": v.num_heads,
        "out_hidden_size": v.out_hidden_size,
        "patch_size": v.patch_size,
        "rope_parameters": {"rope_theta": v.rope_theta, "rope_type": "axial"},
        "spatial_merge_size": v.spatial_merge_size,
        "temporal_patch_size": v.temporal_patch_size,
    });
    extend(&mut out, more);
    out
}

fn extend(object: &mut Value, more: &[(&str, Value)]) {
    if let Value::Object(map) = object {
        map.extend(more.iter().map(|(k, v)| ((*k).to_owned(), v.clone())));
    }
}

/// Reads the keys of the vision tower that families share; `attention` is what the family has read.
pub(crate) fn vision_config(
    s: &JsonSection<'_>,
    d: &VisionDefaults,
    attention: VisionAttention,
) -> Result<VisionConfig, String> {
    let rope = s.map.get("rope_parameters").and_then(Value::as_object);
    Ok(VisionConfig {
        depth: s.count("depth", d.depth)?,
        hidden_size: s.int("hidden_size", d.hidden_size)?,
        intermediate_size: s.int("intermediate_size", d.intermediate_size)?,
        num_heads: s.int("num_heads", 16)?,
        in_channels: s.int("in_channels", 3)?,
        patch_size: s.int_or_equal_list("patch_size", d.patch_size)?,
        temporal_patch_size: s.int_or_equal_list("temporal_patch_size", 2)?,
        spatial_merge_size: s.int("spatial_merge_size", 2)?,
        out_hidden_size: s.int("out_hidden_size", 3584)?,
        rope_theta: rope.and_then(|r| r.get("rope_theta")).and_then(Value::as_f64).unwrap_or(10_000.0),
        initializer_range: s.float("initializer_range", 0.02)?,
        attention,
    })
}

/// Returns the `vision_config` section.
pub(crate) fn vision_section(root: &Map<String, Value>) -> Result<JsonSection<'_>, String> {
    match root.get("vision_config") {
        Some(Value::Object(map)) => Ok(JsonSection { map, name: "vision_config." }),
        _ => Err("vision_config is missing".into()),
    }
}

/// One object of the file, with its prefix for messages.
pub(crate) struct JsonSection<'a> {
    pub map: &'a Map<String, Value>,
    pub name: &'static str,
}

impl JsonSection<'_> {
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(crate) fn int(&self, key: &str, default: i64) -> Result<i64, String> {
        self.get(key).map_or(Ok(default), |v| {
            v.as_i64().ok_or_else(|| format!("{}{key} is {v}, expected a whole number", self.name))
        })
    }

    pub(crate) fn count(&self, key: &str, default: usize) -> Result<usize, String> {
        let value = self.int(key, default as i64)?;
        usize::try_from(value).map_err(|_| format!("{}{key} is {value}, expected at least 0", self.name))
    }

    pub(crate) fn id(&self, key: &str, default: u32) -> Result<u32, String> {
        let value = self.int(key, i64::from(default))?;
        u32::try_from(value).map_err(|_| format!("{}{key} is {value}, expected a token id", self.name))
    }

    pub(crate) fn float(&self, key: &str, default: f64) -> Result<f64, String> {
        self.get(key)
            .map_or(Ok(default), |v| v.as_f64().ok_or_else(|| format!("{}{key} is {v}, expected a number", self.name)))
    }

    /// Reads an integer, or a list of equal integers.
    pub(crate) fn int_or_equal_list(&self, key: &str, default: i64) -> Result<i64, String> {
        match self.get(key).and_then(Value::as_array) {
            None => self.int(key, default),
            Some(list) => {
                let first = list.first().and_then(Value::as_i64);
                first
                    .filter(|f| list.iter().all(|v| v.as_i64() == Some(*f)))
                    .ok_or_else(|| format!("{}{key} must be one number or equal numbers", self.name))
            }
        }
    }

    /// Reads a list of block indices.
    pub(crate) fn indexes(&self, key: &str, default: &[usize]) -> Result<Vec<usize>, String> {
        match self.get(key) {
            None => Ok(default.to_vec()),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|_| format!("{}{key} is not a list of numbers", self.name)),
        }
    }

    pub(crate) fn expect_str(&self, key: &str, expected: &str) -> Result<(), String> {
        match self.get(key).and_then(Value::as_str) {
            Some(found) if found != expected => {
                Err(format!("{}{key} `{found}` is not supported, expected `{expected}`", self.name))
            }
            _ => Ok(()),
        }
    }
}

/// Describes the quantisation that `quantization_config` states: method and bits. `None` if the key is null.
fn quantisation(config: &Value) -> Option<String> {
    let map = config.as_object()?;
    let text = |key: &str| map.get(key).and_then(Value::as_str).filter(|s| !s.is_empty());
    let is_set = |key: &str| map.get(key).and_then(Value::as_bool) == Some(true);
    let method = text("quant_method").or_else(|| text("quant_type")).unwrap_or("by an unnamed method");
    let bits = map.get("bits").or_else(|| map.get("w_bit")).and_then(Value::as_u64);
    let bits = bits.or_else(|| is_set("load_in_4bit").then_some(4)).or_else(|| is_set("load_in_8bit").then_some(8));
    Some(bits.map_or_else(|| method.to_owned(), |b| format!("{method}, {b} bits")))
}

pub(crate) fn parse_ids(value: &Value) -> Option<Vec<u32>> {
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
