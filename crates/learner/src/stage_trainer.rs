//! The trainers of both stages, as the loop of rank 0 and that of the other ranks use them.

use unveil_model::Vlm;
use unveil_trainer::{LocalState, PolicyTrainer, SftTrainer, TrainerProgress};

use crate::error::Result;

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

    /// Gathers all sharded parameters on all ranks, until the next update releases them; all ranks call it.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`](crate::LearnerError::Trainer) if another rank has failed or timed out.
    fn gather_parameters(&self) -> Result<()>;
}

/// Implements [`StageTrainer`] for a trainer whose methods of the same names do the same; `$save`, `$load` and `$gather` are the others.
macro_rules! implement_stage_trainer {
    ($trainer:ty, $save:expr, $load:expr, $gather:expr) => {
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
                Ok($save(self)?)
            }

            fn state_to_load(&self) -> Result<LocalState<'_>> {
                Ok($load(self)?)
            }

            fn resume_from(&mut self, progress: &TrainerProgress) -> Result<()> {
                Ok(<$trainer>::resume_from(self, progress)?)
            }

            fn gather_parameters(&self) -> Result<()> {
                Ok($gather(self)?)
            }
        }
    };
}

/// The only rank of stage 1 holds all parameters.
fn holds_all_parameters(_: &SftTrainer) -> unveil_trainer::Result<()> {
    Ok(())
}

implement_stage_trainer!(SftTrainer, SftTrainer::local_state, SftTrainer::local_state, holds_all_parameters);
implement_stage_trainer!(
    PolicyTrainer,
    PolicyTrainer::state_to_save,
    PolicyTrainer::state_to_load,
    PolicyTrainer::gather_parameters
);
