//! Model directories as a whole: what lies beside the weights, a copy of a directory in another kind of numbers or with adapters
//! merged, and a hash that names what is in one.

use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use crate::weights::weight_files;
use crate::{Merger, ModelError, Result, Vlm, VlmConfig, read_adapters};

/// Files of a model directory that belong to neither weights nor configuration: tokenizer, processor, chat template. Sorted.
pub fn companions(dir: &Path) -> Result<Vec<PathBuf>> {
    let own = ["config.json", "generation_config.json", "manifest.json"];
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| ModelError::io(dir, e))? {
        let path = entry.map_err(|e| ModelError::io(dir, e))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        let weights = name.contains(".safetensors") || name.ends_with(".bin");
        let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if !weights && plain && !name.starts_with('.') && !own.contains(&name) && path.is_file() {
            out.push(path);
        }
    }
    out.sort();
    Ok(out)
}

/// Writes a model directory again, checked: weights in `kind` (none = as they are stored) under the published names, in shards
/// where they are large, and all that lies beside them. Transformers' auto classes load it. The adapters in the directory `adapter`,
/// as peft writes them, are merged into the weights, which are rounded once.
///
/// # Errors
/// Names the file, and the tensor or key that does not fit.
pub fn export(dir: &Path, out: &Path, kind: Option<Kind>, adapter: Option<&Path>) -> Result<VlmConfig> {
    let stored = VlmConfig::load(dir)?.dtype;
    let kind = kind.unwrap_or(stored);
    let mut vlm = Vlm::load(dir, Device::Cpu, if adapter.is_some() { kind } else { stored })?;
    let same = |a: &Path| std::fs::canonicalize(a).ok();
    if same(dir).is_some() && same(dir) == same(out) {
        return Err(ModelError::input(format!(
            "{} cannot be exported onto itself: name another directory",
            dir.display()
        )));
    }
    if let Some(adapter) = adapter {
        let (spec, named) = read_adapters(adapter)?;
        Merger::default().merge(&mut vlm, &named, spec.scale())?;
    }
    vlm.save_as(out, kind)?;
    copy_companions(dir, out)?;
    VlmConfig::load(out)
}

/// Copies what lies beside the weights of `dir` to `out`: tokenizer, processor, chat template.
pub fn copy_companions(dir: &Path, out: &Path) -> Result<()> {
    for path in companions(dir)? {
        let name = path.file_name().unwrap_or_default();
        std::fs::copy(&path, out.join(name)).map_err(|e| ModelError::io(&path, e))?;
    }
    Ok(())
}

/// BLAKE3, in hex, of a directory's `config.json` and weights files: two directories with the same one are the same model.
///
/// # Errors
/// A file that cannot be read.
pub fn fingerprint(dir: &Path) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    for path in std::iter::once(dir.join("config.json")).chain(weight_files(dir)?) {
        let file = std::fs::File::open(&path).map_err(|e| ModelError::io(&path, e))?;
        hash.update_reader(file).map_err(|e| ModelError::io(&path, e))?;
    }
    Ok(hash.finalize().to_hex().to_string())
}
