//! Exports an artifact of a checkpoint (a model or an adapter) as a directory: copies its files, and joins its weights from all shards
//! into safetensors files that Hugging Face tools load, with bounded memory.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result, cause};
use crate::index::CheckpointIndex;
use crate::layout::{header, header_entry};
use crate::load::find;
use crate::log::RunLog;
use crate::manifest::ManifestTensor;
use crate::read::{ReadRequest, Reader};
use crate::store::{Store, nonce};

/// Maximum size of a weights file in bytes, as in transformers.
const MAX_FILE_BYTES: u64 = 5_000_000_000;
/// Maximum size in bytes of the tensor data in memory at a time.
const BUFFER_BYTES: u64 = 256 << 20;

/// Exports an artifact of a checkpoint (`model`, `adapter`) to the directory `out`, which must be empty or not exist, and returns the
/// files. The directory appears complete or not at all. Weights are written to `STEM.safetensors`, or, if they are large, to several
/// such files with an index.
///
/// # Errors
/// Returns [`Error::NoCheckpoint`] or [`Error::NoSuchStep`] if there is no such checkpoint, [`Error::Corrupt`] if it is damaged, and
/// [`Error::Export`] if it lacks the artifact or a file cannot be written.
pub async fn export(store: &Store, step: Option<u64>, out: &Path, artifact: &str, stem: &str) -> Result<Vec<PathBuf>> {
    export_with_file_limit(store, step, out, (artifact, stem), MAX_FILE_BYTES).await
}

async fn export_with_file_limit(
    store: &Store,
    step: Option<u64>,
    out: &Path,
    (artifact, stem): (&str, &str),
    limit: u64,
) -> Result<Vec<PathBuf>> {
    let error = |cause: String| Error::Export { dir: out.display().to_string(), cause };
    let io_error = |e: std::io::Error| error(cause(&e));
    let index = CheckpointIndex::new(RunLog::read(store).await?.entries());
    let reader = Reader::open(store, find(store, &index, step)?).await?;
    let mut files: Vec<(String, Value)> = Vec::new();
    for object in &reader.manifest().objects {
        // Names come from the store, and must not escape the directory.
        let Some(name) = object.name.strip_prefix(artifact).and_then(|n| n.strip_prefix('/')) else { continue };
        if name.split('/').any(|s| s.is_empty() || s == "." || s == "..") {
            return Err(error(format!("the object name `{name}` points outside the directory")));
        }
        files.push((name.to_owned(), Value::from(object.name.clone())));
    }
    let tensors = reader.manifest().tensors.iter().filter(|t| t.kind == "weight" && t.artifact == artifact);
    let weights = split_into_files(tensors.collect(), limit);
    if files.is_empty() && weights.is_empty() {
        return Err(error(format!("the checkpoint of step {} has no `{artifact}`", reader.info().step)));
    }
    let partial = create_partial_dir(out).map_err(io_error)?;
    let written = async {
        let mut paths = Vec::new();
        for (name, object) in &files {
            let bytes = reader.read_file(object.as_str().unwrap_or_default()).await?;
            let path = partial.join(name);
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir).map_err(io_error)?;
            }
            let mut file = File::create_new(&path).map_err(io_error)?;
            file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io_error)?;
            paths.push(out.join(name));
        }
        let mut weight_map = Map::new();
        for (file_index, file) in weights.iter().enumerate() {
            let name = match weights.len() {
                1 => format!("{stem}.safetensors"),
                count => format!("{stem}-{:05}-of-{count:05}.safetensors", file_index + 1),
            };
            write_weights(&reader, file, &partial.join(&name), out).await?;
            weight_map.extend(file.iter().map(|t| (t.name.clone(), Value::from(name.clone()))));
            paths.push(out.join(name));
        }
        if weights.len() > 1 {
            let bytes: u64 = weights.iter().flatten().map(|t| t.count() * t.dtype.size()).sum();
            let index = json!({"metadata": {"total_size": bytes}, "weight_map": weight_map});
            let name = format!("{stem}.safetensors.index.json");
            std::fs::write(partial.join(&name), format!("{index:#}\n")).map_err(io_error)?;
            paths.push(out.join(name));
        }
        std::fs::rename(&partial, out).map_err(io_error)?;
        Ok(paths)
    }
    .await;
    if written.is_err() {
        let _ = std::fs::remove_dir_all(&partial);
    }
    written
}

/// Distributes tensors over files, in order; a file has at most `limit` bytes, unless a single tensor is larger.
fn split_into_files(tensors: Vec<&ManifestTensor>, limit: u64) -> Vec<Vec<&ManifestTensor>> {
    let mut files = Vec::<Vec<&ManifestTensor>>::new();
    let mut file_bytes = 0;
    for t in tensors {
        let bytes = t.count() * t.dtype.size();
        match files.last_mut().filter(|_| file_bytes + bytes <= limit) {
            Some(file) => file.push(t),
            None => {
                files.push(vec![t]);
                file_bytes = 0;
            }
        }
        file_bytes += bytes;
    }
    files
}

async fn write_weights(reader: &Reader, tensors: &[&ManifestTensor], path: &Path, out: &Path) -> Result<()> {
    let io_error = |e: std::io::Error| Error::Export { dir: out.display().to_string(), cause: cause(&e) };
    let mut entries = Map::new();
    let mut end = 0;
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    for t in tensors {
        let bytes = t.count() * t.dtype.size();
        entries.insert(t.name.clone(), header_entry(t.dtype, &t.shape, end..end + bytes));
        end += bytes;
    }
    let mut file = File::create_new(path).map_err(io_error)?;
    file.write_all(&header(&entries)).map_err(io_error)?;
    let mut buffer = Vec::new();
    for batch in batches(tensors) {
        let bytes: u64 = batch.iter().map(|(t, _, count)| count * t.dtype.size()).sum();
        buffer.resize(bytes as usize, 0);
        let mut destination = 0;
        let requests: Vec<ReadRequest> = batch
            .iter()
            .map(|(t, begin, count)| {
                let request = ReadRequest {
                    kind: t.kind.clone(),
                    name: t.name.clone(),
                    begin: *begin,
                    count: *count,
                    destination,
                };
                destination += (count * t.dtype.size()) as usize;
                request
            })
            .collect();
        reader.read(&requests, &mut buffer).await?;
        file.write_all(&buffer).map_err(io_error)?;
    }
    file.sync_all().map_err(io_error)
}

/// Groups ranges of tensors (first element and count), in order, into batches that fit the buffer.
fn batches<'a>(tensors: &[&'a ManifestTensor]) -> Vec<Vec<(&'a ManifestTensor, u64, u64)>> {
    let mut batches = Vec::new();
    let mut current = Vec::new();
    let mut current_bytes = 0;
    for t in tensors {
        let width = t.dtype.size();
        let mut begin = 0;
        while begin < t.count() {
            let count = (t.count() - begin).min(((BUFFER_BYTES - current_bytes) / width).max(1));
            current.push((*t, begin, count));
            begin += count;
            current_bytes += count * width;
            if current_bytes + width > BUFFER_BYTES {
                batches.push(std::mem::take(&mut current));
                current_bytes = 0;
            }
        }
    }
    if !current.is_empty() {
        batches.push(current);
    }
    batches
}

/// Creates a temporary directory next to `out`, which must be empty or not exist.
fn create_partial_dir(out: &Path) -> std::io::Result<PathBuf> {
    let unusable = |why: &str| Err(std::io::Error::new(std::io::ErrorKind::AlreadyExists, why.to_string()));
    match std::fs::read_dir(out).map(Iterator::count) {
        Ok(1..) => return unusable("the directory is not empty"),
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let Some(name) = out.file_name() else { return unusable("the path has no last component") };
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let partial = parent.join(format!(".{}.partial-{}", name.to_string_lossy(), nonce()));
    std::fs::create_dir_all(&partial)?;
    Ok(partial)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;
    use crate::layout::{Dtype, ObjectLayout, TensorSlice};
    use crate::retention::Retention;
    use crate::save::{CheckpointHeader, Checkpoints, Object};

    /// Joins weights that are split over objects, into one file or into several with an index; the safetensors crate reads them back.
    #[tokio::test]
    async fn export_joins_shards() {
        let store = Store::from_object_store(Arc::new(object_store::memory::InMemory::new()), "", "mem").unwrap();
        let shapes: [(&str, &[u64]); 3] = [("a", &[5, 3]), ("b.weight", &[7]), ("c", &[])];
        let slice = |(name, shape): &(&str, &[u64])| TensorSlice {
            kind: "weight".into(),
            name: (*name).into(),
            artifact: "model".into(),
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            begin: 0,
            count: shape.iter().product(),
        };
        let value = |name: &str, i: u64| (name.len() as u64 * 1000 + i) as f32;
        let objects: Vec<Object> = ObjectLayout::split_into_objects(shapes.iter().map(slice).collect(), 32)
            .into_iter()
            .enumerate()
            .map(|(index, layout)| {
                let mut bytes = layout.header().to_vec();
                for (s, _) in layout.slices() {
                    bytes.extend((s.begin..s.begin + s.count).flat_map(|i| value(&s.name, i).to_le_bytes()));
                }
                // Every shard is a complete safetensors file.
                assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
                Object { name: format!("shards/{index}.safetensors"), bytes: bytes.into(), layout: Some(layout) }
            })
            .chain([Object { name: "model/config.json".into(), bytes: "{}".into(), layout: None }])
            .collect();
        assert_eq!(objects.len(), 4);
        let retention = Retention { keep: 1, keep_best: false, keep_every: 0 };
        let mut checkpoints = Checkpoints::claim(store.clone(), retention).await.unwrap();
        checkpoints.save(CheckpointHeader { step: 1, meta: Value::Null, best: false }, objects).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        for (limit, count) in [(MAX_FILE_BYTES, 2), (60, 4)] {
            let out = dir.path().join(count.to_string());
            let files = export_with_file_limit(&store, None, &out, ("model", "weights"), limit).await.unwrap();
            assert_eq!(files.len(), count);
            let mut tensors: BTreeMap<String, Vec<f32>> = BTreeMap::new();
            for path in files.iter().filter(|p| p.extension().is_some_and(|e| e == "safetensors")) {
                let bytes = std::fs::read(path).unwrap();
                for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().iter() {
                    let numbers = view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                    let shape: Vec<u64> = view.shape().iter().map(|n| *n as u64).collect();
                    assert_eq!(shape, shapes.iter().find(|(n, _)| *n == name).unwrap().1);
                    tensors.insert(name.to_owned(), numbers.collect());
                }
            }
            for (name, shape) in shapes {
                let expected: Vec<f32> = (0..shape.iter().product()).map(|i| value(name, i)).collect();
                assert_eq!(tensors[name], expected, "{name}");
            }
        }
        let index = std::fs::read(dir.path().join("4/weights.safetensors.index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 4 * (15 + 7 + 1));
        assert_eq!(index["weight_map"]["a"], "weights-00001-of-00002.safetensors");
    }
}
