//! Weights of one version in wire format: the bytes of each tensor in chunks with their CRC-32C, and the difference to
//! the version that a worker holds.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tch::{Kind, Tensor};
use unveil_core::WeightVersion;
use unveil_model::Adapters;
use unveil_proto::v1;

use super::error::{Result, ServerError};
use crate::checksum::{Checksum, TensorChecksums, chunk, version_checksum};
use crate::wire_dtype::wire_name;

/// Bytes per chunk, a multiple of every element size. A chunk is copied and checksummed while it is in the processor's
/// cache.
const CHUNK_BYTES: usize = 1 << 20;

/// Weights passed to [`super::ExperienceServer::publish`].
pub struct NewWeights<'a> {
    /// Version of the weights.
    pub version: WeightVersion,
    /// All tensors by name, of any floating-point dtype, layout and device.
    pub named: &'a [(String, Tensor)],
    /// Dtype on the wire: float32, bfloat16 or float16.
    pub kind: Kind,
    /// Adapters, which are sent in fp32 and change with every version.
    pub adapters: Option<&'a Adapters>,
    /// Returns whether a tensor can change between versions. Others are copied once, with the first version.
    pub may_change: &'a dyn Fn(&str) -> bool,
}

impl std::fmt::Debug for NewWeights<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("NewWeights");
        out.field("version", &self.version)
            .field("tensors", &self.named.len())
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

/// Bytes of a tensor.
#[derive(Debug)]
pub(super) struct PackedTensor {
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
    /// Version of the last change.
    changed_in: WeightVersion,
    sum: Checksum,
    chunks: Vec<v1::WeightsChunk>,
}

impl PackedTensor {
    /// Returns the name of the tensor.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Returns the number of bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.sum.bytes
    }

    /// Returns the bytes, chunk by chunk.
    pub(super) fn data(&self) -> impl Iterator<Item = &[u8]> {
        self.chunks.iter().map(|c| &c.data[..])
    }
}

/// Weights that workers can fetch. A new version reuses the buffers of the previous one unless a stream is still
/// sending them; streams of older versions are dropped. Host memory thus holds one copy besides the model, and two
/// while a stream is in progress.
#[derive(Debug)]
pub(super) struct Published {
    pub version: WeightVersion,
    pub checksum: u32,
    adapter_scale: Option<f64>,
    tensors: Vec<Arc<PackedTensor>>,
}

/// A version that is being packed, part by part.
pub(super) struct Packing<'a> {
    new: &'a NewWeights<'a>,
    adapters: &'a [(String, Tensor)],
    previous: HashMap<String, Arc<PackedTensor>>,
    tensors: Vec<Arc<PackedTensor>>,
}

impl<'a> Packing<'a> {
    /// Begins a version, which reuses the buffers of the previous version and its tensors that never change.
    pub(super) fn new(new: &'a NewWeights<'a>, previous: Option<Published>) -> Self {
        let previous = previous.map_or_else(Vec::new, |p| p.tensors).into_iter().map(|t| (t.name.clone(), t));
        let adapters = new.adapters.map_or(&[][..], Adapters::named_parameters);
        Self { new, adapters, previous: previous.collect(), tensors: Vec::with_capacity(new.named.len()) }
    }

    /// Copies tensors into chunks.
    pub(super) fn add(&mut self, named: &[(String, Tensor)]) -> Result<()> {
        let new = self.new;
        for (name, tensor) in named {
            let is_adapter = self.adapters.iter().any(|(adapter, _)| adapter == name);
            let kind = if is_adapter { Kind::Float } else { new.kind };
            let old = self.previous.remove(name);
            if let Some(old) = old.as_ref().filter(|_| !is_adapter && !(new.may_change)(name)) {
                self.tensors.push(old.clone());
                continue;
            }
            // The buffers cannot be reused if a stream is still sending the tensor.
            let chunks = old.and_then(Arc::into_inner).map_or_else(Vec::new, |p| p.chunks);
            let chunks = pack_tensor(tensor, kind, chunks.into_iter().map(|c| c.data))?;
            let sum = chunks.iter().fold(Checksum::default(), |sum, c| {
                sum.concat(Checksum { crc32c: c.crc32c, bytes: c.data.len() as u64 })
            });
            let shape = tensor.size().iter().map(|n| *n as u64).collect();
            let dtype = wire_name(kind)
                .ok_or_else(|| ServerError::Unsendable(format!("weights of dtype {kind:?} cannot be sent")))?;
            let changed_in = new.version;
            self.tensors.push(Arc::new(PackedTensor { name: name.clone(), dtype, shape, changed_in, sum, chunks }));
        }
        Ok(())
    }

    /// Adds the adapters that have not been added, and completes the version.
    pub(super) fn finish(mut self) -> Result<Published> {
        for adapter in self.adapters {
            if self.tensors.iter().all(|t| t.name != adapter.0) {
                self.add(std::slice::from_ref(adapter))?;
            }
        }
        let Self { new, tensors, .. } = self;
        let sums: TensorChecksums = tensors.iter().map(|t| (t.name.clone(), t.sum)).collect();
        let adapter_scale = new.adapters.map(|a| a.spec().scale());
        Ok(Published { version: new.version, checksum: version_checksum(&sums), adapter_scale, tensors })
    }
}

impl Published {
    /// Packs all tensors of a version.
    #[cfg(test)]
    pub(super) fn pack(new: &NewWeights<'_>, previous: Option<Self>) -> Result<Self> {
        let mut packing = Packing::new(new, previous);
        packing.add(new.named)?;
        packing.finish()
    }

    /// Returns the chunks that a worker needs, and the bytes of tensors in them. `base` are the undamaged weights of
    /// this run that the worker holds, if any.
    pub(super) fn stream(
        &self,
        base: Option<v1::HeldWeights>,
    ) -> (u64, impl Iterator<Item = v1::WeightsChunk> + Send + use<>) {
        let held = base.as_ref().map(|b| b.version);
        let sent: Vec<Arc<PackedTensor>> =
            self.tensors.iter().filter(|t| held.is_none_or(|held| t.changed_in > held)).cloned().collect();
        let bytes = sent.iter().map(|t| t.bytes()).sum();
        let head = self.head(base, &sent);
        let head = chunk(prost::Message::encode_to_vec(&head).into());
        // Each tensor is released once it has been sent.
        let chunks = sent.into_iter().flat_map(|t| (0..t.chunks.len()).map(move |i| t.chunks[i].clone()));
        (bytes, std::iter::once(head).chain(chunks))
    }

    /// Returns the tensors changed after version `since`, ascending by name, and their header without a base.
    pub(super) fn changed_after(&self, since: WeightVersion) -> (v1::WeightsHead, Vec<Arc<PackedTensor>>) {
        let mut sent: Vec<Arc<PackedTensor>> = self.tensors.iter().filter(|t| t.changed_in > since).cloned().collect();
        sent.sort_by(|a, b| a.name.cmp(&b.name));
        (self.head(None, &sent), sent)
    }

    fn head(&self, base: Option<v1::HeldWeights>, sent: &[Arc<PackedTensor>]) -> v1::WeightsHead {
        let tensor = |t: &Arc<PackedTensor>| v1::WeightsTensor {
            name: t.name.clone(),
            dtype: t.dtype.into(),
            shape: t.shape.clone(),
        };
        v1::WeightsHead {
            version: self.version,
            checksum: self.checksum,
            base,
            tensors: sent.iter().map(tensor).collect(),
            adapter_scale: self.adapter_scale,
            broadcast: None,
        }
    }
}

/// Copies the bytes of a tensor, converted to `kind`, into chunks. Buffers of `old` are reused if they have the right
/// size and no other owner.
fn pack_tensor(tensor: &Tensor, kind: Kind, mut old: impl Iterator<Item = Bytes>) -> Result<Vec<v1::WeightsChunk>> {
    let flat = tensor.f_detach()?.f_reshape([-1])?;
    let size = kind.elt_size_in_bytes();
    let total = tensor.numel();
    let step = CHUNK_BYTES / size;
    let mut chunks = Vec::with_capacity(total.div_ceil(step));
    for offset in (0..total).step_by(step) {
        let count = step.min(total - offset);
        let part = flat.f_narrow(0, offset as i64, count as i64)?.f_to_kind(kind)?;
        let reusable = old.next().and_then(|b| b.try_into_mut().ok()).filter(|b| b.len() == count * size);
        let mut buffer = reusable.unwrap_or_else(|| BytesMut::zeroed(count * size));
        part.f_copy_data_u8(&mut buffer, count)?;
        chunks.push(chunk(buffer.freeze()));
    }
    Ok(chunks)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn tensor(values: usize, factor: f64) -> Tensor {
        Tensor::arange(values as i64, (Kind::Float, Device::Cpu)) * factor
    }

    fn named(factor: f64) -> Vec<(String, Tensor)> {
        let wide = tensor(700_000, factor);
        vec![
            ("visual.a".into(), tensor(300_001, 0.5)),
            ("model.b".into(), wide.view([7, 100_000]).transpose(0, 1)),
            ("model.c".into(), tensor(3, factor)),
        ]
    }

    fn pack(version: u64, named: &[(String, Tensor)], kind: Kind, previous: Option<Published>) -> Published {
        let changes = |name: &str| !name.starts_with("visual.");
        let new = NewWeights { version, named, kind, adapters: None, may_change: &changes };
        Published::pack(&new, previous).unwrap()
    }

    fn head(chunks: &[v1::WeightsChunk]) -> v1::WeightsHead {
        prost::Message::decode(chunks[0].data.clone()).unwrap()
    }

    fn sent(p: &Published, base: Option<v1::HeldWeights>) -> Vec<v1::WeightsChunk> {
        p.stream(base).1.collect()
    }

    /// Bytes of all tensors by an independent implementation: whole tensors by name.
    fn bytes(named: &[(String, Tensor)], kind: Kind) -> Vec<u8> {
        let mut sorted: Vec<_> = named.iter().collect();
        sorted.sort_by_key(|(n, _)| n.clone());
        let mut out = Vec::new();
        for (_, t) in sorted {
            let t = t.to_kind(kind).contiguous();
            let mut part = vec![0; t.numel() * kind.elt_size_in_bytes()];
            t.copy_data_u8(&mut part, t.numel());
            out.extend(part);
        }
        out
    }

    #[test]
    fn chunks_contain_the_tensors_with_valid_checksums() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let named = named(0.25);
            let p = pack(3, &named, kind, None);
            let chunks = sent(&p, None);
            let head = head(&chunks);
            assert_eq!((head.version, head.base.is_none(), head.tensors.len()), (3, true, 3));
            assert_eq!(head.tensors[1].shape, [100_000, 7]);
            assert_eq!(head.checksum, Checksum::of(&bytes(&named, kind)).crc32c);
            assert!(chunks.iter().all(|c| crate::checksum::verify(c).is_ok() && c.data.len() <= CHUNK_BYTES));
            let data: Vec<u8> = chunks[1..].iter().flat_map(|c| c.data.to_vec()).collect();
            let in_order: Vec<u8> = named.iter().flat_map(|one| bytes(std::slice::from_ref(one), kind)).collect();
            assert!(data == in_order);
        }
    }

    /// Each part may be overwritten once it has been added.
    #[test]
    fn parts_give_the_same_version_as_the_whole() {
        let whole = pack(3, &named(0.25), Kind::BFloat16, None);
        let changes = |_: &str| true;
        let new = NewWeights { version: 3, named: &[], kind: Kind::BFloat16, adapters: None, may_change: &changes };
        let mut packing = Packing::new(&new, None);
        for part in named(0.25).chunks(2).rev() {
            packing.add(part).unwrap();
            for (_, t) in part {
                let _ = t.shallow_clone().zero_();
            }
        }
        let by_parts = packing.finish().unwrap();
        assert_eq!((by_parts.version, by_parts.checksum), (whole.version, whole.checksum));
        for tensor in &whole.tensors {
            let same = by_parts.tensors.iter().find(|t| t.name == tensor.name).unwrap();
            assert!(same.data().eq(tensor.data()) && same.shape == tensor.shape);
        }
    }

    #[test]
    fn workers_receive_the_tensors_that_changed() {
        let first = pack(3, &named(0.25), Kind::Float, None);
        let old = first.checksum;
        let frozen = Arc::as_ptr(&first.tensors[0]);
        let later = named(0.75);
        let second = pack(4, &later, Kind::Float, Some(first));
        assert_eq!(Arc::as_ptr(&second.tensors[0]), frozen, "constant tensors are not copied again");
        assert_eq!(second.checksum, Checksum::of(&bytes(&later, Kind::Float)).crc32c);
        let base = v1::HeldWeights { version: 3, checksum: old };
        let chunks = sent(&second, Some(base));
        let names: Vec<String> = head(&chunks).tensors.into_iter().map(|t| t.name).collect();
        assert_eq!(names, ["model.b", "model.c"]);
        assert_eq!(head(&chunks).base, Some(base));
        assert_eq!(chunks[1..].iter().map(|c| c.data.len()).sum::<usize>(), 700_003 * 4);
        assert_eq!(head(&sent(&second, None)).tensors.len(), 3);
        // Tensors broadcast to workers that hold version 3 or 2, ascending by name.
        for (since, names) in [(3, &["model.b", "model.c"][..]), (2, &["model.b", "model.c", "visual.a"])] {
            let (head, tensors) = second.changed_after(since);
            let all: Vec<u8> = tensors.iter().flat_map(|t| t.data()).flatten().copied().collect();
            assert_eq!(head.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), names);
            assert_eq!((head.version, head.checksum, head.base), (4, second.checksum, None));
            let changed = later.iter().filter(|(n, _)| names.contains(&n.as_str()));
            let changed: Vec<_> = changed.map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
            assert!(
                all == bytes(&changed, Kind::Float)
                    && tensors.iter().map(|t| t.bytes()).sum::<u64>() == all.len() as u64
            );
        }
    }

    #[test]
    fn buffers_are_reused_unless_a_stream_holds_them() {
        let first = pack(0, &named(1.0), Kind::Float, None);
        let address = |p: &Published| p.tensors[1].chunks[0].data.as_ptr();
        let buffer = address(&first);
        let (_, stream) = first.stream(None);
        let second = pack(1, &named(2.0), Kind::Float, Some(first));
        assert_ne!(address(&second), buffer, "a stream still sends version 0");
        let sent: Vec<u8> = stream.skip(1).flat_map(|c| c.data.to_vec()).collect();
        let version_0: Vec<u8> =
            named(1.0).iter().flat_map(|one| bytes(std::slice::from_ref(one), Kind::Float)).collect();
        assert!(sent == version_0, "the stream has version 0 to its end");
        let buffer = address(&second);
        let third = pack(2, &named(3.0), Kind::Float, Some(second));
        assert_eq!(address(&third), buffer);
    }
}
