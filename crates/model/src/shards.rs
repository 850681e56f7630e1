//! A model's weights as files: one, or shards of limited size with an index, as Hugging Face tools write and read them.
//! Tensors are asked for one after another, so that a model larger than memory can be written.

use std::path::Path;

use serde_json::json;
use tch::Tensor;

use crate::spec::TensorSpec;
use crate::weights::write_safetensors;
use crate::{ModelError, Result, VlmConfig};

/// Largest file, as transformers writes them.
pub(crate) const SHARD_BYTES: u64 = 5_000_000_000;

/// Which tensor goes to which file.
pub(crate) struct Plan {
    names: Vec<String>,
    /// Ranges of tensors by file.
    files: Vec<std::ops::Range<usize>>,
    bytes: u64,
}

impl Plan {
    /// Shares the tensors out in order; a file is at most `limit` bytes, unless one tensor alone is larger.
    pub(crate) fn new(config: &VlmConfig, specs: &[TensorSpec], limit: u64) -> Self {
        let size =
            |t: &TensorSpec| t.shape.iter().product::<i64>().max(0) as u64 * config.dtype.elt_size_in_bytes() as u64;
        let (mut files, mut first, mut held) = (Vec::new(), 0, 0);
        for (index, spec) in specs.iter().enumerate() {
            if held > 0 && held + size(spec) > limit {
                files.push(first..index);
                (first, held) = (index, 0);
            }
            held += size(spec);
        }
        files.push(first..specs.len());
        let names = specs.iter().map(|s| config.family.stored_name(&s.name)).collect();
        Self { names, files, bytes: specs.iter().map(size).sum() }
    }

    fn file(&self, index: usize) -> String {
        match self.files.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        }
    }

    /// Writes all files, each whole or not at all, the index last; then removes weights of an earlier save that would be read
    /// instead. `tensor` gives the tensors in order.
    pub(crate) fn write(&self, dir: &Path, tensor: &mut dyn FnMut(usize) -> Result<Tensor>) -> Result<()> {
        let mut map = serde_json::Map::new();
        for (index, range) in self.files.iter().enumerate() {
            let file = self.file(index);
            let part = range.clone().map(|i| Ok((self.names[i].clone(), tensor(i)?))).collect::<Result<Vec<_>>>()?;
            write_safetensors(&dir.join(&file), &part)?;
            map.extend(part.into_iter().map(|(name, _)| (name, file.clone().into())));
        }
        let (single, listing) = (dir.join("model.safetensors"), dir.join("model.safetensors.index.json"));
        let stale = if self.files.len() == 1 { &listing } else { &single };
        if self.files.len() > 1 {
            let index = json!({"metadata": {"total_size": self.bytes}, "weight_map": map});
            crate::config_json::write_json(&listing, &index)?;
        }
        match std::fs::remove_file(stale) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(ModelError::io(stale, e)),
            _ => Ok(()),
        }
    }
}
