//! Gradients of a mini-batch: collected from the parameters bucket by bucket during the backward pass, and reduced over ranks
//! meanwhile.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};
use unveil_collective::{Collective, Work};
use unveil_torch_ext::drop_grad;

use super::layout::{Bucket, ShardLayout};
use super::ranks::{Ranks, ZeroStage, wait};
use crate::error::Result;

/// Time spent on gradient reductions.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ReduceTiming {
    /// Time in which at least one reduction was in flight.
    pub in_flight: Duration,
    /// The part of it in which this rank did nothing but wait.
    pub waited: Duration,
}

/// Collects the gradients of a mini-batch and reduces them over ranks.
#[derive(Debug)]
pub(crate) struct GradientReducer {
    layout: Rc<ShardLayout>,
    ranks: Rc<Ranks>,
    /// Dtype of the sums.
    kind: Kind,
    /// By bucket, this rank's gradients over the passes of this mini-batch, not yet reduced.
    local: Vec<Option<Tensor>>,
    /// By bucket, the part of the sum over all ranks that this rank owns.
    owned: Vec<Option<Tensor>>,
    /// Reductions in flight over shards (over replicas without sharding), by bucket, in order.
    in_flight: Vec<(usize, Work)>,
    /// When the first of these was started.
    started: Option<Instant>,
    timing: ReduceTiming,
}

impl GradientReducer {
    pub(crate) fn new(layout: Rc<ShardLayout>, ranks: Rc<Ranks>, kind: Kind) -> Self {
        let none = || layout.buckets.iter().map(|_| None).collect();
        let local = none();
        let owned = none();
        Self {
            layout,
            ranks,
            kind,
            local,
            owned,
            in_flight: Vec::new(),
            started: None,
            timing: ReduceTiming::default(),
        }
    }

    /// Returns the number of decoder layers, up to the last one with gradients.
    pub(crate) fn layers(&self) -> usize {
        self.layout.layers()
    }

    /// Collects the gradients of a layer (`None`: of everything outside the layers) after its backward pass; `last` marks the last
    /// pass of the mini-batch.
    pub(crate) fn accumulate(&mut self, layer: Option<usize>, last: bool) -> Result<()> {
        let layout = self.layout.clone();
        let Some(index) = layout.buckets.iter().position(|b| b.layer == layer) else { return Ok(()) };
        let bucket = &layout.buckets[index];
        let keep_local = !last && self.ranks.zero_stage() < ZeroStage::Gradients;
        if keep_local && bucket.slots.iter().all(|s| s.tensor.kind() == self.kind) {
            // They add up in the parameters' own gradient tensors.
            return Ok(());
        }
        let mut flat = take_flat_gradients(bucket, self.kind)?;
        if let Some(before) = self.local[index].take() {
            flat = before.f_add(&flat)?;
        }
        if keep_local {
            self.local[index] = Some(flat);
            return Ok(());
        }
        // At most one reduction of a bucket is in flight, which bounds the memory.
        if self.in_flight.iter().any(|(b, _)| *b == index) {
            self.wait_all()?;
        }
        let work = match (self.ranks.shards(), self.ranks.replicas()) {
            (Some(shards), _) => shards.start_reduce_scatter(flat)?,
            (None, Some(replicas)) => replicas.start_all_reduce(flat)?,
            (None, None) => {
                add(&mut self.owned[index], flat)?;
                return Ok(());
            }
        };
        self.started.get_or_insert_with(Instant::now);
        self.in_flight.push((index, work));
        Ok(())
    }

    /// Waits for all reductions in flight.
    fn wait_all(&mut self) -> Result<()> {
        let start = Instant::now();
        let result = self.finish_reductions();
        self.timing.waited += start.elapsed();
        self.timing.in_flight += self.started.take().map_or(Duration::ZERO, |started| started.elapsed());
        result
    }

    /// Returns the time of reductions since the last call, and resets it.
    pub(crate) fn take_timing(&mut self) -> ReduceTiming {
        std::mem::take(&mut self.timing)
    }

    fn finish_reductions(&mut self) -> Result<()> {
        let ranks = self.ranks.clone();
        let mut over_replicas = Vec::new();
        for (index, work) in std::mem::take(&mut self.in_flight) {
            match (ranks.shards(), ranks.replicas()) {
                (Some(shards), Some(replicas)) => {
                    over_replicas.push((index, replicas.start_all_reduce(wait(shards, work)?)?));
                }
                (Some(group), None) | (None, Some(group)) => add(&mut self.owned[index], wait(group, work)?)?,
                (None, None) => {}
            }
        }
        for (index, work) in over_replicas {
            if let Some(replicas) = ranks.replicas() {
                add(&mut self.owned[index], wait(replicas, work)?)?;
            }
        }
        Ok(())
    }

    /// Waits for all reductions and returns the part of the sum over all ranks that this rank owns, flat.
    pub(crate) fn finish(&mut self) -> Result<Tensor> {
        self.wait_all()?;
        let layout = self.layout.clone();
        let mut parts = Vec::with_capacity(layout.buckets.len());
        for (bucket, owned) in layout.buckets.iter().zip(&mut self.owned) {
            parts.push(match owned.take() {
                Some(t) => t,
                None => Tensor::f_zeros([bucket.size()], (self.kind, bucket.slots[0].tensor.device()))?,
            });
        }
        Ok(if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::f_cat(&parts, 0)? })
    }

    /// Drops all gradients, those in the parameters too. Waits for the reductions in flight, which all ranks take part in.
    pub(crate) fn clear(&mut self) -> Result<()> {
        self.wait_all()?;
        self.local.iter_mut().chain(&mut self.owned).for_each(|t| *t = None);
        for slot in self.layout.slots() {
            drop_grad(&slot.tensor)?;
        }
        Ok(())
    }
}

/// Moves the gradients of a bucket out of its parameters, flat; a parameter without a gradient counts as 0.
fn take_flat_gradients(bucket: &Bucket, kind: Kind) -> Result<Tensor> {
    let flat = bucket.flatten(kind, |s| Ok(Some(s.tensor.grad()).filter(Tensor::defined)))?;
    for s in &bucket.slots {
        drop_grad(&s.tensor)?;
    }
    Ok(flat)
}

fn add(sum: &mut Option<Tensor>, more: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        None => more,
        Some(before) => before.f_add(&more)?,
    });
    Ok(())
}
