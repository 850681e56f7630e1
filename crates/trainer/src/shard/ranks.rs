//! The ranks of a learner, arranged as a mesh: replicas of the model, each sharded over several ranks.

use std::rc::Rc;
use std::time::Instant;

use tch::{Kind, Tensor};
use unveil_collective::{Collective, Group, Joined, Mesh, Work, World};

use crate::error::{Result, TrainerError};

/// State that is sharded over the ranks of a replica (ZeRO stages, arXiv 1910.02054).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ZeroStage {
    /// Nothing; gradients are all-reduced over all ranks (stage 0).
    None,
    /// Moments and master weights (stage 1).
    Optimizer,
    /// Gradients as well (stage 2).
    Gradients,
    /// Parameters as well (stage 3).
    Parameters,
}

impl ZeroStage {
    /// Returns the stage with this number; numbers above 3 count as 3.
    pub fn from_number(number: u8) -> Self {
        match number {
            0 => Self::None,
            1 => Self::Optimizer,
            2 => Self::Gradients,
            _ => Self::Parameters,
        }
    }
}

/// All ranks of a learner, as one of them sees them.
#[derive(Debug)]
pub struct Ranks {
    /// `None` if there is a single rank.
    world: Option<(World, Mesh)>,
    zero: ZeroStage,
}

impl Ranks {
    /// Returns the ranks of a learner that has only one.
    pub fn solo() -> Rc<Self> {
        Rc::new(Self { world: None, zero: ZeroStage::None })
    }

    /// Arranges the ranks of `world` in replicas of `shards` ranks each (0: one replica of all ranks; stage 0: replicas of one rank).
    /// All ranks call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Setting`] if the number of ranks is not a multiple of `shards`, and [`TrainerError::Ranks`] if a rank
    /// fails or does not join in time.
    pub fn new(world: World, zero: ZeroStage, shards: usize) -> Result<Rc<Self>> {
        let size = world.size();
        let shards = match (zero, shards) {
            (ZeroStage::None, 0 | 1) => 1,
            (ZeroStage::None, _) => {
                return Err(TrainerError::Setting(format!(
                    "learner.parallel.shards is {shards}, but zero = 0 shards nothing: leave it out, or set zero to 1, 2 or 3"
                )));
            }
            (_, 0) => size,
            (_, n) => n,
        };
        if size == 1 && shards == 1 {
            return Ok(Self::solo());
        }
        if !size.is_multiple_of(shards) {
            return Err(TrainerError::Setting(format!(
                "learner.parallel: {size} ranks cannot form replicas of {shards} shards; choose a divisor of {size}"
            )));
        }
        let mesh = world.mesh(size / shards, shards)?;
        Ok(Rc::new(Self { world: Some((world, mesh)), zero }))
    }

    /// Returns the number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.world.as_ref().map_or(0, |(w, _)| w.rank())
    }

    /// Returns the number of ranks.
    pub fn size(&self) -> usize {
        self.world.as_ref().map_or(1, |(w, _)| w.size())
    }

    /// Returns which state is sharded.
    pub fn zero_stage(&self) -> ZeroStage {
        self.zero
    }

    /// Returns the index of this rank's shard and the number of shards.
    pub(crate) fn shard(&self) -> (usize, usize) {
        self.shards().map_or((0, 1), |g| (g.rank(), g.world_size()))
    }

    /// Returns the index of this rank's replica and the number of replicas.
    pub(crate) fn replica(&self) -> (usize, usize) {
        self.replicas().map_or((0, 1), |g| (g.rank(), g.world_size()))
    }

    /// Returns the ranks of this replica, over which state is sharded; `None` if it is not sharded.
    pub(crate) fn shards(&self) -> Option<&Group> {
        self.world.as_ref().map(|(_, m)| &m.shards).filter(|g| g.world_size() > 1)
    }

    /// Returns the ranks that hold the same shard; `None` if there is a single replica.
    pub(crate) fn replicas(&self) -> Option<&Group> {
        self.world.as_ref().map(|(_, m)| &m.replicas).filter(|g| g.world_size() > 1)
    }

    /// Returns the group of all ranks; `None` if there is a single rank.
    pub fn world(&self) -> Option<&Group> {
        self.world.as_ref().map(|(w, _)| w.group())
    }

    /// Overwrites a contiguous tensor with its values on rank 0.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub(crate) fn broadcast_from_rank_0(&self, tensor: &Tensor) -> Result<()> {
        if let Some(group) = self.world() {
            let _same = group.broadcast(tensor.f_detach()?.f_view([-1])?, 0)?;
        }
        Ok(())
    }

    /// Returns the elementwise sum of `values` over all ranks.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn all_reduce_sum(&self, values: Vec<f64>, device: tch::Device) -> Result<Vec<f64>> {
        let Some(group) = self.world().filter(|_| !values.is_empty()) else { return Ok(values) };
        let sum = group.all_reduce(Tensor::f_from_slice(&values)?.f_to_device(device)?)?;
        Ok(Vec::<f64>::try_from(sum.f_to_kind(Kind::Double)?)?)
    }
}

/// Makes the device wait for a collective, or the host up to the group's timeout if it cannot; see [`Work::join`].
pub(crate) fn join(group: &Group, work: Work) -> Result<(Tensor, Option<Joined>)> {
    Ok(work.join(Instant::now() + group.timeout())?)
}

/// Waits for a collective that the device waits for, up to the group's timeout.
pub(crate) fn wait_joined(group: &Group, joined: Joined) -> Result<()> {
    Ok(joined.wait(Instant::now() + group.timeout())?)
}

/// Waits for a collective, up to the group's timeout.
pub(crate) fn wait(group: &Group, work: Work) -> Result<Tensor> {
    Ok(work.wait(Instant::now() + group.timeout())?)
}
