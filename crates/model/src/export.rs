//! Model directories as a whole: what lies beside the weights, and a copy of a directory in another kind of numbers.

use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use crate::{ModelError, Result, Vlm, VlmConfig};

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
/// where they are large, and all that lies beside them. Transformers' auto classes load it.
pub fn export(dir: &Path, out: &Path, kind: Option<Kind>) -> Result<VlmConfig> {
    let stored = VlmConfig::load(dir)?.dtype;
    let vlm = Vlm::load(dir, Device::Cpu, stored)?;
    let same = |a: &Path| std::fs::canonicalize(a).ok();
    if same(dir).is_some() && same(dir) == same(out) {
        return Err(ModelError::input(format!(
            "{} cannot be exported onto itself: name another directory",
            dir.display()
        )));
    }
    vlm.save_as(out, kind.unwrap_or(stored))?;
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
