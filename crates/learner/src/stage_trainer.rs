//! The trainers of both stages, as the loop of rank 0 and that of the other ranks use them.

use unveil_model::Vlm;
use unveil_trainer::{LocalState, ParameterReader, PolicyTrainer, SftTrainer, TrainerProgress};

use crate::error::{LearnerError, Result};

/// The trainer of a stage on one rank: what resuming, saving and evaluating need of it. Updates belong to the stage.
pub(crate) trait StageTrainer {
    /// Returns the model.
    fn vlm(&self) -> &Vlm;

    /// Returns the model mutably, for evaluation and export.
    fn vlm_mut(&mut self) -> &mut Vlm;

    /// Returns the number of updates so far, including skipped ones.
    fn step(&self) -> u64;

    /// Returns the state that is not a tensor.
    fn progress(&self) -> TrainerProgress;

    /// Returns the share of the state that this rank saves.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`](crate::LearnerError::Trainer) if a parameter is not contiguous.
    fn state_to_save(&self) -> Result<LocalState<'_>>;

    /// Returns all state that this rank holds, to be overwritten from a checkpoint.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`](crate::LearnerError::Trainer) if a parameter is not contiguous.
    fn state_to_load(&self) -> Result<LocalState<'_>>;

    /// Resumes from the state that was loaded into [`Self::state_to_load`]; all ranks call it.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`](crate::LearnerError::Trainer) if another rank has failed or timed out.
    fn resume_from(&mut self, progress: &TrainerProgress) -> Result<()>;

    /// Gathers all sharded parameters on rank 0, until the next update releases them; all ranks call it.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`](crate::LearnerError::Trainer) if another rank has failed or timed out.
    fn gather_on_rank_0(&self) -> Result<()>;

    /// Passes all parameters to `read` on rank 0, in parts that are gathered one after another if they are sharded; all ranks call it.
    ///
    /// # Errors
    /// Returns the error of `read`, and [`LearnerError::Trainer`](crate::LearnerError::Trainer) if another rank has failed or timed out.
    fn visit_parameters(&self, read: &mut ParameterReader<'_, LearnerError>) -> Result<()>;
}

/// Implements [`StageTrainer`] for a trainer whose methods of the same names do the same.
macro_rules! implement_stage_trainer {
    ($trainer:ty) => {
        impl StageTrainer for $trainer {
            fn vlm(&self) -> &Vlm {
                <$trainer>::vlm(self)
            }

            fn vlm_mut(&mut self) -> &mut Vlm {
                <$trainer>::vlm_mut(self)
            }

            fn step(&self) -> u64 {
                <$trainer>::step(self)
            }

            fn progress(&self) -> TrainerProgress {
                <$trainer>::progress(self)
            }

            fn state_to_save(&self) -> Result<LocalState<'_>> {
                Ok(<$trainer>::state_to_save(self)?)
            }

            fn state_to_load(&self) -> Result<LocalState<'_>> {
                Ok(<$trainer>::state_to_load(self)?)
            }

            fn resume_from(&mut self, progress: &TrainerProgress) -> Result<()> {
                Ok(<$trainer>::resume_from(self, progress)?)
            }

            fn gather_on_rank_0(&self) -> Result<()> {
                Ok(<$trainer>::gather_on_rank_0(self)?)
            }

            fn visit_parameters(&self, read: &mut ParameterReader<'_, LearnerError>) -> Result<()> {
                <$trainer>::visit_parameters(self, read)
            }
        }
    };
}

implement_stage_trainer!(SftTrainer);
implement_stage_trainer!(PolicyTrainer);
