//! Reads one checkpoint: whole files, and tensors by name and range.
//!
//! Each required part is read once. Every byte is verified against the manifest, and the manifest against the log.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};

use crate::digest::{self, part_count, part_range};
use crate::error::{Error, Result};
use crate::index::CheckpointInfo;
use crate::manifest::{FORMAT, Manifest, ManifestObject, ManifestTensor};
use crate::store::Store;

/// Maximum number of parallel reads of parts.
pub(crate) const MAX_PARALLEL_READS: usize = 8;

/// A range of a tensor to read, and its offset in the destination buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadRequest {
    /// Kind of the tensor: `weight`, `exp_avg`, `exp_avg_sq`.
    pub kind: String,
    /// Name of the parameter.
    pub name: String,
    /// Index of the first element.
    pub begin: u64,
    /// Number of elements.
    pub count: u64,
    /// Byte offset in the destination buffer.
    pub destination: usize,
}

/// A byte range of an object, and its offset in the destination buffer.
#[derive(Debug, Clone, Copy)]
struct CopyRange {
    source: u64,
    bytes: u64,
    destination: usize,
}

/// An open checkpoint.
#[derive(Debug, Clone)]
pub struct Reader {
    store: Store,
    info: CheckpointInfo,
    manifest: Manifest,
    /// Index in the manifest by kind and name.
    tensors: HashMap<(String, String), usize>,
}

impl Reader {
    /// Opens a checkpoint by its manifest.
    ///
    /// # Errors
    /// Returns [`Error::Corrupt`] if the manifest is missing, does not match the log or has another format, or a store error.
    pub async fn open(store: &Store, info: &CheckpointInfo) -> Result<Self> {
        let name = format!("{}/manifest.json", info.path);
        let corrupt =
            |why: String| Error::Corrupt { location: store.location().to_string(), object: name.clone(), why };
        let bytes = store.read(&name).await?.ok_or_else(|| corrupt("it is missing".into()))?;
        if digest::root_hash(&digest::hash_parts(&bytes).await) != info.manifest_blake3 {
            return Err(corrupt("its BLAKE3 differs from the one in the log".into()));
        }
        let json: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| corrupt(e.to_string()))?;
        if json["format"] != FORMAT {
            return Err(corrupt(format!(
                "its format is {}, this version reads {FORMAT}: finish or export the run with the version that started it",
                json["format"]
            )));
        }
        let manifest: Manifest = serde_json::from_value(json).map_err(|e| corrupt(e.to_string()))?;
        if manifest.tensors.iter().flat_map(|t| &t.slices).any(|s| s.object >= manifest.objects.len()) {
            return Err(corrupt("a tensor refers to an object that is not listed".into()));
        }
        let key = |(i, t): (usize, &ManifestTensor)| ((t.kind.clone(), t.name.clone()), i);
        let tensors = manifest.tensors.iter().enumerate().map(key).collect();
        Ok(Self { store: store.clone(), info: info.clone(), manifest, tensors })
    }

    /// Returns the checkpoint's entry in the log.
    pub fn info(&self) -> &CheckpointInfo {
        &self.info
    }

    /// Returns the manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns a tensor's entry in the manifest.
    pub fn tensor(&self, kind: &str, name: &str) -> Option<&ManifestTensor> {
        self.tensors.get(&(kind.to_owned(), name.to_owned())).map(|i| &self.manifest.tensors[*i])
    }

    /// Reads a whole object.
    ///
    /// # Errors
    /// Returns [`Error::Corrupt`] if the object is damaged or not in the manifest, or a store error.
    pub async fn read_file(&self, name: &str) -> Result<Bytes> {
        let Some(object) = self.manifest.objects.iter().find(|o| o.name == name) else {
            return Err(self.corrupt(name, "the manifest does not list it".into()));
        };
        let reads = futures::stream::iter(0..part_count(object.size)).map(|i| self.read_part(object, i));
        let mut parts: Vec<Bytes> = reads.buffered(MAX_PARALLEL_READS).try_collect().await?;
        Ok(if parts.len() == 1 { parts.swap_remove(0) } else { parts.concat().into() })
    }

    /// Verifies every byte of an object.
    ///
    /// # Errors
    /// Returns [`Error::Corrupt`] if the object is damaged, or a store error.
    pub async fn verify_object(&self, object: &ManifestObject) -> Result<()> {
        let reads = futures::stream::iter(0..part_count(object.size)).map(|i| self.read_part(object, i));
        let mut reads = reads.buffered(MAX_PARALLEL_READS);
        while reads.try_next().await?.is_some() {}
        // The parts match the manifest; together they must also match the object's hash.
        if part_count(object.size) > 1 && digest::root_hash_of_hex(&object.parts).as_ref() != Some(&object.blake3) {
            return Err(self.corrupt(&object.name, "its BLAKE3 differs from the one in the manifest".into()));
        }
        Ok(())
    }

    /// Verifies every byte of the objects without tensors; objects with tensors are verified as they are read.
    ///
    /// # Errors
    /// See [`Reader::verify_object`].
    pub async fn verify_files(&self) -> Result<()> {
        let mut has_tensors = vec![false; self.manifest.objects.len()];
        self.manifest.tensors.iter().flat_map(|t| &t.slices).for_each(|s| has_tensors[s.object] = true);
        for (object, _) in self.manifest.objects.iter().zip(has_tensors).filter(|(_, has_tensors)| !has_tensors) {
            self.verify_object(object).await?;
        }
        Ok(())
    }

    /// Reads ranges of tensors into `buffer`.
    ///
    /// # Errors
    /// Returns [`Error::NoSuchTensor`] if the checkpoint does not have a requested range or it does not fit the buffer,
    /// [`Error::Corrupt`] if an object is damaged, or a store error.
    pub async fn read(&self, requests: &[ReadRequest], buffer: &mut [u8]) -> Result<()> {
        let mut ranges_by_part: BTreeMap<(usize, usize), Vec<CopyRange>> = BTreeMap::new();
        for request in requests {
            self.add_copy_ranges(request, buffer.len(), &mut ranges_by_part)?;
        }
        let read = |((object, index), ranges): ((usize, usize), Vec<CopyRange>)| async move {
            let object = &self.manifest.objects[object];
            let bytes = self.read_part(object, index).await?;
            Ok::<_, Error>((part_range(object.size, index).start, bytes, ranges))
        };
        let mut parts = futures::stream::iter(ranges_by_part).map(read).buffer_unordered(MAX_PARALLEL_READS);
        while let Some((part_start, bytes, ranges)) = parts.try_next().await? {
            for range in ranges {
                let source = (range.source - part_start) as usize;
                let size = range.bytes as usize;
                buffer[range.destination..range.destination + size].copy_from_slice(&bytes[source..source + size]);
            }
        }
        Ok(())
    }

    /// Adds the byte ranges of a request to `ranges_by_part`, keyed by object and part.
    fn add_copy_ranges(
        &self,
        request: &ReadRequest,
        buffer_len: usize,
        ranges_by_part: &mut BTreeMap<(usize, usize), Vec<CopyRange>>,
    ) -> Result<()> {
        let error = |why: &str| Error::NoSuchTensor {
            step: self.info.step,
            kind: request.kind.clone(),
            name: request.name.clone(),
            why: why.to_owned(),
        };
        let tensor = self.tensor(&request.kind, &request.name).ok_or_else(|| error("there is no such tensor"))?;
        let width = tensor.dtype.size();
        let request_end = request.begin + request.count;
        if request_end > tensor.count() || request.destination as u64 + request.count * width > buffer_len as u64 {
            return Err(error(&format!("its shape is {:?}", tensor.shape)));
        }
        for slice in &tensor.slices {
            let begin = slice.begin.max(request.begin);
            let end = (slice.begin + slice.count).min(request_end);
            if begin >= end {
                continue;
            }
            let object = &self.manifest.objects[slice.object];
            let mut source = slice.offset + (begin - slice.begin) * width;
            let source_end = slice.offset + (end - slice.begin) * width;
            if source_end > object.size {
                return Err(self.corrupt("manifest.json", format!("`{}` extends beyond its object", request.name)));
            }
            let mut destination = request.destination + ((begin - request.begin) * width) as usize;
            while source < source_end {
                let index = (source / digest::PART_BYTES as u64) as usize;
                let bytes = part_range(object.size, index).end.min(source_end) - source;
                let range = CopyRange { source, bytes, destination };
                ranges_by_part.entry((slice.object, index)).or_default().push(range);
                source += bytes;
                destination += bytes as usize;
            }
        }
        Ok(())
    }

    /// Reads one part of an object and verifies it.
    async fn read_part(&self, object: &ManifestObject, index: usize) -> Result<Bytes> {
        let name = format!("{}/{}", self.info.path, object.name);
        let corrupt = |why: String| self.corrupt(&object.name, why);
        let is_single = part_count(object.size) == 1;
        // A small object is read whole, which also detects one that has grown.
        let bytes =
            if is_single { self.store.read(&name).await? } else { self.read_range(&name, object, index).await? };
        let bytes = bytes.ok_or_else(|| corrupt("it is missing".into()))?;
        let range = part_range(object.size, index);
        let expected_len = range.end - range.start;
        if bytes.len() as u64 != expected_len {
            return Err(corrupt(format!(
                "its part {index} has {} bytes, but {expected_len} according to the manifest",
                bytes.len()
            )));
        }
        let expected_hash = if is_single { Some(&object.blake3) } else { object.parts.get(index) };
        if expected_hash != Some(&digest::hex(&digest::hash_part_async(&bytes, index, object.size).await)) {
            return Err(corrupt("its BLAKE3 differs from the one in the manifest".into()));
        }
        Ok(bytes)
    }

    /// Reads a part of a large object, and reports an object that has another size as damaged, not as unreadable.
    async fn read_range(&self, name: &str, object: &ManifestObject, index: usize) -> Result<Option<Bytes>> {
        match self.store.read_range(name, part_range(object.size, index)).await {
            Err(e @ Error::Read { .. }) => match self.store.size(name).await? {
                Some(size) if size != object.size => Err(self.corrupt(
                    &object.name,
                    format!("it has {size} bytes, but {} according to the manifest", object.size),
                )),
                _ => Err(e),
            },
            other => other,
        }
    }

    pub(crate) fn corrupt(&self, name: &str, why: String) -> Error {
        let object = format!("{}/{name}", self.info.path);
        Error::Corrupt { location: self.store.location().to_string(), object, why }
    }
}
