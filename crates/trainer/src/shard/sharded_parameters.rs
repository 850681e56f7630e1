//! Parameters that are sharded over ranks and gathered only while a pass needs them (ZeRO stage 3, arXiv 1910.02054): the next layers
//! are all-gathered while the present one computes, and on GPUs the host enqueues layers whose parameters have not arrived yet.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use tch::{Tensor, no_grad};
use unveil_collective::{Collective, Group, Joined, Work};
use unveil_torch_ext::{memory_size, resize_memory};

use super::layout::{ParameterSlice, ShardLayout};
use super::ranks::{Ranks, join, wait, wait_joined};
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
    /// All-gathers that the device waits for and that the host has not checked, by part, the oldest first.
    unchecked: VecDeque<Vec<Joined>>,
}

/// Parts that the host runs ahead of the device: it checks older all-gathers before it enqueues further work that depends on others.
const MAX_UNCHECKED: usize = 2;

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
        let state = RefCell::new(GatherState { gathered, ..GatherState::default() });
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

    /// Gathers `part` and fills the parameters. For a layer only the device waits for the all-gather, if it can; see
    /// [`ShardedParameters::check_gathers`]. For the part outside the layers the host waits: what follows reads results.
    pub(crate) fn gather(&self, part: Option<usize>) -> Result<()> {
        self.prefetch(part)?;
        let Some(works) = self.state.borrow_mut().in_flight.remove(&part) else { return Ok(()) };
        let mut failed = None;
        let mut unchecked = Vec::new();
        for (s, b, work) in works {
            let group = self.group()?;
            let gathered = match part {
                Some(_) => join(group, work),
                None => wait(group, work).map(|flat| (flat, None)),
            };
            let bucket = &self.sources[s].0.buckets[b];
            for (slot, bytes) in bucket.slots.iter().zip(&self.bytes[s][b]) {
                // The memory must exist even after a failure, because the pass is about to compute with it.
                resize_memory(&slot.tensor, *bytes)?;
                if let Ok((flat, _)) = &gathered {
                    no_grad(|| {
                        Ok::<_, TrainerError>(slot.tensor.data().f_copy_(&bucket.view_of(flat, slot)?).map(drop)?)
                    })?;
                }
            }
            match gathered {
                Ok((_, joined)) => unchecked.extend(joined),
                Err(e) => failed = failed.or(Some(e)),
            }
        }
        let mut state = self.state.borrow_mut();
        state.gathered.push(part);
        state.unchecked.push_back(unchecked);
        drop(state);
        let checked = self.check_all_but(MAX_UNCHECKED);
        failed.map_or(checked, Err)
    }

    /// Waits for all gathers whose parameters have been computed with, before anything waits for the device in another way.
    pub(crate) fn check_gathers(&self) -> Result<()> {
        self.check_all_but(0)
    }

    /// Waits for the gathers of all parts but the newest `count`.
    fn check_all_but(&self, count: usize) -> Result<()> {
        let mut state = self.state.borrow_mut();
        let checked = state.unchecked.len().saturating_sub(count);
        let oldest: Vec<Joined> = state.unchecked.drain(..checked).flatten().collect();
        drop(state);
        oldest.into_iter().try_for_each(|joined| wait_joined(self.group()?, joined))
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
        (0..self.layers).try_for_each(|layer| self.gather(Some(layer)))?;
        self.check_gathers()
    }

    /// Gathers all parameters, and keeps them if `keep`; else takes part in the gathers of the ranks that do.
    pub(crate) fn gather_if(&self, keep: bool) -> Result<()> {
        if keep {
            self.release_all()?;
            return self.gather_all();
        }
        self.visit_parts(|_| Ok(()))
    }

    /// Gathers part after part, and calls `visit` while it is gathered: one layer is whole at a time, and what belongs to no layer. All
    /// ranks call it.
    pub(crate) fn visit_parts<E: From<TrainerError>>(
        &self,
        mut visit: impl FnMut(Option<usize>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.release_all()?;
        let mut outcome = Ok(());
        for part in std::iter::once(None).chain((0..self.layers).map(Some)) {
            self.gather(part)?;
            self.check_gathers()?;
            // The other ranks need this one for their gathers, even after an error.
            if outcome.is_ok() {
                outcome = visit(part);
            }
            self.release(part)?;
        }
        outcome
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
