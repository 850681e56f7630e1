//! Weights of one version as they travel: the bytes of each tensor in chunks, with their CRC-32C, and what of them a worker needs
//! that holds an older version. Must not know: sockets, who asks.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tch::{Kind, Tensor};
use unveil_core::WeightVersion;
use unveil_model::Adapters;
use unveil_proto::v1;
use unveil_proto::weights::{Sum, Sums, checksum, chunk};

use crate::error::{LearnerError, Result};

/// Bytes per chunk, a multiple of every element size. One chunk is copied and checked without a pause, and stays in the
/// processor's cache meanwhile.
const CHUNK: usize = 1 << 20;

/// Weights as the training thread hands them over.
pub struct NewWeights<'a> {
    /// Their version.
    pub version: WeightVersion,
    /// Every tensor by name: floating-point numbers of any layout, on any device.
    pub named: &'a [(String, Tensor)],
    /// Kind that they travel in: float, bfloat16 or half.
    pub kind: Kind,
    /// Adapters beside them, which travel in fp32 and change with every version.
    pub adapters: Option<&'a Adapters>,
    /// Whether a tensor of this name can change between versions. What cannot is taken over once, with the first version.
    pub changes: &'a dyn Fn(&str) -> bool,
}

/// One tensor's bytes.
pub(super) struct Packed {
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
    /// The version that changed it last.
    since: WeightVersion,
    sum: Sum,
    chunks: Vec<v1::WeightsChunk>,
}

impl Packed {
    /// The tensor's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many they are.
    pub fn bytes(&self) -> u64 {
        self.sum.bytes
    }

    /// The bytes in parts.
    pub fn data(&self) -> impl Iterator<Item = &[u8]> {
        self.chunks.iter().map(|c| &c.data[..])
    }
}

/// Weights that workers can fetch. A version is written over the buffers of the one before, where no stream still sends them; streams
/// of older ones are dropped, so beyond the model host memory holds one copy, and two while a stream is under way.
pub(super) struct Published {
    pub version: WeightVersion,
    pub checksum: u32,
    adapter_scale: Option<f64>,
    tensors: Vec<Arc<Packed>>,
}

impl Published {
    /// Copies the tensors into chunks, one after another; `before` gives its buffers, and the tensors that never change.
    pub fn make(new: &NewWeights<'_>, before: Option<Self>) -> Result<Self> {
        let before = before.map_or_else(Vec::new, |b| b.tensors).into_iter().map(|t| (t.name.clone(), t));
        let mut before: HashMap<String, Arc<Packed>> = before.collect();
        let adapters = new.adapters.map_or(&[][..], Adapters::named_parameters);
        let mut tensors = Vec::with_capacity(new.named.len() + adapters.len());
        let named = new.named.iter().map(|(n, t)| (n, t, new.kind, (new.changes)(n)));
        for (name, tensor, kind, changes) in named.chain(adapters.iter().map(|(n, t)| (n, t, Kind::Float, true))) {
            let old = before.remove(name);
            if let Some(old) = old.as_ref().filter(|_| !changes) {
                tensors.push(old.clone());
                continue;
            }
            // A stream that still sends the tensor keeps its buffers.
            let chunks = old.and_then(Arc::into_inner).map_or_else(Vec::new, |p| p.chunks);
            let chunks = pack(tensor, kind, chunks.into_iter().map(|c| c.data))?;
            let sum = chunks
                .iter()
                .fold(Sum::default(), |sum, c| sum.then(Sum { crc32c: c.crc32c, bytes: c.data.len() as u64 }));
            let shape = tensor.size().iter().map(|n| *n as u64).collect();
            let dtype = dtype(kind)?;
            tensors.push(Arc::new(Packed { name: name.clone(), dtype, shape, since: new.version, sum, chunks }));
        }
        let sums: Sums = tensors.iter().map(|t| (t.name.clone(), t.sum)).collect();
        let adapter_scale = new.adapters.map(|a| a.spec().scale());
        Ok(Self { version: new.version, checksum: checksum(&sums), adapter_scale, tensors })
    }

    /// What a worker needs that holds `base` (whole, and of this run), or nothing; and how many bytes of tensors that is.
    pub fn stream(
        &self,
        base: Option<v1::HeldWeights>,
    ) -> (u64, impl Iterator<Item = v1::WeightsChunk> + Send + use<>) {
        let held = base.as_ref().map(|b| b.version);
        let sent: Vec<Arc<Packed>> =
            self.tensors.iter().filter(|t| held.is_none_or(|held| t.since > held)).cloned().collect();
        let bytes = sent.iter().map(|t| t.bytes()).sum();
        let head = self.head(base, &sent);
        let head = chunk(prost::Message::encode_to_vec(&head).into());
        // A tensor is let go of once it is sent.
        let chunks = sent.into_iter().flat_map(|t| (0..t.chunks.len()).map(move |i| t.chunks[i].clone()));
        (bytes, std::iter::once(head).chain(chunks))
    }

    /// What changed after version `since`, ascending by name, and the head of it without a base.
    pub fn changed(&self, since: WeightVersion) -> (v1::WeightsHead, Vec<Arc<Packed>>) {
        let mut sent: Vec<Arc<Packed>> = self.tensors.iter().filter(|t| t.since > since).cloned().collect();
        sent.sort_by(|a, b| a.name.cmp(&b.name));
        (self.head(None, &sent), sent)
    }

    fn head(&self, base: Option<v1::HeldWeights>, sent: &[Arc<Packed>]) -> v1::WeightsHead {
        let tensor =
            |t: &Arc<Packed>| v1::WeightsTensor { name: t.name.clone(), dtype: t.dtype.into(), shape: t.shape.clone() };
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

/// How a kind of numbers is called on the wire.
fn dtype(kind: Kind) -> Result<&'static str> {
    match kind {
        Kind::Float => Ok("F32"),
        Kind::BFloat16 => Ok("BF16"),
        Kind::Half => Ok("F16"),
        other => Err(LearnerError::Setting(format!("weights of kind {other:?} cannot travel"))),
    }
}

/// Bytes of a tensor in `kind`, in buffers of the right size from `old` where nobody else has them.
fn pack(tensor: &Tensor, kind: Kind, mut old: impl Iterator<Item = Bytes>) -> Result<Vec<v1::WeightsChunk>> {
    let flat = tensor.f_detach()?.f_reshape([-1])?;
    let size = kind.elt_size_in_bytes();
    let (total, step) = (tensor.numel(), CHUNK / size);
    let mut chunks = Vec::with_capacity(total.div_ceil(step));
    for at in (0..total).step_by(step) {
        let count = step.min(total - at);
        let part = flat.f_narrow(0, at as i64, count as i64)?.f_to_kind(kind)?;
        let kept = old.next().and_then(|b| b.try_into_mut().ok()).filter(|b| b.len() == count * size);
        let mut buffer = kept.unwrap_or_else(|| BytesMut::zeroed(count * size));
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

    fn make(version: u64, named: &[(String, Tensor)], kind: Kind, before: Option<Published>) -> Published {
        let changes = |name: &str| !name.starts_with("visual.");
        Published::make(&NewWeights { version, named, kind, adapters: None, changes: &changes }, before).unwrap()
    }

    fn head(chunks: &[v1::WeightsChunk]) -> v1::WeightsHead {
        prost::Message::decode(chunks[0].data.clone()).unwrap()
    }

    fn sent(p: &Published, base: Option<v1::HeldWeights>) -> Vec<v1::WeightsChunk> {
        p.stream(base).1.collect()
    }

    /// The bytes of all tensors by another way: whole, by name.
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
    fn chunks_hold_the_tensors_and_every_sum_fits() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let named = named(0.25);
            let p = make(3, &named, kind, None);
            let chunks = sent(&p, None);
            let head = head(&chunks);
            assert_eq!((head.version, head.base.is_none(), head.tensors.len()), (3, true, 3));
            assert_eq!(head.tensors[1].shape, [100_000, 7]);
            assert_eq!(head.checksum, Sum::of(&bytes(&named, kind)).crc32c);
            assert!(chunks.iter().all(|c| unveil_proto::weights::verify(c).is_ok() && c.data.len() <= CHUNK));
            let data: Vec<u8> = chunks[1..].iter().flat_map(|c| c.data.to_vec()).collect();
            let in_order: Vec<u8> = named.iter().flat_map(|one| bytes(std::slice::from_ref(one), kind)).collect();
            assert!(data == in_order);
        }
    }

    #[test]
    fn a_worker_gets_what_changed_since_its_version() {
        let first = make(3, &named(0.25), Kind::Float, None);
        let (old, frozen) = (first.checksum, Arc::as_ptr(&first.tensors[0]));
        let later = named(0.75);
        let second = make(4, &later, Kind::Float, Some(first));
        assert_eq!(Arc::as_ptr(&second.tensors[0]), frozen, "what never changes is not copied again");
        assert_eq!(second.checksum, Sum::of(&bytes(&later, Kind::Float)).crc32c);
        let base = v1::HeldWeights { version: 3, checksum: old };
        let chunks = sent(&second, Some(base));
        let names: Vec<String> = head(&chunks).tensors.into_iter().map(|t| t.name).collect();
        assert_eq!(names, ["model.b", "model.c"]);
        assert_eq!(head(&chunks).base, Some(base));
        assert_eq!(chunks[1..].iter().map(|c| c.data.len()).sum::<usize>(), 700_003 * 4);
        assert_eq!(head(&sent(&second, None)).tensors.len(), 3);
        // What is broadcast to those that hold version 3 or less, ascending by name.
        for (since, names) in [(3, &["model.b", "model.c"][..]), (2, &["model.b", "model.c", "visual.a"])] {
            let (head, tensors) = second.changed(since);
            let all: Vec<u8> = tensors.iter().flat_map(|t| t.data()).flatten().copied().collect();
            assert_eq!(head.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), names);
            assert_eq!((head.version, head.checksum, head.base), (4, second.checksum, None));
            let of: Vec<_> = later.iter().filter(|(n, _)| names.contains(&n.as_str())).collect();
            let of: Vec<_> = of.into_iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
            assert!(
                all == bytes(&of, Kind::Float) && tensors.iter().map(|t| t.bytes()).sum::<u64>() == all.len() as u64
            );
        }
    }

    #[test]
    fn buffers_are_used_again_unless_a_stream_has_them() {
        let first = make(0, &named(1.0), Kind::Float, None);
        let place = |p: &Published| p.tensors[1].chunks[0].data.as_ptr();
        let at = place(&first);
        let (_, stream) = first.stream(None);
        let second = make(1, &named(2.0), Kind::Float, Some(first));
        assert_ne!(place(&second), at, "a stream still sends version 0");
        let sent: Vec<u8> = stream.skip(1).flat_map(|c| c.data.to_vec()).collect();
        let whole: Vec<u8> = named(1.0).iter().flat_map(|one| bytes(std::slice::from_ref(one), Kind::Float)).collect();
        assert!(sent == whole, "the stream has version 0 to its end");
        let at = place(&second);
        let third = make(2, &named(3.0), Kind::Float, Some(second));
        assert_eq!(place(&third), at);
    }
}
