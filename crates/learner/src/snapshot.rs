//! This rank's share of a checkpoint: which numbers of which parameters it has, their copy in host memory in the layout of the objects,
//! and the way back. Must not know: stores' addresses, stages, when a checkpoint is made.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;
use unveil_algo::KlController;
use unveil_checkpoint::{Dtype, Layout, OBJECT, Object, Piece, Reader, Want};
use unveil_model::{Adapters, Vlm};
use unveil_torch_ext::HostBuffer;

use crate::error::{LearnerError, Result};
use crate::lora::ADAPTER;
use crate::optim::AdamW;
use crate::setup::CRITIC;
use crate::shard::{Plan, Stretch};
use crate::step::{Counters, Learner};

/// The part of a checkpoint that is the model directory.
pub(crate) const MODEL: &str = "model";

/// Bytes that a load holds beside the state.
const AT_ONCE: usize = 1 << 30;

/// Where a learner stands beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stand {
    pub(crate) counters: Counters,
    /// By parameter, updates that it took part in, where these are fewer.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) counts: BTreeMap<String, u64>,
    /// Weight of KL to the reference; stage 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kl: Option<KlController>,
}

/// Host memory for copies; what one save has used, the next one takes again.
#[derive(Clone, Default)]
pub struct Buffers(Arc<Mutex<Option<HostBuffer>>>);

impl Buffers {
    fn take(&self, size: usize, device: Device) -> Result<HostBuffer> {
        let before = self.lock().take().filter(|b| b.size() == size);
        Ok(match before {
            Some(b) => b,
            None => {
                let new = HostBuffer::new(size, device)?;
                if let Some(why) = new.unlocked() {
                    tracing::warn!("host memory for checkpoints is not locked, copies to it take longer: {why}");
                }
                new
            }
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<HostBuffer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer that goes back when nobody reads it any more.
struct Lent {
    buffer: Option<HostBuffer>,
    home: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], AsRef::as_ref)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        *self.home.lock() = self.buffer.take();
    }
}

/// What a rank writes of a checkpoint.
pub struct Copied {
    /// Its shards.
    pub objects: Vec<Object>,
    /// What the copy took.
    pub took: Duration,
}

/// Numbers on this rank, with what they are of which parameter.
pub(crate) struct Held {
    kind: &'static str,
    stretch: Stretch,
}

/// State on this rank.
pub(crate) struct State<'a> {
    pub vlm: &'a Vlm,
    pub optimizer: &'a AdamW,
    pub rank: usize,
    pub held: Vec<Held>,
}

/// The name of a parameter in checkpoints, and the part that it is exported with.
fn key(vlm: &Vlm, name: &str) -> (String, &'static str) {
    if name.starts_with(CRITIC) {
        return (name.to_owned(), "");
    }
    if vlm.parameter(name).is_some() {
        return (vlm.published_name(name), MODEL);
    }
    match vlm.adapters().filter(|a| a.named_parameters().iter().any(|(n, _)| n == name)) {
        Some(_) => (Adapters::stored_name(name), ADAPTER),
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

/// What an optimiser has, and weights that are not trained.
pub(crate) fn held(optimizer: &AdamW, part: (usize, usize), untrained: Vec<Stretch>) -> Result<Vec<Held>> {
    let weights = untrained.into_iter().map(|stretch| Held { kind: "weight", stretch });
    let trained = optimizer.stretches(part)?.into_iter().map(|(kind, stretch)| Held { kind, stretch });
    let mut all: Vec<Held> = weights.chain(trained).collect();
    // Objects hold one kind each.
    all.sort_by_key(|h| h.kind != "weight");
    Ok(all)
}

impl State<'_> {
    /// Copies everything to host memory, laid out as the objects are.
    pub fn copy(&self, buffers: &Buffers) -> Result<Copied> {
        let to = self.optimizer.kind();
        let piece = |h: &Held| {
            let (name, part) = key(self.vlm, &h.stretch.name);
            Piece {
                kind: h.kind.to_owned(),
                name,
                part: if h.kind == "weight" { part.to_owned() } else { String::new() },
                dtype: dtype(to),
                shape: h.stretch.shape.iter().map(|n| *n as u64).collect(),
                begin: h.stretch.begin as u64,
                count: h.stretch.numbers.numel() as u64,
            }
        };
        let layouts = Layout::divide(self.held.iter().map(piece).collect(), OBJECT);
        let mut firsts = Vec::with_capacity(layouts.len());
        let mut size = 0usize;
        for layout in &layouts {
            firsts.push(size);
            size += (layout.size() as usize).next_multiple_of(64);
        }
        let start = Instant::now();
        let mut buffer = buffers.take(size, self.vlm.device())?;
        // Layouts hold the same numbers in the same order, cut here and there.
        let (mut at, mut done) = (0, 0);
        for (layout, first) in layouts.iter().zip(&firsts) {
            buffer.as_mut()[*first..first + layout.header().len()].copy_from_slice(layout.header());
            for (p, place) in layout.pieces() {
                let (numbers, count) = (&self.held[at].stretch.numbers, p.count as i64);
                buffer.copy_in(first + place as usize, &numbers.f_narrow(0, done, count)?, to)?;
                done += count;
                if done == numbers.numel() as i64 {
                    (at, done) = (at + 1, 0);
                }
            }
        }
        let took = start.elapsed();
        let whole = Bytes::from_owner(Lent { buffer: Some(buffer), home: buffers.clone() });
        let object = |(i, (layout, first)): (usize, (Layout, usize))| Object {
            name: format!("shards/rank-{:05}-{i:05}.safetensors", self.rank),
            bytes: whole.slice(first..first + layout.size() as usize),
            layout: Some(layout),
        };
        Ok(Copied { objects: layouts.into_iter().zip(firsts).enumerate().map(object).collect(), took })
    }

    /// Reads everything from a checkpoint to where it is. The parameters of divided state are not touched yet.
    pub fn read(&self, handle: &Handle, reader: &Reader) -> Result<()> {
        for kind in ["weight", "exp_avg", "exp_avg_sq"] {
            let mut rest: Vec<&Held> = self.held.iter().filter(|h| h.kind == kind).collect();
            while !rest.is_empty() {
                let mut bytes = 0;
                let fits = rest.iter().take_while(|h| {
                    let before = bytes;
                    bytes += h.stretch.numbers.numel() * self.optimizer.kind().elt_size_in_bytes();
                    before == 0 || bytes <= AT_ONCE
                });
                let count = fits.count();
                let batch: Vec<&Held> = rest.drain(..count).collect();
                self.read_some(handle, reader, &batch)?;
            }
        }
        Ok(())
    }

    /// Reads stretches by way of host memory for all of them.
    fn read_some(&self, handle: &Handle, reader: &Reader, held: &[&Held]) -> Result<()> {
        let (mut wants, mut places, mut size) = (Vec::new(), Vec::new(), 0usize);
        for Held { kind: what, stretch: s } in held.iter().copied() {
            let name = key(self.vlm, &s.name).0;
            let stored = reader.tensor(what, &name).map(|t| (t.dtype, t.shape.clone()));
            let shape: Vec<u64> = s.shape.iter().map(|n| *n as u64).collect();
            let width = match &stored {
                Some((dtype, found)) if *found == shape => dtype.size() as usize,
                Some((_, found)) => {
                    let what = format!("its {what} of `{name}` has shape {found:?}, the parameter {shape:?}");
                    return Err(LearnerError::State { step: reader.info().step, what });
                }
                None => 0,
            };
            let count = s.numbers.numel();
            let (kind, begin) = ((*what).to_owned(), s.begin as u64);
            wants.push(Want { kind, name, begin, count: count as u64, to: size });
            places.push((size, stored.map(|(d, _)| d), &s.numbers));
            size = (size + count * width).next_multiple_of(8);
        }
        let mut buffer = HostBuffer::new(size, Device::Cpu)?;
        handle.block_on(reader.read(&wants, buffer.as_mut()))?;
        for (at, stored, numbers) in places {
            buffer.copy_out(at, kind(stored.unwrap_or(Dtype::F32)), numbers)?;
        }
        Ok(())
    }
}

impl Learner {
    /// This rank's state; where it is to be `read`, all that the rank needs, else what no other rank has.
    pub(crate) fn local(&self, read: bool) -> Result<State<'_>> {
        let (vlm, ranks) = (&self.policy.vlm, &self.ranks);
        let part = if read { (0, 1) } else { ranks.replica() };
        let untrained = match &self.policy.course.gathered {
            // Adapters lie beside weights that are in no checkpoint.
            _ if vlm.adapters().is_some() => Vec::new(),
            Some(divided) => divided.untrained(part)?,
            None => {
                let trained: Vec<_> = self.optimizer.names().collect();
                let rest = vlm.named_parameters().iter().filter(|(n, _)| !trained.contains(&n.as_str()));
                let rest: Vec<(String, Tensor)> = rest.map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
                let part = if read { (0, 1) } else { (ranks.rank(), ranks.size()) };
                Plan::new(&rest, false, (0, 1))?.stretches(None, part)?
            }
        };
        let held = held(&self.optimizer, part, untrained)?;
        Ok(State { vlm, optimizer: &self.optimizer, rank: ranks.rank(), held })
    }

    /// Copies what this rank is to write of a checkpoint to host memory: weights to their last digit, moments. Ranks do this without
    /// each other.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn snapshot(&self, buffers: &Buffers) -> Result<Copied> {
        self.local(false)?.copy(buffers)
    }

    /// Where it stands beside its tensors.
    pub fn stand(&self) -> Stand {
        Stand { counters: self.counters(), counts: self.optimizer.counts(), kl: Some(self.kl_controller()) }
    }

    /// Reads this rank's share of a checkpoint, which any number of ranks under any stage may have written. Call it before the first
    /// update, and [`Learner::go_on`] after it.
    ///
    /// # Errors
    /// A tensor is missing or misshapen, an object damaged; or a store error.
    pub fn read(&self, handle: &Handle, reader: &Reader) -> Result<()> {
        self.local(true)?.read(handle, reader)
    }

    /// Goes on from what [`Learner::read`] read on all ranks; all ranks call it.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn go_on(&mut self, stand: &Stand) -> Result<()> {
        self.optimizer.go_on(stand.counters.updates, &stand.counts)?;
        self.restore(stand.counters, stand.kl.as_ref());
        Ok(())
    }
}
