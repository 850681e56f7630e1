//! Adapters on disk in peft's layout: `adapter_config.json` and `adapter_model.safetensors`, whose tensor names are `base_model.model.`
//! followed by the in-memory name of the layer in transformers. Source: peft's checkpoint format (huggingface.co/docs/peft, developer
//! guides), version 0.21.
//!
//! Plain LoRA can be read, with modules that were trained whole beside it; every other feature of peft is refused by its key.

use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Tensor;

use crate::adapters::lora::{Adapters, LoraSpec, check_rank, is_adapter, lora_pairs};
use crate::config::parameters;
use crate::files::{refuse_lfs_pointer, write_json};
use crate::weights::{read_safetensors, write_safetensors};
use crate::{ModelError, Result};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// Keys that change what an adapter computes, unless their value is null, false, empty or "none".
const UNSUPPORTED_KEYS: [&str; 15] = [
    "alora_invocation_tokens",
    "bias",
    "fan_in_fan_out",
    "alpha_pattern",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
];

/// Initialisations that leave the weights of the base model unchanged. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them, so that
/// their adapters do not fit the weights in the directory of the base model.
const PLAIN_INITS: [&str; 4] = ["gaussian", "orthogonal", "eva", "mica"];

impl Adapters {
    /// Writes both files, each atomically, for `PeftModel.from_pretrained`. `base` is the path of the base model that is recorded in
    /// the configuration.
    ///
    /// # Errors
    /// Returns [`ModelError::Io`] if a file cannot be written.
    pub fn save(&self, dir: &Path, base: &str) -> Result<()> {
        let stored: Vec<(String, Tensor)> =
            self.saved_tensors().map(|(n, t)| (Self::peft_name(n), t.shallow_clone())).collect();
        write_safetensors(&dir.join(WEIGHTS_FILE), &stored)?;
        self.save_config(dir, base)
    }

    /// Returns the name in peft's files of the tensor that is called `name` in this crate.
    pub fn peft_name(name: &str) -> String {
        format!("{PREFIX}{}", parameters::transformers_name(name))
    }

    /// Writes `adapter_config.json` only.
    ///
    /// # Errors
    /// Returns [`ModelError::Io`] if it cannot be written.
    pub fn save_config(&self, dir: &Path, base: &str) -> Result<()> {
        let s = self.spec();
        let layers: Vec<String> =
            lora_pairs(dir, self.named_parameters())?.iter().map(|p| parameters::transformers_name(p.layer)).collect();
        let modules: Vec<String> = self.module_names().iter().map(|n| parameters::transformers_name(n)).collect();
        let modules = if modules.is_empty() { Value::Null } else { json!(modules) };
        let alpha = if s.alpha.fract() == 0.0 && s.alpha < 1e9 { json!(s.alpha as i64) } else { json!(s.alpha) };
        let config = json!({
            "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": false, "inference_mode": true,
            "init_lora_weights": true, "lora_alpha": alpha, "lora_dropout": 0.0, "modules_to_save": modules, "peft_type": "LORA",
            "r": s.rank, "target_modules": layers, "task_type": null, "use_dora": false, "use_rslora": s.rank_stabilised,
        });
        write_json(&dir.join(CONFIG_FILE), &config)
    }
}

/// Adapters that were read from files, under the names of this crate.
#[derive(Debug)]
pub struct AdapterFiles {
    /// Specification of the adapters.
    pub spec: LoraSpec,
    /// Tensors of the adapters, in the order of the file.
    pub adapters: Vec<(String, Tensor)>,
    /// Names of the modules that were trained whole.
    pub modules: Vec<String>,
    /// Parameters of these modules.
    pub parameters: Vec<(String, Tensor)>,
}

/// Reads adapters that have no modules beside them; see [`read_adapter_files`].
///
/// # Errors
/// Returns the same errors as [`read_adapter_files`], and one that names `modules_to_save` if there are modules.
pub fn read_adapters(dir: &Path) -> Result<(LoraSpec, Vec<(String, Tensor)>)> {
    let files = read_adapter_files(dir)?;
    if !files.modules.is_empty() {
        let message =
            format!("modules_to_save is {:?}, but only plain LoRA, without it, is supported here", files.modules);
        return Err(ModelError::config(&dir.join(CONFIG_FILE), message));
    }
    Ok((files.spec, files.adapters))
}

/// Reads both files: adapters, and the modules that were trained whole beside them. `lora_dropout` is ignored.
///
/// # Errors
/// Returns an error that names the file, and the key or tensor that is unsupported or inconsistent.
pub fn read_adapter_files(dir: &Path) -> Result<AdapterFiles> {
    let path = dir.join(CONFIG_FILE);
    let text = std::fs::read(&path).map_err(|e| ModelError::io(&path, e))?;
    let config_error = |message: String| ModelError::config(&path, message);
    refuse_lfs_pointer(&path, &text)?;
    let config: Map<String, Value> =
        serde_json::from_slice(&text).map_err(|e| config_error(format!("not JSON: {e}")))?;
    if config.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        let peft_type = config.get("peft_type").unwrap_or(&Value::Null);
        return Err(config_error(format!("peft_type is {peft_type}, but only \"LORA\" is supported")));
    }
    for key in UNSUPPORTED_KEYS {
        if let Some(value) = config.get(key).filter(|v| !is_default(v)) {
            return Err(config_error(format!("{key} is {value}, but only plain LoRA, without it, is supported")));
        }
    }
    let init = config.get("init_lora_weights").unwrap_or(&Value::Null);
    let known = |name: &str| PLAIN_INITS.iter().any(|p| name.eq_ignore_ascii_case(p));
    if !(init.is_null() || init.is_boolean() || init.as_str().is_some_and(known)) {
        return Err(config_error(format!(
            "init_lora_weights is {init}, which changes the weights of the base model: these adapters do not fit the weights in its \
             directory. Save them converted to plain LoRA (peft: save_pretrained(…, path_initial_model_for_weight_conversion=…))"
        )));
    }
    let rank = config.get("r").and_then(Value::as_i64).filter(|r| *r > 0);
    let alpha = config.get("lora_alpha").and_then(Value::as_f64).filter(|a| *a > 0.0 && a.is_finite());
    let (Some(rank), Some(alpha)) = (rank, alpha) else {
        return Err(config_error("r and lora_alpha must be positive numbers".into()));
    };
    let modules: Vec<String> = match config.get("modules_to_save") {
        None | Some(Value::Null) => Vec::new(),
        Some(value) => serde_json::from_value(value.clone())
            .map_err(|_| config_error(format!("modules_to_save is {value}, expected a list of names")))?,
    };
    let modules: Vec<String> = modules.iter().map(|n| parameters::canonical_name(n)).collect();
    let path = dir.join(WEIGHTS_FILE);
    let without_prefix = |name: &str| name.strip_prefix(PREFIX).map(parameters::canonical_name);
    let named = read_safetensors(&path)?
        .into_iter()
        .map(|(name, tensor)| match without_prefix(&name) {
            Some(name) => Ok((name, tensor)),
            None => {
                Err(ModelError::corrupt(&path, format!("the name of tensor `{name}` does not begin with `{PREFIX}`")))
            }
        })
        .collect::<Result<Vec<_>>>()?;
    let is_parameter = |(name, _): &(String, Tensor)| !modules.is_empty() && !is_adapter(name);
    let (parameters, adapters): (Vec<_>, Vec<_>) = named.into_iter().partition(is_parameter);
    let pairs = lora_pairs(&path, &adapters)?;
    check_rank(&path, &pairs, rank)?;
    let targets = pairs.iter().map(|p| p.layer.to_owned()).collect();
    let rank_stabilised = config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
    let spec = LoraSpec { rank, alpha, rank_stabilised, targets };
    Ok(AdapterFiles { spec, adapters, modules, parameters })
}

/// Returns whether a value leaves plain LoRA unchanged.
fn is_default(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(s) => s == "none",
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    }
}
