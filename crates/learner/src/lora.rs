//! Adapters in stage 2: a model gets them as the configuration says, checkpoints hold them alone, and what comes out is the merged
//! model and, beside it, the adapters. Must not know: losses, sockets.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use tch::Tensor;
use unveil_config::Config;
use unveil_model::{LoraSpec, Vlm, copy_companions, fingerprint, read_adapters};

use crate::error::{LearnerError, Result};

/// Objects of a checkpoint that belong to the adapters.
pub(crate) const ADAPTER: &str = "adapter/";

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

/// Adapters of a checkpoint.
pub(crate) struct SavedAdapters {
    spec: LoraSpec,
    named: Vec<(String, Tensor)>,
}

impl SavedAdapters {
    /// Writes adapters as objects of a checkpoint.
    pub fn objects(vlm: &Vlm, base: &Path) -> Result<Vec<(String, Bytes)>> {
        let Some(adapters) = vlm.adapters() else { return Ok(Vec::new()) };
        let scratch = scratch()?;
        adapters.save(scratch.path(), &base.to_string_lossy())?;
        let mut out = Vec::new();
        for entry in std::fs::read_dir(scratch.path()).map_err(LearnerError::io(scratch.path()))? {
            let path = entry.map_err(LearnerError::io(scratch.path()))?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            out.push((format!("{ADAPTER}{name}"), std::fs::read(&path).map_err(LearnerError::io(&path))?.into()));
        }
        Ok(out)
    }

    /// Reads them from objects; none where a checkpoint has no adapters.
    pub fn read<'a>(objects: impl Iterator<Item = (&'a String, &'a Bytes)>) -> Result<Option<Self>> {
        let scratch = scratch()?;
        let mut any = false;
        for (name, bytes) in objects {
            // Names come from the store: only plain files of one folder are taken.
            let Some(file) = name.strip_prefix(ADAPTER).filter(|f| !f.is_empty() && !f.contains('/')) else { continue };
            let path = scratch.path().join(file);
            std::fs::write(&path, bytes).map_err(LearnerError::io(&path))?;
            any = true;
        }
        if !any {
            return Ok(None);
        }
        let (spec, named) = read_adapters(scratch.path())?;
        Ok(Some(Self { spec, named }))
    }

    /// Puts them in place of those of `vlm`; the error says what is not the same there.
    pub fn load_into(&self, vlm: &mut Vlm) -> Result<(), String> {
        let Some(own) = vlm.adapters() else {
            return Err(format!("they are adapters of rank {}, but learner.lora.rank is 0: set it", self.spec.rank));
        };
        let told = |s: &LoraSpec| format!("rank = {}, alpha = {}, rslora = {}", s.rank, s.alpha, s.rank_stabilised);
        let (saved, now) = (told(&self.spec), told(own.spec()));
        if saved != now {
            return Err(format!("the adapters were made with {saved}, but learner.lora says {now}: use the same"));
        }
        vlm.load_adapters(&self.named).map_err(|e| format!("the adapters do not fit learner.lora.targets: {e}"))
    }
}

/// Puts the adapters in `dir` in place of those of `vlm`.
///
/// # Errors
/// They cannot be read, or are not those that `learner.lora` asks for.
pub(crate) fn load(vlm: &mut Vlm, dir: &Path) -> Result<()> {
    let (spec, named) = read_adapters(dir)?;
    let found = SavedAdapters { spec, named }.load_into(vlm);
    found.map_err(|what| LearnerError::Setting(format!("{}: {what}", dir.display())))
}

fn scratch() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(LearnerError::io("temporary directory"))
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
