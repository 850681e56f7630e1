//! Weights as they arrive: each chunk is checked and written to its place in tensors on the host, which are used again for the
//! next version; then an engine takes them. What is broadcast among devices stays on them. Must not know: sockets.

use std::borrow::BorrowMut;
use std::collections::HashMap;

use tch::{Device, Kind, TchError, Tensor};
use unveil_core::WeightVersion;
use unveil_engine::Engine;
use unveil_model::{Vlm, is_adapter};
use unveil_proto::v1::{Broadcast, HeldWeights, WeightsChunk, WeightsHead, WeightsTensor};
use unveil_proto::weights::{Sum, Sums, checksum, verify};

use crate::crc::Checks;

/// Tensors by name, free to be written to.
pub(crate) type Pool = HashMap<String, Tensor>;

/// Weights that a worker holds, with the sum of each tensor, so that the whole can be checked when a part changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Known {
    pub version: u64,
    pub sums: Sums,
}

impl Known {
    pub fn held(&self) -> HeldWeights {
        HeldWeights { version: self.version, checksum: checksum(&self.sums) }
    }
}

/// Weights that have arrived whole, not taken over yet.
#[derive(Debug)]
pub struct Update {
    /// Their version.
    pub version: u64,
    /// Checksum of the whole: of these tensors and, where not all were sent, those that the receiver had.
    pub checksum: u32,
    /// Whether these are all tensors; otherwise the others stay as they are.
    pub whole: bool,
    /// The factor of what adapters add, where some of the tensors are adapters.
    pub scale: Option<f64>,
    /// Tensors, on the host or on the device that they were broadcast to.
    pub tensors: Vec<(String, Tensor)>,
    pub(crate) sums: Sums,
}

impl Update {
    /// Has an engine that holds what this builds on take it over, under `version`.
    ///
    /// # Errors
    /// What does not fit the engine's model; the engine is as it was then.
    pub fn load_into<V: BorrowMut<Vlm>>(&self, engine: &mut Engine<V>) -> unveil_engine::Result<()> {
        let (version, named): (WeightVersion, _) = (self.version, self.tensors.as_slice());
        match (self.scale, self.whole) {
            (None, true) => engine.load_weights(version, named),
            (None, false) => engine.load_changed(version, named),
            (Some(scale), whole) => {
                let clone = |(n, t): &(String, Tensor)| (n.clone(), t.shallow_clone());
                let (adapters, base): (Vec<_>, Vec<_>) = named.iter().map(clone).partition(|(n, _)| is_adapter(n));
                engine.load_adapted(version, whole.then_some(base.as_slice()), &adapters, scale)
            }
        }
    }
}

/// Collects one stream.
pub(crate) struct Assembly {
    head: WeightsHead,
    /// Sums of the tensors that are not sent.
    base: Sums,
    tensors: Vec<(String, Tensor)>,
    sums: Vec<Sum>,
    /// The tensor that comes next.
    at: usize,
}

impl Assembly {
    /// From the first chunk. Tensors of the same shape and kind are taken from `pool`, others are made: where they are broadcast on
    /// `device`, as far as it has room, else on the host.
    pub fn begin(first: &WeightsChunk, known: Option<&Known>, pool: &mut Pool, device: Device) -> Result<Self, String> {
        verify(first).map_err(|sums| damaged("the head", sums))?;
        let head: WeightsHead =
            prost::Message::decode(first.data.clone()).map_err(|e| format!("the head cannot be read: {e}"))?;
        let version = head.version;
        let mut base = match (&head.base, known) {
            (None, _) => Sums::new(),
            (Some(base), Some(known)) if *base == known.held() => known.sums.clone(),
            (Some(base), _) => {
                let have = known.map_or("none".to_owned(), |k| format!("version {}", k.version));
                return Err(format!("version {version} builds on version {}, this worker holds {have}", base.version));
            }
        };
        let device = if head.broadcast.is_some() { device } else { Device::Cpu };
        let mut tensors = Vec::with_capacity(head.tensors.len());
        for t in &head.tensors {
            let tensor =
                place(t, pool, device).map_err(|e| format!("tensor `{}` of version {version}: {e}", t.name))?;
            base.remove(&t.name);
            tensors.push((t.name.clone(), tensor));
        }
        // What this version does not send needs no room of its own any more.
        pool.clear();
        let sums = vec![Sum::default(); tensors.len()];
        Ok(Self { head, base, tensors, sums, at: 0 })
    }

    /// The broadcast by which the tensors come, where they do not follow the head.
    pub fn broadcast(&mut self) -> Option<Broadcast> {
        self.head.broadcast.take()
    }

    /// The version that arrives.
    pub fn version(&self) -> u64 {
        self.head.version
    }

    /// Bytes of all tensors that are sent.
    pub fn size(&self) -> usize {
        self.tensors.iter().map(|(_, t)| bytes(t)).sum()
    }

    /// Takes the next bytes, of any number of tensors: flat, on any device. Nothing vouches for them but the checksum of the whole.
    pub fn fill(&mut self, data: &Tensor, checks: &mut Checks) -> Result<(), String> {
        let (mut at, count) = (0, data.numel());
        while at < count {
            self.skip_whole();
            let Some((name, tensor)) = self.tensors.get(self.at) else { return Err(self.too_many()) };
            let begin = self.sums[self.at].bytes as usize;
            let part = (bytes(tensor) - begin).min(count - at);
            let taken = (|| {
                let mut place = flat(tensor)?.f_narrow(0, begin as i64, part as i64)?;
                place.f_copy_(&data.f_narrow(0, at as i64, part as i64)?)?;
                checks.of(&place)
            })();
            let found = taken.map_err(|e| format!("`{name}` of version {}: {e}", self.head.version))?;
            self.sums[self.at] = self.sums[self.at].then(found);
            at += part;
        }
        Ok(())
    }

    /// Takes the next chunk; the error says what is wrong with it.
    pub fn push(&mut self, chunk: &WeightsChunk) -> Result<(), String> {
        let found = verify(chunk).map_err(|sums| {
            self.skip_whole();
            let (name, at) = self.tensors.get(self.at).map_or(("", 0), |(n, _)| (n, self.sums[self.at].bytes));
            damaged(&format!("the chunk at byte {at} of `{name}` of version {}", self.head.version), sums)
        })?;
        let data = &chunk.data;
        self.skip_whole();
        if self.at == self.tensors.len() {
            return Err(self.too_many());
        }
        let (name, tensor) = &mut self.tensors[self.at];
        let at = self.sums[self.at].bytes;
        let (size, count) = (bytes(tensor), data.len());
        if at as usize + count > size || count == 0 {
            return Err(format!(
                "{count} bytes arrived at byte {at} of `{name}` of version {}, which has {size}",
                self.head.version
            ));
        }
        write(tensor, at as usize, data);
        self.sums[self.at] = self.sums[self.at].then(found);
        Ok(())
    }

    fn too_many(&self) -> String {
        format!("more than the announced tensors of version {} arrived", self.head.version)
    }

    fn skip_whole(&mut self) {
        while self.tensors.get(self.at).is_some_and(|(_, t)| self.sums[self.at].bytes == bytes(t) as u64) {
            self.at += 1;
        }
    }

    /// The whole, if it is what was announced.
    pub fn finish(mut self) -> Result<Update, String> {
        let version = self.head.version;
        self.skip_whole();
        if let Some((name, t)) = self.tensors.get(self.at) {
            let (left, found, size) = (self.tensors.len() - self.at, self.sums[self.at].bytes, bytes(t));
            return Err(format!(
                "the stream of version {version} ended early: {left} tensor(s) are missing, `{name}` came to byte {found} of {size}"
            ));
        }
        let mut sums = self.base;
        sums.extend(self.tensors.iter().map(|(n, _)| n.clone()).zip(self.sums));
        let found = checksum(&sums);
        if found != self.head.checksum {
            return Err(damaged(&format!("the whole of version {version}"), (found, self.head.checksum)));
        }
        let whole = self.head.base.is_none();
        let scale = self.head.adapter_scale;
        Ok(Update { version, checksum: found, whole, scale, tensors: self.tensors, sums })
    }
}

fn damaged(what: &str, (found, announced): (u32, u32)) -> String {
    format!("{what} has CRC-32C {found:08x}, {announced:08x} was announced: it was damaged on the way")
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// A tensor's bytes.
fn flat(tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_view([-1])?.f_view_dtype(Kind::Uint8)
}

/// A tensor for what is announced.
fn place(t: &WeightsTensor, pool: &mut Pool, device: Device) -> Result<Tensor, String> {
    let kind = match t.dtype.as_str() {
        "F32" => Kind::Float,
        "BF16" => Kind::BFloat16,
        "F16" => Kind::Half,
        other => return Err(format!("its kind `{other}` is not one of F32, BF16, F16")),
    };
    let sides = t.shape.iter().map(|n| i64::try_from(*n)).collect::<Result<Vec<i64>, _>>();
    let shape = sides.map_err(|_| format!("its shape {:?} is too large", t.shape))?;
    let size = shape.iter().try_fold(kind.elt_size_in_bytes() as i64, |size, n| size.checked_mul(*n));
    size.ok_or_else(|| format!("its shape {shape:?} is too large"))?;
    let fits = |old: &Tensor| old.kind() == kind && old.size() == shape && old.device() == device;
    if let Some(old) = pool.remove(&t.name).filter(fits) {
        return Ok(old);
    }
    let made = Tensor::f_empty(&shape, (kind, device));
    let made =
        if device == Device::Cpu { made } else { made.or_else(|_| Tensor::f_empty(&shape, (kind, Device::Cpu))) };
    made.map_err(|e| e.to_string())
}

/// Writes bytes of a tensor from byte `at` on.
#[allow(unsafe_code)]
fn write(tensor: &mut Tensor, at: usize, data: &[u8]) {
    assert!(at + data.len() <= bytes(tensor) && tensor.device() == Device::Cpu && tensor.is_contiguous());
    // SAFETY: the tensor is contiguous, in host memory and large enough (asserted above), and the caller has it alone. Any bytes
    // are numbers of its kind. The data came by message and does not overlap it.
    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), tensor.data_ptr().cast::<u8>().add(at), data.len()) }
}

#[cfg(test)]
mod tests {
    use unveil_proto::weights::chunk;

    use super::*;

    fn tensor(name: &str, shape: &[u64]) -> WeightsTensor {
        WeightsTensor { name: name.into(), dtype: "F32".into(), shape: shape.to_vec() }
    }

    /// A stream of `b` [3] and `a` [2, 2] in chunks of two numbers, with the checksum of both by name.
    fn stream(version: u64) -> (Vec<WeightsChunk>, Sums) {
        let number = |i: usize| (version as f32 + i as f32 / 8.0).to_le_bytes();
        let data: Vec<u8> = (0..7).flat_map(number).collect();
        let (b, a) = data.split_at(12);
        let sums: Sums = [("a".to_owned(), Sum::of(a)), ("b".to_owned(), Sum::of(b))].into();
        let tensors = vec![tensor("b", &[3]), tensor("a", &[2, 2])];
        let head = WeightsHead {
            version,
            checksum: checksum(&sums),
            base: None,
            tensors,
            adapter_scale: None,
            broadcast: None,
        };
        let mut chunks = vec![chunk(prost::Message::encode_to_vec(&head).into())];
        chunks.extend([b, a].iter().flat_map(|t| t.chunks(8)).map(|part| chunk(part.to_vec().into())));
        (chunks, sums)
    }

    fn assemble(chunks: &[WeightsChunk], known: Option<&Known>, pool: &mut Pool) -> Result<Update, String> {
        let mut a = Assembly::begin(&chunks[0], known, pool, Device::Cpu)?;
        chunks[1..].iter().try_for_each(|c| a.push(c))?;
        a.finish()
    }

    fn values(t: &Tensor) -> Vec<f32> {
        Vec::<f32>::try_from(t.reshape([-1])).unwrap()
    }

    #[test]
    fn a_whole_stream_becomes_tensors_and_their_memory_is_used_again() {
        let (chunks, sums) = stream(3);
        let mut pool = Pool::new();
        let update = assemble(&chunks, None, &mut pool).unwrap();
        assert_eq!((update.version, update.whole, &update.sums), (3, true, &sums));
        assert_eq!(values(&update.tensors[0].1), [3.0, 3.125, 3.25]);
        assert_eq!(
            (values(&update.tensors[1].1), update.tensors[1].1.size()),
            (vec![3.375, 3.5, 3.625, 3.75], vec![2, 2])
        );
        let place = update.tensors[1].1.data_ptr();
        pool.extend(update.tensors);
        pool.insert("gone".into(), Tensor::zeros([1], (Kind::Float, Device::Cpu)));
        let next = assemble(&stream(4).0, None, &mut pool).unwrap();
        assert_eq!(next.tensors[1].1.data_ptr(), place);
        assert!(pool.is_empty());
    }

    #[test]
    fn damage_is_named_with_version_and_both_sums() {
        let refused = |change: &dyn Fn(&mut Vec<WeightsChunk>)| {
            let mut chunks = stream(3).0;
            change(&mut chunks);
            assemble(&chunks, None, &mut Pool::new()).unwrap_err()
        };
        let flip = |chunks: &mut Vec<WeightsChunk>, at: usize| {
            let mut data = chunks[at].data.to_vec();
            data[3] ^= 16;
            chunks[at].data = data.into();
        };
        for at in 0..5 {
            let before = stream(3).0[at].crc32c;
            let text = refused(&|c| flip(c, at));
            let known = ["CRC-32C", &format!("{before:08x} was announced")];
            assert!(known.iter().all(|k| text.contains(k)) && (at == 0 || text.contains("version 3")), "{text}");
        }
        // A chunk that holds together, but is not the one that belongs there: only the whole tells.
        let text = refused(&|c| c[2] = chunk(vec![9u8; c[2].data.len()].into()));
        assert!(text.contains("the whole of version 3") && text.contains("was announced"), "{text}");
        for (text, word) in [
            (refused(&|c| c.truncate(4)), "ended early: 1 tensor(s) are missing, `a` came to byte 8 of 16"),
            (refused(&|c| c.truncate(1)), "2 tensor(s) are missing"),
            (refused(&|c| c.push(chunk(vec![1u8].into()))), "more than the announced"),
            (refused(&|c| c[2] = chunk(vec![0u8; 8].into())), "8 bytes arrived at byte 8 of `b`"),
            (refused(&|c| c[0] = chunk(vec![255u8; 3].into())), "the head cannot be read"),
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
    }

    #[test]
    fn bytes_fill_tensors_however_they_are_cut() {
        let (chunks, sums) = stream(3);
        let data: Vec<u8> = chunks[1..].iter().flat_map(|c| c.data.to_vec()).collect();
        let (begin, mut checks) =
            (|| Assembly::begin(&chunks[0], None, &mut Pool::new(), Device::Cpu).unwrap(), Checks::new(Device::Cpu));
        for cut in [1, 3, 8, 16, 28] {
            let mut a = begin();
            assert_eq!((a.size(), a.version(), a.broadcast()), (28, 3, None));
            data.chunks(cut).try_for_each(|part| a.fill(&Tensor::from_slice(part), &mut checks)).unwrap();
            assert!(a.fill(&Tensor::from_slice(&[0u8]), &mut checks).unwrap_err().contains("more than the announced"));
            let update = a.finish().unwrap();
            assert_eq!(update.sums, sums, "{cut}");
            assert_eq!(values(&update.tensors[1].1), [3.375, 3.5, 3.625, 3.75]);
        }
        let mut a = begin();
        let damaged: Vec<u8> = data.iter().map(|b| b ^ 2).collect();
        a.fill(&Tensor::from_slice(&damaged), &mut checks).unwrap();
        let text = a.finish().unwrap_err();
        assert!(text.contains("the whole of version 3"), "{text}");
    }

    #[test]
    fn a_part_builds_on_the_version_that_is_held() {
        let (chunks, mut sums) = stream(3);
        let first = assemble(&chunks, None, &mut Pool::new()).unwrap();
        let known = Known { version: 3, sums: first.sums };
        let data: Vec<u8> = [7f32, 8.0, 9.0, 10.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        sums.insert("a".into(), Sum::of(&data));
        let part = |base| {
            let tensors = vec![tensor("a", &[2, 2])];
            let head = WeightsHead {
                version: 4,
                checksum: checksum(&sums),
                base,
                tensors,
                adapter_scale: None,
                broadcast: None,
            };
            vec![chunk(prost::Message::encode_to_vec(&head).into()), chunk(data.clone().into())]
        };
        let update = assemble(&part(Some(known.held())), Some(&known), &mut Pool::new()).unwrap();
        assert!(!update.whole && update.sums == sums && update.tensors.len() == 1);
        let other = HeldWeights { version: 2, ..known.held() };
        for (base, held) in [(other, Some(&known)), (known.held(), None)] {
            let text = assemble(&part(Some(base)), held, &mut Pool::new()).unwrap_err();
            assert!(text.contains("version 4 builds on version"), "{text}");
        }
        // Said to be all, it is not.
        let text = assemble(&part(None), Some(&known), &mut Pool::new()).unwrap_err();
        assert!(text.contains("the whole of version 4"), "{text}");
    }

    /// Adapters that do not belong to the model are refused before anything of it changes.
    #[test]
    fn adapters_that_do_not_fit_leave_the_engine_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let special = unveil_model::SpecialIds {
            image_pad: 61,
            video_pad: 62,
            vision_start: 58,
            vision_end: 59,
            bos: None,
            eos: 60,
            pad: 63,
        };
        let (family, preset) = ("qwen2_5_vl".into(), "tiny".into());
        let spec = unveil_model::InitSpec { family, preset, vocab_size: 64, seed: 3, special };
        unveil_model::init(&spec, dir.path()).unwrap();
        let vlm = Vlm::load(dir.path(), Device::Cpu, Kind::Float).unwrap();
        let state = |vlm: &Vlm| {
            vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.copy())).collect::<Vec<(String, Tensor)>>()
        };
        let before = state(&vlm);
        let doubled: Vec<_> = before.iter().map(|(n, t)| (n.clone(), t * 2.0)).collect();
        let mut engine = Engine::new(vlm, unveil_engine::EngineOptions::default()).unwrap();
        let name = "model.layers.0.self_attn.q_proj";
        let width = engine.vlm().parameter(&format!("{name}.weight")).unwrap().size();
        let tensor = |end: &str, shape: [i64; 2]| {
            (format!("{name}.{end}.weight"), Tensor::ones(shape, (Kind::Float, Device::Cpu)))
        };
        let update = |whole: bool, scale: f64, adapters: Vec<(String, Tensor)>| {
            let base = doubled.iter().filter(|_| whole).map(|(n, t)| (n.clone(), t.shallow_clone()));
            let tensors = base.chain(adapters).collect();
            Update { version: 7, checksum: 0, whole, scale: Some(scale), tensors, sums: Sums::new() }
        };
        let (a, b) = (|| tensor("lora_A", [2, width[1]]), || tensor("lora_B", [width[0], 2]));
        for (bad, word) in [
            (update(true, 0.5, vec![a()]), "lora_B.weight` is missing"),
            (update(true, 0.5, vec![a(), tensor("lora_B", [width[0], 3])]), "expected"),
            (update(true, f64::INFINITY, vec![a(), b()]), "inf"),
            (update(false, 0.5, vec![("model.other.lora_A.weight".into(), a().1)]), "model.other"),
        ] {
            let text = bad.load_into(&mut engine).unwrap_err().to_string();
            assert!(text.contains(word) && engine.version() == 0 && state(engine.vlm()) == before, "{word}: {text}");
        }
        update(true, 0.5, vec![a(), b()]).load_into(&mut engine).unwrap();
        // B A is 2 everywhere, and half of it is added.
        let changed = |engine: &Engine| engine.vlm().parameter(&format!("{name}.weight")).unwrap().copy();
        let base = doubled.iter().find(|(n, _)| *n == format!("{name}.weight")).unwrap().1.shallow_clone();
        assert_eq!((engine.version(), changed(&engine)), (7, &base + 1.0));
        update(false, 1.0, vec![a(), b()]).load_into(&mut engine).unwrap();
        assert_eq!(changed(&engine), base + 2.0);
    }

    #[test]
    fn what_cannot_be_a_tensor_is_refused() {
        let begin = |t: WeightsTensor| {
            let head = WeightsHead { version: 1, tensors: vec![t], ..Default::default() };
            let first = chunk(prost::Message::encode_to_vec(&head).into());
            Assembly::begin(&first, None, &mut Pool::new(), Device::Cpu).err().unwrap_or_default()
        };
        let text = begin(WeightsTensor { dtype: "I8".into(), ..tensor("x", &[1]) });
        assert!(text.contains("`x`") && text.contains("I8"), "{text}");
        assert!(begin(tensor("x", &[u64::MAX])).contains("too large"));
        assert!(begin(tensor("x", &[1 << 40, 1 << 40])).contains("too large"));
    }
}
