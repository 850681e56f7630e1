//! Writing weights as one file, or as shards of limited size with an index, in Hugging Face layout. Tensors are requested one at a time,
//! so that a model larger than memory can be written.

use std::path::Path;

use serde_json::json;
use tch::Tensor;

use crate::config::parameters::{TensorSpec, published_name};
use crate::files::write_json;
use crate::weights::write_safetensors;
use crate::{ModelError, Result, VlmConfig};

/// Size limit of a file in bytes, as in transformers.
pub(crate) const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Assignment of tensors to files.
pub(crate) struct ShardPlan {
    names: Vec<String>,
    /// Range of tensors of each file.
    files: Vec<std::ops::Range<usize>>,
    bytes: u64,
}

impl ShardPlan {
    /// Assigns tensors to files in order. A file has at most `limit` bytes, unless a single tensor is larger.
    pub(crate) fn new(config: &VlmConfig, specs: &[TensorSpec], limit: u64) -> Self {
        let size =
            |t: &TensorSpec| t.shape.iter().product::<i64>().max(0) as u64 * config.dtype.elt_size_in_bytes() as u64;
        let mut files = Vec::new();
        let mut first = 0;
        let mut file_bytes = 0;
        for (index, spec) in specs.iter().enumerate() {
            if file_bytes > 0 && file_bytes + size(spec) > limit {
                files.push(first..index);
                first = index;
                file_bytes = 0;
            }
            file_bytes += size(spec);
        }
        files.push(first..specs.len());
        let names = specs.iter().map(|s| published_name(config.family, &s.name)).collect();
        Self { names, files, bytes: specs.iter().map(size).sum() }
    }

    fn file_name(&self, index: usize) -> String {
        match self.files.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        }
    }

    /// Writes all files, each atomically, the index last; then removes weights of an earlier save that would be loaded instead.
    /// `tensor` returns the tensor with a given index and is called in order.
    pub(crate) fn write(&self, dir: &Path, tensor: &mut dyn FnMut(usize) -> Result<Tensor>) -> Result<()> {
        let mut map = serde_json::Map::new();
        for (index, range) in self.files.iter().enumerate() {
            let file = self.file_name(index);
            let tensors = range.clone().map(|i| Ok((self.names[i].clone(), tensor(i)?))).collect::<Result<Vec<_>>>()?;
            write_safetensors(&dir.join(&file), &tensors)?;
            map.extend(tensors.into_iter().map(|(name, _)| (name, file.clone().into())));
        }
        let single = dir.join("model.safetensors");
        let index_file = dir.join("model.safetensors.index.json");
        let stale = if self.files.len() == 1 { &index_file } else { &single };
        if self.files.len() > 1 {
            let index = json!({"metadata": {"total_size": self.bytes}, "weight_map": map});
            write_json(&index_file, &index)?;
        }
        match std::fs::remove_file(stale) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(ModelError::io(stale, e)),
            _ => Ok(()),
        }
    }
}
