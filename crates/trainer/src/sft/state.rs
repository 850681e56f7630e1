//! The state of the stage 1 trainer that checkpoints hold, and its distribution over ranks.

use tch::Tensor;

use crate::error::{Result, TrainerError};
use crate::sharded_model::{ParameterReader, visit_parameters};
use crate::state::{LocalState, TrainerProgress, local_state};
use crate::step::NamedTensors;

use super::SftTrainer;

impl SftTrainer {
    /// Broadcasts the weights of rank 0, and sets the master weights from `weights`, given on rank 0 in full precision. All ranks call it
    /// before the first update.
    ///
    /// # Errors
    /// Returns [`crate::TrainerError::Ranks`] if another rank has failed or timed out, and [`crate::TrainerError::Setting`] if a weight
    /// has the wrong shape.
    pub fn broadcast_from_rank_0(&mut self, weights: &[(String, Tensor)]) -> Result<()> {
        let adapters = self.vlm.adapters().into_iter().flat_map(|a| a.named_parameters());
        for (_, tensor) in self.vlm.named_parameters().iter().chain(adapters) {
            self.ranks.broadcast_from_rank_0(tensor)?;
        }
        self.optimizer.load_weights(weights)
    }

    /// Gathers all sharded parameters on all ranks, until the next update releases them. All ranks call it.
    ///
    /// # Errors
    /// Returns [`crate::TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn gather_parameters(&self) -> Result<()> {
        self.hooks.sharded.as_ref().map_or(Ok(()), |sharded| sharded.gather_all())
    }

    /// Gathers all sharded parameters on rank 0, until the next update releases them; the other ranks hold one layer at a time. All ranks
    /// call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn gather_on_rank_0(&self) -> Result<()> {
        self.hooks.sharded.as_ref().map_or(Ok(()), |sharded| sharded.gather_if(self.ranks.rank() == 0))
    }

    /// Passes all parameters of the model and of its adapters to `read` on rank 0. If they are sharded, they are gathered part by part, and
    /// each part is released after `read`. All ranks call it.
    ///
    /// # Errors
    /// Returns the error of `read`, and [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn visit_parameters<E: From<TrainerError>>(&self, read: &mut ParameterReader<'_, E>) -> Result<(), E> {
        visit_parameters(&self.vlm, (self.hooks.sharded.as_deref(), &self.ranks), read)
    }

    /// Returns all trained weights in full precision and the optimiser's moments, by name. All ranks call it.
    ///
    /// # Errors
    /// Returns [`crate::TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn state(&self) -> Result<(NamedTensors, NamedTensors)> {
        Ok((self.optimizer.weights()?, self.optimizer.state()?))
    }

    /// Returns the share of the state that this rank saves, and no other. Ranks do not communicate.
    ///
    /// # Errors
    /// Returns [`crate::TrainerError::Torch`] if a parameter is not contiguous.
    pub fn state_to_save(&self) -> Result<LocalState<'_>> {
        let ranks = &self.ranks;
        self.local_state(ranks.replica(), (ranks.rank(), ranks.size()))
    }

    /// Returns all state that this rank holds, to be overwritten from a checkpoint. Sharded parameters themselves are updated by
    /// [`SftTrainer::resume_from`].
    ///
    /// # Errors
    /// Returns [`crate::TrainerError::Torch`] if a parameter is not contiguous.
    pub fn state_to_load(&self) -> Result<LocalState<'_>> {
        self.local_state((0, 1), (0, 1))
    }

    fn local_state(&self, part: (usize, usize), of_whole: (usize, usize)) -> Result<LocalState<'_>> {
        let sharded = self.hooks.sharded.as_deref();
        local_state((&self.vlm, &self.optimizer), sharded, self.ranks.rank(), part, of_whole)
    }

    /// Returns the state that is not a tensor.
    pub fn progress(&self) -> TrainerProgress {
        TrainerProgress { counters: self.counters, counts: self.optimizer.counts(), kl: None }
    }

    /// Resumes from the state that was loaded into [`SftTrainer::state_to_load`]; all ranks call it.
    ///
    /// # Errors
    /// Returns [`crate::TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn resume_from(&mut self, progress: &TrainerProgress) -> Result<()> {
        self.optimizer.resume(progress.counters.updates, &progress.counts)?;
        self.counters = progress.counters;
        Ok(())
    }
}
