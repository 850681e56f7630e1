//! A part of a checkpoint as a directory: its files as they are, and its weights joined from all shards into safetensors files as
//! Hugging Face tools read them, a tensor at a time.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result, cause};
use crate::layout::{entry, header};
use crate::load::pick;
use crate::log::RunLog;
use crate::manifest::ManifestTensor;
use crate::read::{Reader, Want};
use crate::store::{Store, nonce};

/// Largest file of weights, as transformers writes them.
const FILE: u64 = 5_000_000_000;
/// Most bytes of a tensor that are held at once.
const HELD: u64 = 256 << 20;

/// Writes the part `part` of a checkpoint (`model`, `adapter`) to the directory `out`, which must not exist or be empty: it appears
/// whole or not at all. Weights go to `STEM.safetensors`, or to several such files with an index where they are large. Returns the
/// files.
///
/// # Errors
/// [`Error::Empty`], [`Error::NoSuchStep`], damage as [`Error::Corrupt`], [`Error::Export`].
pub async fn export(store: &Store, step: Option<u64>, out: &Path, part: &str, stem: &str) -> Result<Vec<PathBuf>> {
    export_limited(store, step, out, (part, stem), FILE).await
}

async fn export_limited(
    store: &Store,
    step: Option<u64>,
    out: &Path,
    (part, stem): (&str, &str),
    limit: u64,
) -> Result<Vec<PathBuf>> {
    let fault = |cause: String| Error::Export { dir: out.display().to_string(), cause };
    let io = |e: std::io::Error| fault(cause(&e));
    let index = crate::index::Index::new(RunLog::read(store).await?.entries());
    let reader = Reader::open(store, pick(store, &index, step)?).await?;
    let mut files: Vec<(String, Value)> = Vec::new();
    for object in &reader.manifest().objects {
        // names come from the store: none may lead out of the directory
        let Some(name) = object.name.strip_prefix(part).and_then(|n| n.strip_prefix('/')) else { continue };
        if name.split('/').any(|s| s.is_empty() || s == "." || s == "..") {
            return Err(fault(format!("the object name `{name}` leads out of the directory")));
        }
        files.push((name.to_owned(), Value::from(object.name.clone())));
    }
    let tensors = reader.manifest().tensors.iter().filter(|t| t.kind == "weight" && t.part == part);
    let weights = share_out(tensors.collect(), limit);
    if files.is_empty() && weights.is_empty() {
        return Err(fault(format!("the checkpoint of step {} has no `{part}`", reader.info().step)));
    }
    let partial = fresh(out).map_err(io)?;
    let written = async {
        let mut made = Vec::new();
        for (name, object) in &files {
            let bytes = reader.file(object.as_str().unwrap_or_default()).await?;
            let path = partial.join(name);
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir).map_err(io)?;
            }
            let mut file = File::create_new(&path).map_err(io)?;
            file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io)?;
            made.push(out.join(name));
        }
        let mut map = Map::new();
        for (at, file) in weights.iter().enumerate() {
            let name = match weights.len() {
                1 => format!("{stem}.safetensors"),
                count => format!("{stem}-{:05}-of-{count:05}.safetensors", at + 1),
            };
            write_weights(&reader, file, &partial.join(&name), out).await?;
            map.extend(file.iter().map(|t| (t.name.clone(), Value::from(name.clone()))));
            made.push(out.join(name));
        }
        if weights.len() > 1 {
            let bytes: u64 = weights.iter().flatten().map(|t| t.count() * t.dtype.size()).sum();
            let listing = json!({"metadata": {"total_size": bytes}, "weight_map": map});
            let name = format!("{stem}.safetensors.index.json");
            std::fs::write(partial.join(&name), format!("{listing:#}\n")).map_err(io)?;
            made.push(out.join(name));
        }
        std::fs::rename(&partial, out).map_err(io)?;
        Ok(made)
    }
    .await;
    if written.is_err() {
        let _ = std::fs::remove_dir_all(&partial);
    }
    written
}

/// Tensors by file, in order; a file is at most `limit` bytes, unless one tensor alone is larger.
fn share_out(tensors: Vec<&ManifestTensor>, limit: u64) -> Vec<Vec<&ManifestTensor>> {
    let (mut out, mut held) = (Vec::<Vec<&ManifestTensor>>::new(), 0);
    for t in tensors {
        let bytes = t.count() * t.dtype.size();
        match out.last_mut().filter(|_| held + bytes <= limit) {
            Some(file) => file.push(t),
            None => {
                out.push(vec![t]);
                held = 0;
            }
        }
        held += bytes;
    }
    out
}

async fn write_weights(reader: &Reader, tensors: &[&ManifestTensor], path: &Path, out: &Path) -> Result<()> {
    let io = |e: std::io::Error| Error::Export { dir: out.display().to_string(), cause: cause(&e) };
    let (mut entries, mut end) = (Map::new(), 0);
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    for t in tensors {
        let bytes = t.count() * t.dtype.size();
        entries.insert(t.name.clone(), entry(t.dtype, &t.shape, end..end + bytes));
        end += bytes;
    }
    let mut file = File::create_new(path).map_err(io)?;
    file.write_all(&header(&entries)).map_err(io)?;
    let mut buffer = Vec::new();
    for batch in batches(tensors) {
        let bytes: u64 = batch.iter().map(|(t, _, count)| count * t.dtype.size()).sum();
        buffer.resize(bytes as usize, 0);
        let mut to = 0;
        let wants: Vec<Want> = batch
            .iter()
            .map(|(t, begin, count)| {
                let want = Want { kind: t.kind.clone(), name: t.name.clone(), begin: *begin, count: *count, to };
                to += (count * t.dtype.size()) as usize;
                want
            })
            .collect();
        reader.read(&wants, &mut buffer).await?;
        file.write_all(&buffer).map_err(io)?;
    }
    file.sync_all().map_err(io)
}

/// Stretches of tensors, in order, that are read at once.
fn batches<'a>(tensors: &[&'a ManifestTensor]) -> Vec<Vec<(&'a ManifestTensor, u64, u64)>> {
    let (mut out, mut open, mut held) = (Vec::new(), Vec::new(), 0);
    for t in tensors {
        let (width, mut begin) = (t.dtype.size(), 0);
        while begin < t.count() {
            let count = (t.count() - begin).min(((HELD - held) / width).max(1));
            open.push((*t, begin, count));
            (begin, held) = (begin + count, held + count * width);
            if held + width > HELD {
                out.push(std::mem::take(&mut open));
                held = 0;
            }
        }
    }
    if !open.is_empty() {
        out.push(open);
    }
    out
}

/// A directory beside `out`, which must not exist or be empty.
fn fresh(out: &Path) -> std::io::Result<PathBuf> {
    let taken = |why: &str| Err(std::io::Error::new(std::io::ErrorKind::AlreadyExists, why.to_string()));
    match std::fs::read_dir(out).map(Iterator::count) {
        Ok(1..) => return taken("the directory is not empty"),
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let Some(name) = out.file_name() else { return taken("the path has no last component") };
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
    use crate::layout::{Dtype, Layout, Piece};
    use crate::save::{Checkpoints, Object, Snapshot};
    use crate::tidy::Retention;

    /// Weights that were cut over objects come out whole, in one file or in several with an index; read back by the safetensors crate.
    #[tokio::test]
    async fn shards_are_joined() {
        let store = Store::from_object_store(Arc::new(object_store::memory::InMemory::new()), "", "mem").unwrap();
        let shapes: [(&str, &[u64]); 3] = [("a", &[5, 3]), ("b.weight", &[7]), ("c", &[])];
        let piece = |(name, shape): &(&str, &[u64])| Piece {
            kind: "weight".into(),
            name: (*name).into(),
            part: "model".into(),
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            begin: 0,
            count: shape.iter().product(),
        };
        let value = |name: &str, i: u64| (name.len() as u64 * 1000 + i) as f32;
        let objects: Vec<Object> = Layout::divide(shapes.iter().map(piece).collect(), 32)
            .into_iter()
            .enumerate()
            .map(|(at, layout)| {
                let mut bytes = layout.header().to_vec();
                for (p, _) in layout.pieces() {
                    bytes.extend((p.begin..p.begin + p.count).flat_map(|i| value(&p.name, i).to_le_bytes()));
                }
                // Every shard is a safetensors file of its own.
                assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
                Object { name: format!("shards/{at}.safetensors"), bytes: bytes.into(), layout: Some(layout) }
            })
            .chain([Object { name: "model/config.json".into(), bytes: "{}".into(), layout: None }])
            .collect();
        assert_eq!(objects.len(), 4);
        let retention = Retention { keep: 1, keep_best: false, keep_every: 0 };
        let mut c = Checkpoints::claim(store.clone(), retention).await.unwrap();
        c.save(Snapshot { step: 1, meta: Value::Null, best: false }, objects).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        for (limit, count) in [(FILE, 2), (60, 4)] {
            let out = dir.path().join(count.to_string());
            let files = export_limited(&store, None, &out, ("model", "weights"), limit).await.unwrap();
            assert_eq!(files.len(), count);
            let mut found: BTreeMap<String, Vec<f32>> = BTreeMap::new();
            for path in files.iter().filter(|p| p.extension().is_some_and(|e| e == "safetensors")) {
                let bytes = std::fs::read(path).unwrap();
                for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().iter() {
                    let numbers = view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                    let shape: Vec<u64> = view.shape().iter().map(|n| *n as u64).collect();
                    assert_eq!(shape, shapes.iter().find(|(n, _)| *n == name).unwrap().1);
                    found.insert(name.to_owned(), numbers.collect());
                }
            }
            for (name, shape) in shapes {
                let wanted: Vec<f32> = (0..shape.iter().product()).map(|i| value(name, i)).collect();
                assert_eq!(found[name], wanted, "{name}");
            }
        }
        let listing = std::fs::read(dir.path().join("4/weights.safetensors.index.json")).unwrap();
        let listing: Value = serde_json::from_slice(&listing).unwrap();
        assert_eq!(listing["metadata"]["total_size"], 4 * (15 + 7 + 1));
        assert_eq!(listing["weight_map"]["a"], "weights-00001-of-00002.safetensors");
    }
}
