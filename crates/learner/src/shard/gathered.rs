//! Parameters that lie divided over ranks and are whole only while they are needed (ZeRO stage 3, arXiv 1910.02054): the next layer
//! comes while the present one computes. Knows no pass: an escort asks.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use tch::{Tensor, no_grad};
use unveil_collective::{Collective, Group, Work};
use unveil_torch_ext::{memory_size, resize_memory};

use super::plan::{Plan, Stretch};
use super::ranks::{Ranks, end};
use crate::error::{LearnerError, Result};

/// Parameters of a model, divided.
pub(crate) struct Gathered {
    ranks: Rc<Ranks>,
    /// Divided parameters, and this rank's part of all of them, flat.
    sources: Vec<(Rc<Plan>, Tensor)>,
    /// Bytes of the memory behind each parameter of each source.
    bytes: Vec<Vec<Vec<usize>>>,
    /// Layers of the decoder.
    pub layers: usize,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// What is whole: layers, and everything else as none.
    whole: Vec<Option<usize>>,
    /// What is on its way, one call for each source that has parameters there.
    coming: HashMap<Option<usize>, Vec<(usize, usize, Work)>>,
}

impl Gathered {
    /// Divides parameters: each source is a plan of parameters of one kind and this rank's part of them. They are whole from here
    /// on; [`Gathered::part`] gives them up.
    pub fn new(ranks: Rc<Ranks>, sources: Vec<(Rc<Plan>, Tensor)>) -> Result<Self> {
        let layers = sources.iter().map(|(p, _)| p.layers()).max().unwrap_or(0);
        let mut bytes = Vec::new();
        for (plan, _) in &sources {
            let mut of_plan = Vec::new();
            for block in &plan.blocks {
                let own = block.slots.iter().map(|s| own_memory(&s.tensor));
                of_plan.push(own.collect::<Result<Vec<_>>>()?);
            }
            bytes.push(of_plan);
        }
        let whole = std::iter::once(None).chain((0..layers).map(Some)).collect();
        let state = RefCell::new(State { whole, coming: HashMap::new() });
        Ok(Self { ranks, sources, bytes, layers, state })
    }

    /// Part `part` of what this rank owns of the parameters that are not trained.
    pub fn untrained(&self, part: (usize, usize)) -> Result<Vec<Stretch>> {
        // The first source is the trained ones.
        let other = self.sources.iter().skip(1);
        let all = other.map(|(plan, own)| plan.stretches(Some(own), part)).collect::<Result<Vec<_>>>()?;
        Ok(all.into_iter().flatten().collect())
    }

    fn group(&self) -> Result<&Group> {
        self.ranks.shards().ok_or_else(|| LearnerError::Setting("parameters are divided over one rank".into()))
    }

    /// Starts to bring `place` (a layer, or everything else), unless it is there or on its way.
    pub fn start(&self, place: Option<usize>) -> Result<()> {
        let mut state = self.state.borrow_mut();
        if state.whole.contains(&place) || state.coming.contains_key(&place) {
            return Ok(());
        }
        let mut works = Vec::new();
        for (s, (plan, part)) in self.sources.iter().enumerate() {
            for (b, block) in plan.blocks.iter().enumerate().filter(|(_, b)| b.layer == place) {
                let own = no_grad(|| {
                    Ok::<_, LearnerError>(part.f_narrow(0, block.at, block.size())?.f_to_kind(block.kind)?)
                })?;
                works.push((s, b, self.group()?.start_all_gather(own.f_contiguous()?)?));
            }
        }
        state.coming.insert(place, works);
        Ok(())
    }

    /// Makes `place` whole.
    pub fn bring(&self, place: Option<usize>) -> Result<()> {
        self.start(place)?;
        let Some(works) = self.state.borrow_mut().coming.remove(&place) else { return Ok(()) };
        let mut failed = None;
        for (s, b, work) in works {
            let found = end(self.group()?, work);
            let block = &self.sources[s].0.blocks[b];
            for (slot, bytes) in block.slots.iter().zip(&self.bytes[s][b]) {
                // Memory must be there whatever happened: somebody is about to compute with it.
                resize_memory(&slot.tensor, *bytes)?;
                if let Ok(whole) = &found {
                    no_grad(|| {
                        Ok::<_, LearnerError>(slot.tensor.data().f_copy_(&block.part(whole, slot)?).map(drop)?)
                    })?;
                }
            }
            failed = failed.or(found.err());
        }
        self.state.borrow_mut().whole.push(place);
        failed.map_or(Ok(()), Err)
    }

    /// Gives the memory of `place` back.
    pub fn part(&self, place: Option<usize>) -> Result<()> {
        let mut state = self.state.borrow_mut();
        let Some(at) = state.whole.iter().position(|p| *p == place) else { return Ok(()) };
        state.whole.swap_remove(at);
        for (plan, _) in &self.sources {
            for slot in plan.blocks.iter().filter(|b| b.layer == place).flat_map(|b| &b.slots) {
                resize_memory(&slot.tensor, 0)?;
            }
        }
        Ok(())
    }

    /// Makes everything whole.
    pub fn bring_all(&self) -> Result<()> {
        self.bring(None)?;
        (0..self.layers).try_for_each(|layer| self.bring(Some(layer)))
    }

    /// Gives all memory back.
    pub fn part_all(&self) -> Result<()> {
        self.part(None)?;
        (0..self.layers).try_for_each(|layer| self.part(Some(layer)))
    }
}

/// Bytes of the memory behind a parameter; one that lies in a file's map is moved out of it.
fn own_memory(tensor: &Tensor) -> Result<usize> {
    if memory_size(tensor)?.is_none() {
        no_grad(|| tensor.shallow_clone().f_set_data(&tensor.f_detach()?.copy()))?;
    }
    Ok(memory_size(tensor)?.unwrap_or(0))
}
