//! Adapters in stage 2: a model gets them as the configuration says, checkpoints hold them alone, and what comes out is the merged
//! model and, beside it, the adapters. Must not know: losses, sockets.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use unveil_config::Config;
use unveil_model::{LoraSpec, Vlm, copy_companions, fingerprint, read_adapters};

use crate::error::{LearnerError, Result};

/// The part of a checkpoint that is the adapters.
pub(crate) const ADAPTER: &str = "adapter";

/// The model that adapters lie beside; its weights are in no checkpoint.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    /// Its directory.
    pub dir: PathBuf,
    /// Its [`fingerprint`].
    pub hash: String,
}

impl Base {
    /// The model in `dir`.
    pub fn read(dir: &Path) -> Result<Self> {
        Ok(Self { dir: dir.to_owned(), hash: fingerprint(dir)? })
    }
}

/// Gives `vlm` fresh adapters where `learner.lora` asks for some, and says whether it does.
///
/// # Errors
/// A target that no layer has, a rank above a matrix' side.
pub(crate) fn adapt(vlm: &mut Vlm, config: &Config) -> Result<bool> {
    let Some(spec) = spec(config) else { return Ok(false) };
    vlm.adapt(&spec, config.run.seed).map_err(|e| LearnerError::Setting(format!("learner.lora: {e}")))?;
    Ok(true)
}

fn spec(config: &Config) -> Option<LoraSpec> {
    let l = &config.learner.lora;
    let spec = LoraSpec { rank: l.rank as i64, alpha: l.alpha, rank_stabilised: l.rslora, targets: l.targets.clone() };
    (l.rank > 0).then_some(spec)
}

/// What adapters are, as it is told and compared.
pub(crate) fn told(s: &LoraSpec) -> String {
    format!("rank = {}, alpha = {}, rslora = {}", s.rank, s.alpha, s.rank_stabilised)
}

/// The file of a checkpoint that says what its adapters are.
pub(crate) fn config_file(vlm: &Vlm, base: &Path) -> Result<Option<(String, Bytes)>> {
    let Some(adapters) = vlm.adapters() else { return Ok(None) };
    let scratch = tempfile::tempdir().map_err(LearnerError::io("temporary directory"))?;
    adapters.save_config(scratch.path(), &base.to_string_lossy())?;
    let path = scratch.path().join("adapter_config.json");
    let bytes = std::fs::read(&path).map_err(LearnerError::io(&path))?;
    Ok(Some((format!("{ADAPTER}/adapter_config.json"), bytes.into())))
}

/// Puts the adapters in `dir` in place of those of `vlm`.
///
/// # Errors
/// They cannot be read, or are not those that `learner.lora` asks for.
pub(crate) fn load(vlm: &mut Vlm, dir: &Path) -> Result<()> {
    let (spec, named) = read_adapters(dir)?;
    let fault = |what: String| LearnerError::Setting(format!("{}: {what}", dir.display()));
    let Some(own) = vlm.adapters() else {
        return Err(fault(format!("they are adapters of rank {}, but learner.lora.rank is 0: set it", spec.rank)));
    };
    let (saved, now) = (told(&spec), told(own.spec()));
    if saved != now {
        return Err(fault(differ(&saved, &now)));
    }
    vlm.load_adapters(&named).map_err(|e| fault(format!("the adapters do not fit learner.lora.targets: {e}")))
}

/// That adapters are not those that are asked for.
pub(crate) fn differ(saved: &str, now: &str) -> String {
    format!("the adapters were made with {saved}, but learner.lora says {now}: use the same")
}

/// Where adapters are written that belong to the model directory `out`: `adapter` beside it.
pub(crate) fn beside(out: &Path) -> PathBuf {
    out.with_file_name("adapter")
}

/// Writes `vlm` with its adapters merged to `merged`, with what lies beside the weights in `base`, and the adapters to `adapter`.
pub(crate) fn export(vlm: &mut Vlm, base: &Path, merged: &Path, adapter: &Path) -> Result<()> {
    std::fs::create_dir_all(merged).map_err(LearnerError::io(merged))?;
    vlm.merged(|vlm| vlm.save(merged))??;
    copy_companions(base, merged)?;
    if let Some(adapters) = vlm.adapters() {
        adapters.save(adapter, &base.to_string_lossy())?;
    }
    Ok(())
}
