//! This rank's share of a checkpoint: the copy of its state to host memory in the layout of the checkpoint objects, and
//! loading it back.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tch::{Device, Kind};
use tokio::runtime::Handle;
use unveil_checkpoint::{Dtype, MAX_OBJECT_BYTES, Object, ObjectLayout, ReadRequest, Reader, TensorSlice};
use unveil_model::{Adapters, Vlm};
use unveil_torch_ext::HostBuffer;
use unveil_trainer::{CRITIC_PREFIX, LocalState, StateSlice};

use crate::error::{LearnerError, Result};

/// Name of the adapters' part of a checkpoint.
pub(crate) const ADAPTER: &str = "adapter";

/// Part of a checkpoint that forms the model directory.
pub(crate) const MODEL: &str = "model";

/// Largest host buffer of a load, in bytes.
const MAX_READ_BYTES: usize = 1 << 30;

/// Host memory for copies; what one save has used, the next one takes again.
#[derive(Clone, Default, Debug)]
pub struct HostBufferPool(Arc<Mutex<Option<HostBuffer>>>);

impl HostBufferPool {
    fn take(&self, size: usize, device: Device) -> Result<HostBuffer> {
        let reusable = self.lock().take().filter(|b| b.size() == size);
        Ok(match reusable {
            Some(buffer) => buffer,
            None => {
                let buffer = HostBuffer::new(size, device)?;
                if let Some(why) = buffer.pin_error() {
                    tracing::warn!("host memory for checkpoints is not page-locked, copies will be slower: {why}");
                }
                buffer
            }
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<HostBuffer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer that returns to its pool once the last reader drops it.
struct PooledBuffer {
    buffer: Option<HostBuffer>,
    pool: HostBufferPool,
}

impl AsRef<[u8]> for PooledBuffer {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], AsRef::as_ref)
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        *self.pool.lock() = self.buffer.take();
    }
}

/// Copy of this rank's share of a checkpoint in host memory.
#[derive(Debug)]
pub struct HostCopy {
    /// Shard objects.
    pub objects: Vec<Object>,
    /// Duration of the copy.
    pub took: Duration,
}

/// Returns the name of a parameter in checkpoints, and the part of the checkpoint that it is exported with.
fn checkpoint_name(vlm: &Vlm, name: &str) -> (String, &'static str) {
    if name.starts_with(CRITIC_PREFIX) {
        return (name.to_owned(), "");
    }
    if vlm.adapters().is_some_and(|a| a.saved_tensors().any(|(n, _)| n == name)) {
        return (Adapters::peft_name(name), ADAPTER);
    }
    match vlm.parameter(name) {
        Some(_) => (vlm.published_name(name), MODEL),
        None => (name.to_owned(), ""),
    }
}

fn dtype(kind: Kind) -> Dtype {
    match kind {
        Kind::Double => Dtype::F64,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Half => Dtype::F16,
        _ => Dtype::F32,
    }
}

fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
    }
}

/// Copies the slices of `state` to host memory, in the layout of the checkpoint objects: fp32 master weights and moments.
///
/// # Errors
/// Returns [`LearnerError::Trainer`] if the host memory cannot be allocated.
pub fn copy_to_host(state: &LocalState<'_>, buffers: &HostBufferPool) -> Result<HostCopy> {
    let stored_kind = state.kind;
    let tensor_slice = |h: &StateSlice| {
        let (name, artifact) = checkpoint_name(state.vlm, &h.slice.name);
        TensorSlice {
            kind: h.kind.to_owned(),
            name,
            artifact: if h.kind == "weight" { artifact.to_owned() } else { String::new() },
            dtype: dtype(stored_kind),
            shape: h.slice.shape.iter().map(|n| *n as u64).collect(),
            begin: h.slice.begin as u64,
            count: h.slice.values.numel() as u64,
        }
    };
    let layouts = ObjectLayout::split_into_objects(state.slices.iter().map(tensor_slice).collect(), MAX_OBJECT_BYTES);
    let mut firsts = Vec::with_capacity(layouts.len());
    let mut size = 0usize;
    for layout in &layouts {
        firsts.push(size);
        size += (layout.size() as usize).next_multiple_of(64);
    }
    let start = Instant::now();
    let mut buffer = buffers.take(size, state.vlm.device())?;
    // The slices of the layouts are ours in the same order, some of them split.
    let mut current = 0;
    let mut copied = 0;
    for (layout, first) in layouts.iter().zip(&firsts) {
        buffer.as_mut()[*first..first + layout.header().len()].copy_from_slice(layout.header());
        for (part, offset) in layout.slices() {
            let values = &state.slices[current].slice.values;
            let count = part.count as i64;
            buffer.copy_in(first + offset as usize, &values.f_narrow(0, copied, count)?, stored_kind)?;
            copied += count;
            if copied == values.numel() as i64 {
                current += 1;
                copied = 0;
            }
        }
    }
    let took = start.elapsed();
    let bytes = Bytes::from_owner(PooledBuffer { buffer: Some(buffer), pool: buffers.clone() });
    let object = |(i, (layout, first)): (usize, (ObjectLayout, usize))| Object {
        name: format!("shards/rank-{:05}-{i:05}.safetensors", state.rank),
        bytes: bytes.slice(first..first + layout.size() as usize),
        layout: Some(layout),
    };
    Ok(HostCopy { objects: layouts.into_iter().zip(firsts).enumerate().map(object).collect(), took })
}

/// Loads the slices of `state` in place from a checkpoint, which may have been saved by any number of ranks under any ZeRO stage. Call
/// it before the first update, followed by [`PolicyTrainer::resume_from`](unveil_trainer::PolicyTrainer::resume_from).
///
/// # Errors
/// Returns [`LearnerError::CheckpointState`] if a tensor has the wrong shape, and [`LearnerError::Checkpoint`] if one is missing, an
/// object is damaged, or the store fails.
pub fn read_state(state: &LocalState<'_>, handle: &Handle, reader: &Reader) -> Result<()> {
    for kind in ["weight", "exp_avg", "exp_avg_sq"] {
        let mut remaining: Vec<&StateSlice> = state.slices.iter().filter(|h| h.kind == kind).collect();
        while !remaining.is_empty() {
            let mut bytes = 0;
            let fits = remaining.iter().take_while(|h| {
                let bytes_before = bytes;
                bytes += h.slice.values.numel() * state.kind.elt_size_in_bytes();
                bytes_before == 0 || bytes <= MAX_READ_BYTES
            });
            let count = fits.count();
            let batch: Vec<&StateSlice> = remaining.drain(..count).collect();
            read_batch(state.vlm, (handle, reader), &batch)?;
        }
    }
    Ok(())
}

/// Loads slices through one host buffer for all of them.
fn read_batch(vlm: &Vlm, (handle, reader): (&Handle, &Reader), slices: &[&StateSlice]) -> Result<()> {
    let mut requests = Vec::new();
    let mut targets = Vec::new();
    let mut size = 0usize;
    for StateSlice { kind: what, slice: s } in slices.iter().copied() {
        let name = checkpoint_name(vlm, &s.name).0;
        let stored = reader.tensor(what, &name).map(|t| (t.dtype, t.shape.clone()));
        let shape: Vec<u64> = s.shape.iter().map(|n| *n as u64).collect();
        let width = match &stored {
            Some((dtype, found)) if *found == shape => dtype.size() as usize,
            Some((_, found)) => {
                let what = format!("its {what} of `{name}` has shape {found:?}, but the parameter has shape {shape:?}");
                return Err(LearnerError::CheckpointState { step: reader.info().step, what });
            }
            None => 0,
        };
        let count = s.values.numel();
        let kind = (*what).to_owned();
        let begin = s.begin as u64;
        requests.push(ReadRequest { kind, name, begin, count: count as u64, destination: size });
        targets.push((size, stored.map(|(d, _)| d), &s.values));
        size = (size + count * width).next_multiple_of(8);
    }
    let mut buffer = HostBuffer::new(size, Device::Cpu)?;
    handle.block_on(reader.read(&requests, buffer.as_mut()))?;
    for (offset, stored, values) in targets {
        buffer.copy_out(offset, kind(stored.unwrap_or(Dtype::F32)), values)?;
    }
    Ok(())
}
