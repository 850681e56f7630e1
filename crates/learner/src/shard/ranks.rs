//! The ranks of a learner: who they are, and the mesh of replicas of shards over which state is divided.

use std::rc::Rc;
use std::time::Instant;

use tch::{Kind, Tensor};
use unveil_collective::{Collective, Group, Mesh, Work, World};

use crate::error::{LearnerError, Result};

/// What is divided over the shards of a replica (ZeRO, arXiv 1910.02054).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Zero {
    /// Nothing: gradients are summed over all ranks.
    None,
    /// Moments and master weights (stage 1).
    Optimizer,
    /// Gradients too (stage 2).
    Gradients,
    /// Parameters too (stage 3).
    Parameters,
}

impl Zero {
    /// By the number of its stage; beyond 3 there is none, and 3 is meant.
    pub fn stage(number: u8) -> Self {
        match number {
            0 => Self::None,
            1 => Self::Optimizer,
            2 => Self::Gradients,
            _ => Self::Parameters,
        }
    }
}

/// All ranks of a learner.
pub struct Ranks {
    /// None in a world of one.
    world: Option<(World, Mesh)>,
    zero: Zero,
}

impl Ranks {
    /// A learner of one rank.
    pub fn solo() -> Rc<Self> {
        Rc::new(Self { world: None, zero: Zero::None })
    }

    /// The ranks of `world`, state divided over `shards` of them (0 = all); stage 0 has shards of one rank. All ranks call this.
    ///
    /// # Errors
    /// The world does not divide into replicas of so many shards, or a rank does not come.
    pub fn new(world: World, zero: Zero, shards: usize) -> Result<Rc<Self>> {
        let size = world.size();
        let shards = match (zero, shards) {
            (Zero::None, 0 | 1) => 1,
            (Zero::None, _) => {
                return Err(LearnerError::Setting(format!(
                    "learner.parallel.shards is {shards}, but zero = 0 divides nothing: leave it out, or set zero to 1, 2 or 3"
                )));
            }
            (_, 0) => size,
            (_, n) => n,
        };
        if size == 1 && shards == 1 {
            return Ok(Self::solo());
        }
        if !size.is_multiple_of(shards) {
            return Err(LearnerError::Setting(format!(
                "learner.parallel: {size} ranks do not divide into replicas of {shards} shards; choose a divisor of {size}"
            )));
        }
        let mesh = world.mesh(size / shards, shards)?;
        Ok(Rc::new(Self { world: Some((world, mesh)), zero }))
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.world.as_ref().map_or(0, |(w, _)| w.rank())
    }

    /// Ranks in all.
    pub fn size(&self) -> usize {
        self.world.as_ref().map_or(1, |(w, _)| w.size())
    }

    /// What is divided.
    pub fn zero(&self) -> Zero {
        self.zero
    }

    /// This rank's shard, and how many there are.
    pub(crate) fn shard(&self) -> (usize, usize) {
        self.shards().map_or((0, 1), |g| (g.rank(), g.world_size()))
    }

    /// This rank's replica, and how many there are.
    pub(crate) fn replica(&self) -> (usize, usize) {
        self.replicas().map_or((0, 1), |g| (g.rank(), g.world_size()))
    }

    /// The ranks over which state is divided, where it is.
    pub(crate) fn shards(&self) -> Option<&Group> {
        self.world.as_ref().map(|(_, m)| &m.shards).filter(|g| g.world_size() > 1)
    }

    /// The ranks that hold the same shard, where there are several.
    pub(crate) fn replicas(&self) -> Option<&Group> {
        self.world.as_ref().map(|(_, m)| &m.replicas).filter(|g| g.world_size() > 1)
    }

    /// All ranks, where there are several.
    pub(crate) fn all(&self) -> Option<&Group> {
        self.world.as_ref().map(|(w, _)| w.group())
    }

    /// Gives a contiguous tensor the numbers that it has on rank 0, in place.
    ///
    /// # Errors
    /// A rank is gone.
    pub(crate) fn align(&self, tensor: &Tensor) -> Result<()> {
        if let Some(group) = self.all() {
            let _same = group.broadcast(tensor.f_detach()?.f_view([-1])?, 0)?;
        }
        Ok(())
    }

    /// The sum of numbers over all ranks, number by number.
    ///
    /// # Errors
    /// A rank is gone.
    pub(crate) fn sum(&self, numbers: Vec<f64>, device: tch::Device) -> Result<Vec<f64>> {
        let Some(group) = self.all().filter(|_| !numbers.is_empty()) else { return Ok(numbers) };
        let sum = group.all_reduce(Tensor::f_from_slice(&numbers)?.f_to_device(device)?)?;
        Ok(Vec::<f64>::try_from(sum.f_to_kind(Kind::Double)?)?)
    }
}

/// The end of a call that must come in the time that calls have.
pub(crate) fn end(group: &Group, work: Work) -> Result<Tensor> {
    Ok(work.wait(Instant::now() + group.limit())?)
}
