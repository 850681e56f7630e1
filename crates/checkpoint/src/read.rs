//! Reading one checkpoint: files whole, tensors by name and range. Only parts that are asked for are read, each once, and every byte
//! is checked against the manifest, the manifest against the log.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};

use crate::digest::{self, parts, range};
use crate::error::{Error, Result};
use crate::index::CheckpointInfo;
use crate::manifest::{FORMAT, Manifest, ManifestObject, ManifestTensor};
use crate::store::Store;

/// Parts read at once.
pub(crate) const PARALLEL: usize = 8;

/// A stretch of a tensor, and where it is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// `weight`, `exp_avg`, `exp_avg_sq`.
    pub kind: String,
    /// The parameter.
    pub name: String,
    /// The first number.
    pub begin: u64,
    /// How many.
    pub count: u64,
    /// The first byte of the destination.
    pub to: usize,
}

/// Bytes of an object that go to a place of the destination.
#[derive(Debug, Clone, Copy)]
struct Span {
    from: u64,
    bytes: u64,
    to: usize,
}

/// A checkpoint that is read.
#[derive(Debug, Clone)]
pub struct Reader {
    store: Store,
    info: CheckpointInfo,
    manifest: Manifest,
    tensors: HashMap<(String, String), usize>,
}

impl Reader {
    /// Opens a checkpoint by its manifest.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where the manifest is missing, is not that of the log, or of another format; or a store error.
    pub async fn open(store: &Store, info: &CheckpointInfo) -> Result<Self> {
        let name = format!("{}/manifest.json", info.path);
        let corrupt = |why: String| Error::Corrupt { place: store.place().to_string(), object: name.clone(), why };
        let bytes = store.read(&name).await?.ok_or_else(|| corrupt("it is missing".into()))?;
        if digest::root(&digest::all(&bytes).await) != info.manifest_blake3 {
            return Err(corrupt("its BLAKE3 is not the one in the log".into()));
        }
        let found: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| corrupt(e.to_string()))?;
        if found["format"] != FORMAT {
            return Err(corrupt(format!(
                "its format is {}, this version reads {FORMAT}: end or export that run with the version that began it",
                found["format"]
            )));
        }
        let manifest: Manifest = serde_json::from_value(found).map_err(|e| corrupt(e.to_string()))?;
        if manifest.tensors.iter().flat_map(|t| &t.pieces).any(|p| p.object >= manifest.objects.len()) {
            return Err(corrupt("a tensor lies in an object that it does not list".into()));
        }
        let key = |(i, t): (usize, &ManifestTensor)| ((t.kind.clone(), t.name.clone()), i);
        let tensors = manifest.tensors.iter().enumerate().map(key).collect();
        Ok(Self { store: store.clone(), info: info.clone(), manifest, tensors })
    }

    /// Which checkpoint it is.
    pub fn info(&self) -> &CheckpointInfo {
        &self.info
    }

    /// What it consists of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// A tensor's entry.
    pub fn tensor(&self, kind: &str, name: &str) -> Option<&ManifestTensor> {
        self.tensors.get(&(kind.to_owned(), name.to_owned())).map(|i| &self.manifest.tensors[*i])
    }

    /// Reads an object that is no shard whole.
    ///
    /// # Errors
    /// [`Error::Corrupt`], also where there is none of that name; or a store error.
    pub async fn file(&self, name: &str) -> Result<Bytes> {
        let Some(object) = self.manifest.objects.iter().find(|o| o.name == name) else {
            return Err(self.corrupt(name, "the manifest does not list it".into()));
        };
        let all = futures::stream::iter(0..parts(object.size)).map(|i| self.part(object, i)).buffered(PARALLEL);
        let mut all: Vec<Bytes> = all.try_collect().await?;
        Ok(if all.len() == 1 { all.swap_remove(0) } else { all.concat().into() })
    }

    /// Checks every byte of an object.
    ///
    /// # Errors
    /// [`Error::Corrupt`], or a store error.
    pub async fn check(&self, object: &ManifestObject) -> Result<()> {
        let mut all = futures::stream::iter(0..parts(object.size)).map(|i| self.part(object, i)).buffered(PARALLEL);
        while all.try_next().await?.is_some() {}
        // The parts are those of the manifest; they must also be those of its hash.
        if parts(object.size) > 1 && digest::joined(&object.parts).as_ref() != Some(&object.blake3) {
            return Err(self.corrupt(&object.name, "its BLAKE3 is not the one in the manifest".into()));
        }
        Ok(())
    }

    /// Checks every byte of the objects that hold no tensors; those that do are checked as they are read.
    ///
    /// # Errors
    /// As [`Reader::check`].
    pub async fn check_files(&self) -> Result<()> {
        let mut shards = vec![false; self.manifest.objects.len()];
        self.manifest.tensors.iter().flat_map(|t| &t.pieces).for_each(|p| shards[p.object] = true);
        for (object, _) in self.manifest.objects.iter().zip(shards).filter(|(_, shard)| !shard) {
            self.check(object).await?;
        }
        Ok(())
    }

    /// Reads stretches of tensors to their places in `to`.
    ///
    /// # Errors
    /// [`Error::NoTensor`] for what the checkpoint does not have; [`Error::Corrupt`]; or a store error.
    pub async fn read(&self, wants: &[Want], to: &mut [u8]) -> Result<()> {
        let mut spans: BTreeMap<(usize, usize), Vec<Span>> = BTreeMap::new();
        for want in wants {
            self.spans(want, to.len(), &mut spans)?;
        }
        let read = |((object, index), spans): ((usize, usize), Vec<Span>)| async move {
            let object = &self.manifest.objects[object];
            let bytes = self.part(object, index).await?;
            Ok::<_, Error>((range(object.size, index).start, bytes, spans))
        };
        let mut parts = futures::stream::iter(spans).map(read).buffer_unordered(PARALLEL);
        while let Some((first, bytes, spans)) = parts.try_next().await? {
            for s in spans {
                let from = (s.from - first) as usize;
                let size = s.bytes as usize;
                to[s.to..s.to + size].copy_from_slice(&bytes[from..from + size]);
            }
        }
        Ok(())
    }

    /// The parts that hold a stretch, and what of them.
    fn spans(&self, want: &Want, room: usize, out: &mut BTreeMap<(usize, usize), Vec<Span>>) -> Result<()> {
        let missing = |why: &str| Error::NoTensor {
            step: self.info.step,
            kind: want.kind.clone(),
            name: want.name.clone(),
            why: why.to_owned(),
        };
        let tensor = self.tensor(&want.kind, &want.name).ok_or_else(|| missing("it is not there"))?;
        let (width, end) = (tensor.dtype.size(), want.begin + want.count);
        if end > tensor.count() || want.to as u64 + want.count * width > room as u64 {
            return Err(missing(&format!("its shape is {:?}", tensor.shape)));
        }
        for p in &tensor.pieces {
            let (begin, end) = (p.begin.max(want.begin), (p.begin + p.count).min(end));
            if begin >= end {
                continue;
            }
            let object = &self.manifest.objects[p.object];
            let mut from = p.at + (begin - p.begin) * width;
            let last = p.at + (end - p.begin) * width;
            if last > object.size {
                return Err(self.corrupt("manifest.json", format!("`{}` lies beyond its object", want.name)));
            }
            let mut to = want.to + ((begin - want.begin) * width) as usize;
            while from < last {
                let index = (from / digest::PART as u64) as usize;
                let bytes = range(object.size, index).end.min(last) - from;
                out.entry((p.object, index)).or_default().push(Span { from, bytes, to });
                (from, to) = (from + bytes, to + bytes as usize);
            }
        }
        Ok(())
    }

    /// Reads one part of an object and checks it.
    async fn part(&self, object: &ManifestObject, index: usize) -> Result<Bytes> {
        let name = format!("{}/{}", self.info.path, object.name);
        let corrupt = |why: String| self.corrupt(&object.name, why);
        let single = parts(object.size) == 1;
        // A small object is read whole, so that one that has grown is found, too.
        let bytes = if single { self.store.read(&name).await? } else { self.read_part(&name, object, index).await? };
        let bytes = bytes.ok_or_else(|| corrupt("it is missing".into()))?;
        let want = range(object.size, index);
        if bytes.len() as u64 != want.end - want.start {
            return Err(corrupt(format!(
                "its part {index} has {} bytes, the manifest says {}",
                bytes.len(),
                want.end - want.start
            )));
        }
        let told = if single { Some(&object.blake3) } else { object.parts.get(index) };
        if told != Some(&digest::hex(&digest::one(&bytes, index, object.size).await)) {
            return Err(corrupt("its BLAKE3 is not the one in the manifest".into()));
        }
        Ok(bytes)
    }

    /// A part of a large object; one that ends before the part is damaged, not unreadable.
    async fn read_part(&self, name: &str, object: &ManifestObject, index: usize) -> Result<Option<Bytes>> {
        match self.store.read_range(name, range(object.size, index)).await {
            Err(e @ Error::Read { .. }) => match self.store.size(name).await? {
                Some(size) if size != object.size => {
                    Err(self.corrupt(&object.name, format!("it has {size} bytes, the manifest says {}", object.size)))
                }
                _ => Err(e),
            },
            other => other,
        }
    }

    pub(crate) fn corrupt(&self, name: &str, why: String) -> Error {
        let object = format!("{}/{name}", self.info.path);
        Error::Corrupt { place: self.store.place().to_string(), object, why }
    }
}
