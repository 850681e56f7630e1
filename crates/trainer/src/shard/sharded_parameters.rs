//! Parameters that are sharded over ranks and gathered only while a pass needs them (ZeRO stage 3, arXiv 1910.02054): the next layer
//! is all-gathered while the present one computes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use tch::{Tensor, no_grad};
use unveil_collective::{Collective, Group, Work};
use unveil_torch_ext::{memory_size, resize_memory};

use super::layout::{ParameterSlice, ShardLayout};
use super::ranks::{Ranks, wait};
use crate::error::{Result, TrainerError};

/// The parameters of a model, sharded. A part of the model is a decoder layer (`Some`), or everything that belongs to none (`None`).
#[derive(Debug)]
pub(crate) struct ShardedParameters {
    ranks: Rc<Ranks>,
    /// Layouts of the sharded parameters, each with the values that this rank owns, flat.
    sources: Vec<(Rc<ShardLayout>, Tensor)>,
    /// Bytes of memory of each parameter, by source and bucket.
    bytes: Vec<Vec<Vec<usize>>>,
    /// Number of decoder layers.
    pub layers: usize,
    state: RefCell<GatherState>,
}

#[derive(Default, Debug)]
struct GatherState {
    /// Parts of the model that are gathered.
    gathered: Vec<Option<usize>>,
    /// All-gathers under way, by part: source, bucket and call.
    in_flight: HashMap<Option<usize>, Vec<(usize, usize, Work)>>,
}

impl ShardedParameters {
    /// Shards parameters: each source is the layout of parameters of one dtype and the values that this rank owns of them. They stay
    /// gathered until [`ShardedParameters::release`].
    pub(crate) fn new(ranks: Rc<Ranks>, sources: Vec<(Rc<ShardLayout>, Tensor)>) -> Result<Self> {
        let layers = sources.iter().map(|(layout, _)| layout.layers()).max().unwrap_or(0);
        let mut bytes = Vec::new();
        for (layout, _) in &sources {
            let mut layout_bytes = Vec::new();
            for bucket in &layout.buckets {
                let slot_bytes = bucket.slots.iter().map(|s| separate_memory(&s.tensor));
                layout_bytes.push(slot_bytes.collect::<Result<Vec<_>>>()?);
            }
            bytes.push(layout_bytes);
        }
        let gathered = std::iter::once(None).chain((0..layers).map(Some)).collect();
        let state = RefCell::new(GatherState { gathered, in_flight: HashMap::new() });
        Ok(Self { ranks, sources, bytes, layers, state })
    }

    /// Returns this rank's slices of the parameters that are not trained, divided into `part.1` parts of which `part.0` is returned.
    pub(crate) fn untrained_slices(&self, part: (usize, usize)) -> Result<Vec<ParameterSlice>> {
        // The first source holds the trained parameters.
        let untrained = self.sources.iter().skip(1);
        let slices =
            untrained.map(|(layout, owned)| layout.owned_slices(Some(owned), part)).collect::<Result<Vec<_>>>()?;
        Ok(slices.into_iter().flatten().collect())
    }

    fn group(&self) -> Result<&Group> {
        self.ranks
            .shards()
            .ok_or_else(|| TrainerError::Setting("parameters cannot be sharded over a single rank".into()))
    }

    /// Starts the all-gather of `part`, unless it is gathered or under way.
    pub(crate) fn prefetch(&self, part: Option<usize>) -> Result<()> {
        let mut state = self.state.borrow_mut();
        if state.gathered.contains(&part) || state.in_flight.contains_key(&part) {
            return Ok(());
        }
        let mut works = Vec::new();
        for (s, (layout, owned)) in self.sources.iter().enumerate() {
            for (b, bucket) in layout.buckets.iter().enumerate().filter(|(_, b)| b.layer == part) {
                let shard = no_grad(|| {
                    Ok::<_, TrainerError>(owned.f_narrow(0, bucket.offset, bucket.size())?.f_to_kind(bucket.kind)?)
                })?;
                works.push((s, b, self.group()?.start_all_gather(shard.f_contiguous()?)?));
            }
        }
        state.in_flight.insert(part, works);
        Ok(())
    }

    /// Gathers `part`: waits for its all-gather and fills the parameters.
    pub(crate) fn gather(&self, part: Option<usize>) -> Result<()> {
        self.prefetch(part)?;
        let Some(works) = self.state.borrow_mut().in_flight.remove(&part) else { return Ok(()) };
        let mut failed = None;
        for (s, b, work) in works {
            let gathered = wait(self.group()?, work);
            let bucket = &self.sources[s].0.buckets[b];
            for (slot, bytes) in bucket.slots.iter().zip(&self.bytes[s][b]) {
                // The memory must exist even after a failure, because the pass is about to compute with it.
                resize_memory(&slot.tensor, *bytes)?;
                if let Ok(flat) = &gathered {
                    no_grad(|| {
                        Ok::<_, TrainerError>(slot.tensor.data().f_copy_(&bucket.view_of(flat, slot)?).map(drop)?)
                    })?;
                }
            }
            failed = failed.or(gathered.err());
        }
        self.state.borrow_mut().gathered.push(part);
        failed.map_or(Ok(()), Err)
    }

    /// Releases the memory of `part`.
    pub(crate) fn release(&self, part: Option<usize>) -> Result<()> {
        let mut state = self.state.borrow_mut();
        let Some(index) = state.gathered.iter().position(|p| *p == part) else { return Ok(()) };
        state.gathered.swap_remove(index);
        for (layout, _) in &self.sources {
            for slot in layout.buckets.iter().filter(|b| b.layer == part).flat_map(|b| &b.slots) {
                resize_memory(&slot.tensor, 0)?;
            }
        }
        Ok(())
    }

    /// Gathers all parameters.
    pub(crate) fn gather_all(&self) -> Result<()> {
        self.gather(None)?;
        (0..self.layers).try_for_each(|layer| self.gather(Some(layer)))
    }

    /// Releases the memory of all parameters.
    pub(crate) fn release_all(&self) -> Result<()> {
        self.release(None)?;
        (0..self.layers).try_for_each(|layer| self.release(Some(layer)))
    }
}

/// Returns the bytes of memory of a parameter, after copying it out of a memory-mapped file if it is in one.
fn separate_memory(tensor: &Tensor) -> Result<usize> {
    if memory_size(tensor)?.is_none() {
        no_grad(|| tensor.shallow_clone().f_set_data(&tensor.f_detach()?.copy()))?;
    }
    Ok(memory_size(tensor)?.unwrap_or(0))
}
