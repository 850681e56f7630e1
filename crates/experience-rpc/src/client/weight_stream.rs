//! Assembles received weights: each chunk is verified and copied into tensors on the host, whose memory the next version reuses; an
//! engine then loads them. Tensors broadcast among devices stay on the device.

use std::collections::HashMap;

use tch::{Device, Kind, TchError, Tensor};
use unveil_proto::v1::{Broadcast, HeldWeights, WeightsChunk, WeightsHead, WeightsTensor};

use super::checksummer::Checksummer;
use crate::checksum::{Checksum, TensorChecksums, verify, version_checksum};
use crate::wire_dtype::wire_kind;

/// Tensors by name whose memory may be overwritten.
pub(super) type TensorPool = HashMap<String, Tensor>;

/// Version that a worker holds, with the checksum of each tensor, so that the whole can be verified if only some tensors change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct HeldVersion {
    pub version: u64,
    pub sums: TensorChecksums,
}

impl HeldVersion {
    /// Returns the version and the checksum of the whole as a message.
    pub(super) fn to_wire(&self) -> HeldWeights {
        HeldWeights { version: self.version, checksum: version_checksum(&self.sums) }
    }
}

/// Weights that are completely received, but not yet loaded.
#[derive(Debug)]
pub struct WeightUpdate {
    /// Version of the weights.
    pub version: u64,
    /// Checksum of the whole version: of these tensors and of unchanged ones that the receiver holds.
    pub checksum: u32,
    /// Whether these are all tensors; otherwise the others are unchanged.
    pub whole: bool,
    /// Factor of the adapters' contribution, if some of the tensors are adapters.
    pub scale: Option<f64>,
    /// Tensors, on the host or on the device that received the broadcast.
    pub tensors: Vec<(String, Tensor)>,
    /// Checksum of each tensor of the version.
    pub sums: TensorChecksums,
}

/// Assembles the weights of one stream or broadcast.
pub(super) struct WeightAssembler {
    head: WeightsHead,
    /// Checksums of the tensors that are not sent.
    base: TensorChecksums,
    tensors: Vec<(String, Tensor)>,
    sums: Vec<Checksum>,
    /// Index of the next tensor.
    next: usize,
}

impl WeightAssembler {
    /// Starts from the first chunk, the head. Tensors of the same shape and dtype are reused from `pool`, others are allocated: for a
    /// broadcast on `device` as long as its memory suffices, else on the host.
    ///
    /// # Errors
    /// Returns a message if the head is damaged, builds on a version that is not held, or describes an invalid tensor.
    pub(super) fn begin(
        first: &WeightsChunk,
        held: Option<&HeldVersion>,
        pool: &mut TensorPool,
        device: Device,
    ) -> Result<Self, String> {
        verify(first).map_err(|sums| damaged("the head", sums))?;
        let head: WeightsHead =
            prost::Message::decode(first.data.clone()).map_err(|e| format!("the head cannot be read: {e}"))?;
        let version = head.version;
        let mut base = match (&head.base, held) {
            (None, _) => TensorChecksums::new(),
            (Some(base), Some(held)) if *base == held.to_wire() => held.sums.clone(),
            (Some(base), _) => {
                let held = held.map_or("none".to_owned(), |held| format!("version {}", held.version));
                return Err(format!("version {version} builds on version {}, this worker holds {held}", base.version));
            }
        };
        let device = if head.broadcast.is_some() { device } else { Device::Cpu };
        let mut tensors = Vec::with_capacity(head.tensors.len());
        for t in &head.tensors {
            let tensor =
                allocate(t, pool, device).map_err(|e| format!("tensor `{}` of version {version}: {e}", t.name))?;
            base.remove(&t.name);
            tensors.push((t.name.clone(), tensor));
        }
        // Tensors that this version does not send need no buffer.
        pool.clear();
        let sums = vec![Checksum::default(); tensors.len()];
        Ok(Self { head, base, tensors, sums, next: 0 })
    }

    /// Takes the offered broadcast, if the tensors do not follow the head in the stream.
    pub(super) fn broadcast(&mut self) -> Option<Broadcast> {
        self.head.broadcast.take()
    }

    /// Returns the version being received.
    pub(super) fn version(&self) -> u64 {
        self.head.version
    }

    /// Returns the number of bytes of all tensors that are sent.
    pub(super) fn size(&self) -> usize {
        self.tensors.iter().map(|(_, t)| byte_len(t)).sum()
    }

    /// Copies the next bytes, which may span several tensors: flat, on any device. Only the checksum of the whole verifies them.
    pub(super) fn fill(&mut self, data: &Tensor, checksummer: &mut Checksummer) -> Result<(), String> {
        let mut at = 0;
        let count = data.numel();
        while at < count {
            self.skip_complete();
            let Some((name, tensor)) = self.tensors.get(self.next) else { return Err(self.surplus_error()) };
            let begin = self.sums[self.next].bytes as usize;
            let length = (byte_len(tensor) - begin).min(count - at);
            let copied = (|| {
                let mut target = as_bytes(tensor)?.f_narrow(0, begin as i64, length as i64)?;
                target.f_copy_(&data.f_narrow(0, at as i64, length as i64)?)?;
                checksummer.checksum(&target)
            })();
            let sum = copied.map_err(|e| format!("`{name}` of version {}: {e}", self.head.version))?;
            self.sums[self.next] = self.sums[self.next].concat(sum);
            at += length;
        }
        Ok(())
    }

    /// Verifies and copies the next chunk; the error describes the problem with it.
    pub(super) fn push(&mut self, chunk: &WeightsChunk) -> Result<(), String> {
        let sum = verify(chunk).map_err(|sums| {
            self.skip_complete();
            let (name, at) = self.tensors.get(self.next).map_or(("", 0), |(n, _)| (n, self.sums[self.next].bytes));
            damaged(&format!("the chunk at byte {at} of `{name}` of version {}", self.head.version), sums)
        })?;
        let data = &chunk.data;
        self.skip_complete();
        if self.next == self.tensors.len() {
            return Err(self.surplus_error());
        }
        let (name, tensor) = &mut self.tensors[self.next];
        let at = self.sums[self.next].bytes;
        let size = byte_len(tensor);
        let count = data.len();
        if at as usize + count > size || count == 0 {
            return Err(format!(
                "{count} bytes arrived at byte {at} of `{name}` of version {}, which has {size}",
                self.head.version
            ));
        }
        write_bytes(tensor, at as usize, data);
        self.sums[self.next] = self.sums[self.next].concat(sum);
        Ok(())
    }

    fn surplus_error(&self) -> String {
        format!("more than the announced tensors of version {} arrived", self.head.version)
    }

    /// Moves to the next incomplete tensor.
    fn skip_complete(&mut self) {
        while self.tensors.get(self.next).is_some_and(|(_, t)| self.sums[self.next].bytes == byte_len(t) as u64) {
            self.next += 1;
        }
    }

    /// Returns the update if all tensors have arrived and the checksum of the whole is the announced one.
    pub(super) fn finish(mut self) -> Result<WeightUpdate, String> {
        let version = self.head.version;
        self.skip_complete();
        if let Some((name, t)) = self.tensors.get(self.next) {
            let left = self.tensors.len() - self.next;
            let received = self.sums[self.next].bytes;
            let size = byte_len(t);
            return Err(format!(
                "the stream of version {version} ended early: {left} tensor(s) are missing, `{name}` stopped at byte {received} of {size}"
            ));
        }
        let mut sums = self.base;
        sums.extend(self.tensors.iter().map(|(n, _)| n.clone()).zip(self.sums));
        let found = version_checksum(&sums);
        if found != self.head.checksum {
            return Err(damaged(&format!("the whole of version {version}"), (found, self.head.checksum)));
        }
        let whole = self.head.base.is_none();
        let scale = self.head.adapter_scale;
        Ok(WeightUpdate { version, checksum: found, whole, scale, tensors: self.tensors, sums })
    }
}

fn damaged(what: &str, (found, announced): (u32, u32)) -> String {
    format!("{what} has CRC-32C {found:08x}, but {announced:08x} was announced: it was damaged in transit")
}

fn byte_len(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// Returns a flat view of a tensor's bytes.
fn as_bytes(tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_view([-1])?.f_view_dtype(Kind::Uint8)
}

/// Returns a tensor with the announced shape and dtype, from `pool` if possible.
fn allocate(t: &WeightsTensor, pool: &mut TensorPool, device: Device) -> Result<Tensor, String> {
    let kind = wire_kind(&t.dtype)?;
    let sides = t.shape.iter().map(|n| i64::try_from(*n)).collect::<Result<Vec<i64>, _>>();
    let shape = sides.map_err(|_| format!("its shape {:?} is too large", t.shape))?;
    let size = shape.iter().try_fold(kind.elt_size_in_bytes() as i64, |size, n| size.checked_mul(*n));
    size.ok_or_else(|| format!("its shape {shape:?} is too large"))?;
    let fits = |old: &Tensor| old.kind() == kind && old.size() == shape && old.device() == device;
    if let Some(old) = pool.remove(&t.name).filter(fits) {
        return Ok(old);
    }
    let tensor = Tensor::f_empty(&shape, (kind, device));
    let tensor =
        if device == Device::Cpu { tensor } else { tensor.or_else(|_| Tensor::f_empty(&shape, (kind, Device::Cpu))) };
    tensor.map_err(|e| e.to_string())
}

/// Writes bytes of a tensor starting at byte `at`.
#[expect(unsafe_code, reason = "copies received bytes into a tensor's memory")]
fn write_bytes(tensor: &mut Tensor, at: usize, data: &[u8]) {
    assert!(at + data.len() <= byte_len(tensor) && tensor.device() == Device::Cpu && tensor.is_contiguous());
    // SAFETY: the tensor is contiguous, in host memory and large enough (asserted above), and the caller has it alone. Any bytes
    // are numbers of its kind. The data came by message and does not overlap it.
    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), tensor.data_ptr().cast::<u8>().add(at), data.len()) }
}

#[cfg(test)]
mod tests {
    use crate::checksum::chunk;

    use super::*;

    fn tensor(name: &str, shape: &[u64]) -> WeightsTensor {
        WeightsTensor { name: name.into(), dtype: "F32".into(), shape: shape.to_vec() }
    }

    /// Returns a stream of `b` [3] and `a` [2, 2] in chunks of two numbers, and the checksums of both by name.
    fn stream(version: u64) -> (Vec<WeightsChunk>, TensorChecksums) {
        let number = |i: usize| (version as f32 + i as f32 / 8.0).to_le_bytes();
        let data: Vec<u8> = (0..7).flat_map(number).collect();
        let (b, a) = data.split_at(12);
        let sums: TensorChecksums = [("a".to_owned(), Checksum::of(a)), ("b".to_owned(), Checksum::of(b))].into();
        let tensors = vec![tensor("b", &[3]), tensor("a", &[2, 2])];
        let head = WeightsHead {
            version,
            checksum: version_checksum(&sums),
            base: None,
            tensors,
            adapter_scale: None,
            broadcast: None,
        };
        let mut chunks = vec![chunk(prost::Message::encode_to_vec(&head).into())];
        chunks.extend([b, a].iter().flat_map(|t| t.chunks(8)).map(|part| chunk(part.to_vec().into())));
        (chunks, sums)
    }

    fn assemble(
        chunks: &[WeightsChunk],
        held: Option<&HeldVersion>,
        pool: &mut TensorPool,
    ) -> Result<WeightUpdate, String> {
        let mut a = WeightAssembler::begin(&chunks[0], held, pool, Device::Cpu)?;
        chunks[1..].iter().try_for_each(|c| a.push(c))?;
        a.finish()
    }

    fn values(t: &Tensor) -> Vec<f32> {
        Vec::<f32>::try_from(t.reshape([-1])).unwrap()
    }

    #[test]
    fn streams_become_tensors_and_memory_is_reused() {
        let (chunks, sums) = stream(3);
        let mut pool = TensorPool::new();
        let update = assemble(&chunks, None, &mut pool).unwrap();
        assert_eq!((update.version, update.whole, &update.sums), (3, true, &sums));
        assert_eq!(values(&update.tensors[0].1), [3.0, 3.125, 3.25]);
        assert_eq!(
            (values(&update.tensors[1].1), update.tensors[1].1.size()),
            (vec![3.375, 3.5, 3.625, 3.75], vec![2, 2])
        );
        let memory = update.tensors[1].1.data_ptr();
        pool.extend(update.tensors);
        pool.insert("gone".into(), Tensor::zeros([1], (Kind::Float, Device::Cpu)));
        let next = assemble(&stream(4).0, None, &mut pool).unwrap();
        assert_eq!(next.tensors[1].1.data_ptr(), memory);
        assert!(pool.is_empty());
    }

    #[test]
    fn damage_is_reported_with_version_and_checksums() {
        let refused = |change: &dyn Fn(&mut Vec<WeightsChunk>)| {
            let mut chunks = stream(3).0;
            change(&mut chunks);
            assemble(&chunks, None, &mut TensorPool::new()).unwrap_err()
        };
        let flip = |chunks: &mut Vec<WeightsChunk>, at: usize| {
            let mut data = chunks[at].data.to_vec();
            data[3] ^= 16;
            chunks[at].data = data.into();
        };
        for at in 0..5 {
            let before = stream(3).0[at].crc32c;
            let text = refused(&|c| flip(c, at));
            let words = ["CRC-32C", &format!("{before:08x} was announced")];
            assert!(words.iter().all(|k| text.contains(k)) && (at == 0 || text.contains("version 3")), "{text}");
        }
        // A consistent chunk in the wrong position: only the checksum of the whole detects it.
        let text = refused(&|c| c[2] = chunk(vec![9u8; c[2].data.len()].into()));
        assert!(text.contains("the whole of version 3") && text.contains("was announced"), "{text}");
        for (text, word) in [
            (refused(&|c| c.truncate(4)), "ended early: 1 tensor(s) are missing, `a` stopped at byte 8 of 16"),
            (refused(&|c| c.truncate(1)), "2 tensor(s) are missing"),
            (refused(&|c| c.push(chunk(vec![1u8].into()))), "more than the announced"),
            (refused(&|c| c[2] = chunk(vec![0u8; 8].into())), "8 bytes arrived at byte 8 of `b`"),
            (refused(&|c| c[0] = chunk(vec![255u8; 3].into())), "the head cannot be read"),
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
    }

    #[test]
    fn bytes_fill_tensors_at_any_cut() {
        let (chunks, sums) = stream(3);
        let data: Vec<u8> = chunks[1..].iter().flat_map(|c| c.data.to_vec()).collect();
        let begin = || WeightAssembler::begin(&chunks[0], None, &mut TensorPool::new(), Device::Cpu).unwrap();
        let mut checksummer = Checksummer::new(Device::Cpu);
        for cut in [1, 3, 8, 16, 28] {
            let mut a = begin();
            assert_eq!((a.size(), a.version(), a.broadcast()), (28, 3, None));
            data.chunks(cut).try_for_each(|part| a.fill(&Tensor::from_slice(part), &mut checksummer)).unwrap();
            assert!(
                a.fill(&Tensor::from_slice(&[0u8]), &mut checksummer).unwrap_err().contains("more than the announced")
            );
            let update = a.finish().unwrap();
            assert_eq!(update.sums, sums, "{cut}");
            assert_eq!(values(&update.tensors[1].1), [3.375, 3.5, 3.625, 3.75]);
        }
        let mut a = begin();
        let damaged: Vec<u8> = data.iter().map(|b| b ^ 2).collect();
        a.fill(&Tensor::from_slice(&damaged), &mut checksummer).unwrap();
        let text = a.finish().unwrap_err();
        assert!(text.contains("the whole of version 3"), "{text}");
    }

    #[test]
    fn partial_update_builds_on_the_held_version() {
        let (chunks, mut sums) = stream(3);
        let first = assemble(&chunks, None, &mut TensorPool::new()).unwrap();
        let held = HeldVersion { version: 3, sums: first.sums };
        let data: Vec<u8> = [7f32, 8.0, 9.0, 10.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        sums.insert("a".into(), Checksum::of(&data));
        let part = |base| {
            let tensors = vec![tensor("a", &[2, 2])];
            let head = WeightsHead {
                version: 4,
                checksum: version_checksum(&sums),
                base,
                tensors,
                adapter_scale: None,
                broadcast: None,
            };
            vec![chunk(prost::Message::encode_to_vec(&head).into()), chunk(data.clone().into())]
        };
        let update = assemble(&part(Some(held.to_wire())), Some(&held), &mut TensorPool::new()).unwrap();
        assert!(!update.whole && update.sums == sums && update.tensors.len() == 1);
        let other = HeldWeights { version: 2, ..held.to_wire() };
        for (base, held) in [(other, Some(&held)), (held.to_wire(), None)] {
            let text = assemble(&part(Some(base)), held, &mut TensorPool::new()).unwrap_err();
            assert!(text.contains("version 4 builds on version"), "{text}");
        }
        // A partial update that claims to be whole.
        let text = assemble(&part(None), Some(&held), &mut TensorPool::new()).unwrap_err();
        assert!(text.contains("the whole of version 4"), "{text}");
    }

    #[test]
    fn invalid_tensor_descriptions_are_refused() {
        let begin = |t: WeightsTensor| {
            let head = WeightsHead { version: 1, tensors: vec![t], ..Default::default() };
            let first = chunk(prost::Message::encode_to_vec(&head).into());
            WeightAssembler::begin(&first, None, &mut TensorPool::new(), Device::Cpu).err().unwrap_or_default()
        };
        let text = begin(WeightsTensor { dtype: "I8".into(), ..tensor("x", &[1]) });
        assert!(text.contains("`x`") && text.contains("I8"), "{text}");
        assert!(begin(tensor("x", &[u64::MAX])).contains("too large"));
        assert!(begin(tensor("x", &[1 << 40, 1 << 40])).contains("too large"));
    }
}
