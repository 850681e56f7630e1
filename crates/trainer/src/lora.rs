//! LoRA adapters in both stages: they are attached to the model as configured, and exported both merged into the model and on their own.

use std::path::{Path, PathBuf};

use unveil_config::Config;
use unveil_model::{AdapterFiles, LoraSpec, Vlm, copy_companion_files, fingerprint, read_adapter_files};

use crate::error::{Result, TrainerError};

/// The model that adapters are attached to; its weights are in no checkpoint.
#[derive(Debug, Clone)]
pub struct BaseModel {
    /// Its directory.
    pub dir: PathBuf,
    /// Its [`fingerprint`].
    pub hash: String,
}

impl BaseModel {
    /// Reads the model in `dir`.
    ///
    /// # Errors
    /// Returns an error of the model if a file cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        Ok(Self { dir: dir.to_owned(), hash: fingerprint(dir)? })
    }
}

/// Attaches fresh adapters to `vlm` if `learner.lora` asks for some, and returns whether it does.
///
/// # Errors
/// Returns [`TrainerError::Setting`] if no layer has a target, or if the rank exceeds a dimension of a matrix.
pub fn attach_adapters(vlm: &mut Vlm, config: &Config) -> Result<bool> {
    let Some(spec) = spec(config) else { return Ok(false) };
    vlm.init_adapters(&spec, config.run.seed).map_err(|e| TrainerError::Setting(format!("learner.lora: {e}")))?;
    Ok(true)
}

fn spec(config: &Config) -> Option<LoraSpec> {
    let l = &config.learner.lora;
    let spec = LoraSpec { rank: l.rank as i64, alpha: l.alpha, rank_stabilised: l.rslora, targets: l.targets.clone() };
    (l.rank > 0).then_some(spec)
}

/// Attaches fresh adapters to `vlm` if `sft.lora` asks for some, selects the modules that are trained beside them, and returns whether it
/// does.
///
/// # Errors
/// Returns [`TrainerError::Setting`] if no layer has a target or no module a name, if the rank exceeds a dimension of a matrix, or if a
/// module contains an adapter.
pub fn attach_sft_adapters(vlm: &mut Vlm, config: &Config) -> Result<bool> {
    let l = &config.sft.lora;
    if l.rank == 0 {
        return Ok(false);
    }
    let spec = LoraSpec { rank: l.rank as i64, alpha: l.alpha, rank_stabilised: l.rslora, targets: l.targets.clone() };
    let invalid = |e: unveil_model::ModelError| TrainerError::Setting(format!("sft.lora: {e}"));
    vlm.init_adapters(&spec, config.run.seed).map_err(invalid)?;
    vlm.save_modules(&l.modules_to_save).map_err(invalid)?;
    Ok(true)
}

/// Describes the settings of adapters; descriptions are compared to find out whether adapters fit.
pub fn describe(s: &LoraSpec) -> String {
    format!("rank = {}, alpha = {}, rslora = {}", s.rank, s.alpha, s.rank_stabilised)
}

/// Loads the adapters in `dir`, with the modules beside them if there are any, into those of `vlm`, which `section.lora` configures.
///
/// # Errors
/// Returns an error of the model if they cannot be read, and [`TrainerError::Setting`] if they do not match the configuration.
pub fn load(vlm: &mut Vlm, dir: &Path, section: &str) -> Result<()> {
    let AdapterFiles { spec, adapters: mut named, parameters, .. } = read_adapter_files(dir)?;
    named.extend(parameters);
    let invalid = |what: String| TrainerError::Setting(format!("{}: {what}", dir.display()));
    let Some(adapters) = vlm.adapters() else {
        return Err(invalid(format!("the adapters have rank {}, but {section}.lora.rank is 0: set it", spec.rank)));
    };
    let saved = describe(&spec);
    let configured = describe(adapters.spec());
    if saved != configured {
        return Err(invalid(mismatch(section, &saved, &configured)));
    }
    vlm.load_adapters(&named).map_err(|e| invalid(format!("the adapters do not fit {section}.lora.targets: {e}")))
}

/// Returns the message for adapters whose settings are not the configured ones.
pub fn mismatch(section: &str, saved: &str, configured: &str) -> String {
    format!("the adapters were trained with {saved}, but {section}.lora has {configured}: use the same settings")
}

/// Returns the directory for the adapters of the model directory `out` next to it: `adapter` of `model`, else `NAME-adapter`.
pub fn adapter_dir(out: &Path) -> PathBuf {
    match out.file_name().and_then(|n| n.to_str()) {
        Some("model") | None => out.with_file_name("adapter"),
        Some(name) => out.with_file_name(format!("{name}-adapter")),
    }
}

/// Writes `vlm` with its adapters merged to `merged`, along with the other files of the model directory `base`, and the adapters to
/// `adapter`.
///
/// # Errors
/// Returns [`TrainerError::Io`] or an error of the model if a file cannot be read or written.
pub fn export(vlm: &mut Vlm, base: &Path, merged: &Path, adapter: &Path) -> Result<()> {
    std::fs::create_dir_all(merged).map_err(TrainerError::io(merged))?;
    vlm.merged(|vlm| vlm.save(merged))??;
    copy_companion_files(base, merged)?;
    if let Some(adapters) = vlm.adapters() {
        adapters.save(adapter, &base.to_string_lossy())?;
    }
    Ok(())
}
