//! Gradients of a mini-batch: taken from the parameters block by block while a backward pass goes on, and summed over ranks
//! meanwhile. Knows no pass and no optimiser.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};
use unveil_collective::{Collective, Work};
use unveil_torch_ext::drop_grad;

use super::plan::{Block, Plan};
use super::ranks::{Ranks, Zero, end};
use crate::error::Result;

/// Time of sums over ranks.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SumsTime {
    /// From the beginning of the first of some to the end of the last.
    pub under_way: Duration,
    /// Of this, the time in which nothing else was done.
    pub waited: Duration,
}

/// What was taken so far.
pub(crate) struct Gradients {
    plan: Rc<Plan>,
    ranks: Rc<Ranks>,
    /// Kind of the sums.
    kind: Kind,
    /// By block, this rank's own gradients over passes of this mini-batch, not yet summed over ranks.
    local: Vec<Option<Tensor>>,
    /// By block, what is owned of the sum over all ranks.
    owned: Vec<Option<Tensor>>,
    /// Sums over shards (over replicas where there are no shards) that have begun, in order.
    begun: Vec<(usize, Work)>,
    /// When the first of these began.
    since: Option<Instant>,
    /// Time that they were under way, and time spent waiting for them.
    sums: SumsTime,
}

impl Gradients {
    pub fn new(plan: Rc<Plan>, ranks: Rc<Ranks>, kind: Kind) -> Self {
        let none = || plan.blocks.iter().map(|_| None).collect();
        let (local, owned) = (none(), none());
        Self { plan, ranks, kind, local, owned, begun: Vec::new(), since: None, sums: SumsTime::default() }
    }

    /// Layers of the decoder, up to the last that has gradients.
    pub fn layers(&self) -> usize {
        self.plan.layers()
    }

    /// Takes the gradients of a layer, or of everything that belongs to none, after a backward pass; `last` says that no other
    /// pass of the mini-batch follows.
    pub fn take(&mut self, layer: Option<usize>, last: bool) -> Result<()> {
        let plan = self.plan.clone();
        let Some(index) = plan.blocks.iter().position(|b| b.layer == layer) else { return Ok(()) };
        let block = &plan.blocks[index];
        let kept = !last && self.ranks.zero() < Zero::Gradients;
        if kept && block.slots.iter().all(|s| s.tensor.kind() == self.kind) {
            // They add up where they are.
            return Ok(());
        }
        let mut flat = take_flat(block, self.kind)?;
        if let Some(before) = self.local[index].take() {
            flat = before.f_add(&flat)?;
        }
        if kept {
            self.local[index] = Some(flat);
            return Ok(());
        }
        // One sum of a block is in flight at a time: this is what bounds memory.
        if self.begun.iter().any(|(b, _)| *b == index) {
            self.settle()?;
        }
        let work = match (self.ranks.shards(), self.ranks.replicas()) {
            (Some(shards), _) => shards.start_reduce_scatter(flat)?,
            (None, Some(replicas)) => replicas.start_all_reduce(flat)?,
            (None, None) => {
                add(&mut self.owned[index], flat)?;
                return Ok(());
            }
        };
        self.since.get_or_insert_with(Instant::now);
        self.begun.push((index, work));
        Ok(())
    }

    /// Waits for the sums that have begun.
    fn settle(&mut self) -> Result<()> {
        let start = Instant::now();
        let done = self.end_all();
        self.sums.waited += start.elapsed();
        self.sums.under_way += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        done
    }

    /// The time of sums since it was asked for last.
    pub fn take_time(&mut self) -> SumsTime {
        std::mem::take(&mut self.sums)
    }

    fn end_all(&mut self) -> Result<()> {
        let ranks = self.ranks.clone();
        let mut outer = Vec::new();
        for (index, work) in std::mem::take(&mut self.begun) {
            match (ranks.shards(), ranks.replicas()) {
                (Some(shards), Some(replicas)) => {
                    outer.push((index, replicas.start_all_reduce(end(shards, work)?)?));
                }
                (Some(group), None) | (None, Some(group)) => add(&mut self.owned[index], end(group, work)?)?,
                (None, None) => {}
            }
        }
        for (index, work) in outer {
            if let Some(replicas) = ranks.replicas() {
                add(&mut self.owned[index], end(replicas, work)?)?;
            }
        }
        Ok(())
    }

    /// What this rank owns of the sum over all ranks, flat.
    pub fn finish(&mut self) -> Result<Tensor> {
        self.settle()?;
        let plan = self.plan.clone();
        let mut parts = Vec::with_capacity(plan.blocks.len());
        for (block, owned) in plan.blocks.iter().zip(&mut self.owned) {
            parts.push(match owned.take() {
                Some(t) => t,
                None => Tensor::f_zeros([block.size()], (self.kind, block.slots[0].tensor.device()))?,
            });
        }
        Ok(if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::f_cat(&parts, 0)? })
    }

    /// Forgets everything, gradients in the parameters too. Sums that have begun are waited for: all ranks make them.
    pub fn clear(&mut self) -> Result<()> {
        self.settle()?;
        self.local.iter_mut().chain(&mut self.owned).for_each(|t| *t = None);
        for slot in self.plan.slots() {
            drop_grad(&slot.tensor)?;
        }
        Ok(())
    }
}

/// A block's gradients, flat, taken out of the parameters; what a pass did not touch counts 0.
fn take_flat(block: &Block, kind: Kind) -> Result<Tensor> {
    let flat = block.join(kind, |s| Ok(Some(s.tensor.grad()).filter(Tensor::defined)))?;
    for s in &block.slots {
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
