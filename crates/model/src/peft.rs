//! Adapters on disk as peft lays them out: `adapter_config.json` and `adapter_model.safetensors`, whose tensors are named
//! `base_model.model.` and then as transformers names the layer in memory. Source: peft's checkpoint format
//! (huggingface.co/docs/peft, developer guides), version 0.21.
//!
//! Read is plain LoRA only: whatever else peft can put into these files is refused by its key.

use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Tensor;

use crate::config_json::write_json;
use crate::lora::{Adapters, LoraSpec, check_rank, pairs};
use crate::weights::{read_safetensors, write_safetensors};
use crate::{ModelError, Result, spec};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// Keys that change what an adapter computes; values that leave it plain are null, false, empty, and "none".
const BEYOND: [&str; 16] = [
    "alora_invocation_tokens",
    "bias",
    "fan_in_fan_out",
    "alpha_pattern",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
];

/// Initialisations that leave the base model's weights as they are; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them, so
/// that their adapters do not belong to the weights that lie in the base model's directory.
const PLAIN_INITS: [&str; 4] = ["gaussian", "orthogonal", "eva", "mica"];

impl Adapters {
    /// Writes both files, each whole or not at all, which `PeftModel.from_pretrained` loads. `base` is where the base model is,
    /// as a reader of the files should know it.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, dir: &Path, base: &str) -> Result<()> {
        let stored: Vec<(String, Tensor)> =
            self.named_parameters().iter().map(|(n, t)| (Self::stored_name(n), t.shallow_clone())).collect();
        write_safetensors(&dir.join(WEIGHTS), &stored)?;
        self.save_config(dir, base)
    }

    /// The name in peft's files of a tensor that is called `name` here.
    pub fn stored_name(name: &str) -> String {
        format!("{PREFIX}{}", spec::memory_name(name))
    }

    /// Writes `adapter_config.json` alone.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save_config(&self, dir: &Path, base: &str) -> Result<()> {
        let s = self.spec();
        let layers: Vec<String> =
            pairs(dir, self.named_parameters())?.iter().map(|p| spec::memory_name(p.layer)).collect();
        let alpha = if s.alpha.fract() == 0.0 && s.alpha < 1e9 { json!(s.alpha as i64) } else { json!(s.alpha) };
        let config = json!({
            "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": false, "inference_mode": true,
            "init_lora_weights": true, "lora_alpha": alpha, "lora_dropout": 0.0, "modules_to_save": null, "peft_type": "LORA",
            "r": s.rank, "target_modules": layers, "task_type": null, "use_dora": false, "use_rslora": s.rank_stabilised,
        });
        write_json(&dir.join(CONFIG), &config)
    }
}

/// Reads both files: what the adapters are, and their tensors under the names that they have here, in the order of the file.
/// `lora_dropout` is not used.
///
/// # Errors
/// Names the file, and the key or tensor that does not fit.
pub fn read_adapters(dir: &Path) -> Result<(LoraSpec, Vec<(String, Tensor)>)> {
    let path = dir.join(CONFIG);
    let text = std::fs::read(&path).map_err(|e| ModelError::io(&path, e))?;
    let fault = |what: String| ModelError::config(&path, what);
    crate::found::not_a_pointer(&path, &text)?;
    let config: Map<String, Value> = serde_json::from_slice(&text).map_err(|e| fault(format!("not JSON: {e}")))?;
    if config.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        let found = config.get("peft_type").unwrap_or(&Value::Null);
        return Err(fault(format!("peft_type is {found}, only \"LORA\" can be read")));
    }
    for key in BEYOND {
        if let Some(value) = config.get(key).filter(|v| !plain(v)) {
            return Err(fault(format!("{key} is {value}: only plain LoRA can be read, without it")));
        }
    }
    let init = config.get("init_lora_weights").unwrap_or(&Value::Null);
    let known = |name: &str| PLAIN_INITS.iter().any(|p| name.eq_ignore_ascii_case(p));
    if !(init.is_null() || init.is_boolean() || init.as_str().is_some_and(known)) {
        return Err(fault(format!(
            "init_lora_weights is {init}, which changes the base model's weights: its adapters cannot be merged into those of the \
             directory. Save them converted to plain LoRA (peft: save_pretrained(…, path_initial_model_for_weight_conversion=…))"
        )));
    }
    let rank = config.get("r").and_then(Value::as_i64).filter(|r| *r > 0);
    let alpha = config.get("lora_alpha").and_then(Value::as_f64).filter(|a| *a > 0.0 && a.is_finite());
    let (Some(rank), Some(alpha)) = (rank, alpha) else {
        return Err(fault("r and lora_alpha must be numbers above 0".into()));
    };
    let path = dir.join(WEIGHTS);
    let own = |name: &str| name.strip_prefix(PREFIX).map(spec::own_name);
    let named = read_safetensors(&path)?
        .into_iter()
        .map(|(name, tensor)| match own(&name) {
            Some(own) => Ok((own, tensor)),
            None => Err(ModelError::corrupt(&path, format!("tensor `{name}` does not begin with `{PREFIX}`"))),
        })
        .collect::<Result<Vec<_>>>()?;
    let pairs = pairs(&path, &named)?;
    check_rank(&path, &pairs, rank)?;
    let targets = pairs.iter().map(|p| p.layer.to_owned()).collect();
    let rank_stabilised = config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
    Ok((LoraSpec { rank, alpha, rank_stabilised, targets }, named))
}

fn plain(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(s) => s == "none",
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    }
}
