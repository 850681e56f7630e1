//! Whole model directories: files next to the weights, export in another dtype or with merged adapters, and a content hash.

use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use crate::adapters::modules::select;
use crate::weights::{overwrite, weight_files};
use crate::{AdapterMerger, ModelError, Result, Vlm, VlmConfig, read_adapter_files};

/// Returns the files of a model directory that are neither weights nor configuration (tokenizer, processor, chat template), sorted.
///
/// # Errors
/// Returns [`ModelError::Io`] if the directory cannot be read.
pub fn companion_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let model_files = ["config.json", "generation_config.json", "manifest.json"];
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| ModelError::io(dir, e))? {
        let path = entry.map_err(|e| ModelError::io(dir, e))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        let weights = name.contains(".safetensors") || name.ends_with(".bin");
        let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if !weights && plain && !name.starts_with('.') && !model_files.contains(&name) && path.is_file() {
            out.push(path);
        }
    }
    out.sort();
    Ok(out)
}

/// Loads, checks and rewrites a model directory so that transformers' auto classes load it: weights as `kind` (`None`: as stored) under
/// their published names, in shards if they are large, and the companion files. Adapters in the directory `adapter` (peft's format) are
/// merged into the weights, which are rounded once.
///
/// # Errors
/// Returns the error of reading or writing a file, with the tensor or key that is wrong.
pub fn export(dir: &Path, out: &Path, kind: Option<Kind>, adapter: Option<&Path>) -> Result<VlmConfig> {
    let stored = VlmConfig::load(dir)?.dtype;
    let kind = kind.unwrap_or(stored);
    let mut vlm = Vlm::load(dir, Device::Cpu, if adapter.is_some() { kind } else { stored })?;
    let canonical = |path: &Path| std::fs::canonicalize(path).ok();
    if canonical(dir).is_some() && canonical(dir) == canonical(out) {
        return Err(ModelError::input(format!(
            "{} cannot be exported onto itself: choose another output directory",
            dir.display()
        )));
    }
    if let Some(adapter) = adapter {
        check_adapter_base(adapter, dir)?;
        let files = read_adapter_files(adapter)?;
        let (_, targets) = select(vlm.named_parameters(), &files.modules)?;
        overwrite(adapter, &targets, &files.parameters)?;
        AdapterMerger::default().merge(&mut vlm, &files.adapters, files.spec.scale())?;
    }
    vlm.save_as(out, kind)?;
    copy_companion_files(dir, out)?;
    VlmConfig::load(out)
}

/// File beside adapters with the [`fingerprint`] of the model that they belong to.
const BASE_FILE: &str = "base.blake3";

/// Records in the directory `adapter` that its adapters belong to the model with the fingerprint `base`.
///
/// # Errors
/// Returns [`ModelError::Io`] if the file cannot be written.
pub fn record_adapter_base(adapter: &Path, base: &str) -> Result<()> {
    let path = adapter.join(BASE_FILE);
    std::fs::write(&path, format!("{base}\n")).map_err(|e| ModelError::io(&path, e))
}

/// Checks that the adapters in the directory `adapter` belong to the model in `base`; adapters without a record fit any model.
///
/// # Errors
/// Returns [`ModelError::Input`] if they belong to another model, and [`ModelError::Io`] if a file cannot be read.
pub fn check_adapter_base(adapter: &Path, base: &Path) -> Result<()> {
    let path = adapter.join(BASE_FILE);
    if !path.exists() {
        return Ok(());
    }
    let recorded = std::fs::read_to_string(&path).map_err(|e| ModelError::io(&path, e))?;
    let recorded = recorded.trim();
    let present = fingerprint(base)?;
    if recorded == present {
        return Ok(());
    }
    Err(ModelError::input(format!(
        "the adapters in {} belong to the model with BLAKE3 {recorded}, but {} has {present}: use the model that they were trained on",
        adapter.display(),
        base.display()
    )))
}

/// Copies the [`companion_files`] of `dir` to `out`.
///
/// # Errors
/// Returns [`ModelError::Io`] if a file cannot be read or written.
pub fn copy_companion_files(dir: &Path, out: &Path) -> Result<()> {
    for path in companion_files(dir)? {
        let name = path.file_name().unwrap_or_default();
        std::fs::copy(&path, out.join(name)).map_err(|e| ModelError::io(&path, e))?;
    }
    Ok(())
}

/// Returns the BLAKE3 hash, in hex, of the `config.json` and weights files of a directory. Directories with equal hashes hold the same
/// model.
///
/// # Errors
/// Returns [`ModelError::Io`] if a file cannot be read.
pub fn fingerprint(dir: &Path) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    for path in std::iter::once(dir.join("config.json")).chain(weight_files(dir)?) {
        let file = std::fs::File::open(&path).map_err(|e| ModelError::io(&path, e))?;
        hash.update_reader(file).map_err(|e| ModelError::io(&path, e))?;
    }
    Ok(hash.finalize().to_hex().to_string())
}
