//! The state of a trainer that checkpoints hold: the slices of weights and moments that this rank owns, and the counters.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};
use unveil_algo::KlController;
use unveil_model::Vlm;

use crate::error::Result;
use crate::optim::AdamW;
use crate::shard::{ParameterSlice, ShardLayout, ShardedParameters};
use crate::step::{Counters, PolicyTrainer};

/// Trainer state that is not a tensor: counters and the KL coefficient.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainerProgress {
    /// Steps, updates and skipped steps.
    pub counters: Counters,
    /// Number of updates of each parameter that was frozen in some of them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub counts: BTreeMap<String, u64>,
    /// Coefficient of the KL to the reference; stage 2 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl: Option<KlController>,
}

/// A slice of a parameter, or of one of its moments, that this rank owns.
#[derive(Debug)]
pub struct StateSlice {
    /// `weight`, `exp_avg` or `exp_avg_sq`.
    pub kind: &'static str,
    /// The slice, a view of the memory that holds it.
    pub slice: ParameterSlice,
}

/// State that this rank saves or loads.
#[derive(Debug)]
pub struct LocalState<'a> {
    /// The model.
    pub vlm: &'a Vlm,
    /// Dtype of master weights and moments.
    pub kind: Kind,
    /// Number of this rank.
    pub rank: usize,
    /// The slices, weights before moments.
    pub slices: Vec<StateSlice>,
}

/// Lists the slices of an optimiser's state and of weights that are not trained.
fn state_slices(optimizer: &AdamW, part: (usize, usize), untrained: Vec<ParameterSlice>) -> Result<Vec<StateSlice>> {
    let weights = untrained.into_iter().map(|slice| StateSlice { kind: "weight", slice });
    let trained = optimizer.owned_slices(part)?.into_iter().map(|(kind, slice)| StateSlice { kind, slice });
    let mut all: Vec<StateSlice> = weights.chain(trained).collect();
    // Each object of a checkpoint contains slices of one kind.
    all.sort_by_key(|h| h.kind != "weight");
    Ok(all)
}

/// Returns part `part` of the state that this rank shards, and part `of_whole` of the weights that all ranks hold and none trains, of a
/// model and its optimiser; `sharded` are the model's parameters if they are sharded.
///
/// # Errors
/// Returns [`crate::TrainerError::Torch`] if a parameter is not contiguous.
pub(crate) fn local_state<'a>(
    (vlm, optimizer): (&'a Vlm, &AdamW),
    sharded: Option<&ShardedParameters>,
    rank: usize,
    part: (usize, usize),
    of_whole: (usize, usize),
) -> Result<LocalState<'a>> {
    let untrained = match sharded {
        // Checkpoints of adapters do not contain the weights of the base model.
        _ if vlm.adapters().is_some() => Vec::new(),
        Some(divided) => divided.untrained_slices(part)?,
        None => {
            let trained: Vec<_> = optimizer.names().collect();
            let rest = vlm.named_parameters().iter().filter(|(n, _)| !trained.contains(&n.as_str()));
            let rest: Vec<(String, Tensor)> = rest.map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
            ShardLayout::new(&rest, false, (0, 1))?.owned_slices(None, of_whole)?
        }
    };
    let slices = state_slices(optimizer, part, untrained)?;
    Ok(LocalState { vlm, kind: optimizer.kind(), rank, slices })
}

impl PolicyTrainer {
    /// Returns the share of the state that this rank saves, and no other. Ranks do not communicate.
    ///
    /// # Errors
    /// Returns [`crate::TrainerError::Torch`] if a parameter is not contiguous.
    pub fn state_to_save(&self) -> Result<LocalState<'_>> {
        let ranks = &self.ranks;
        self.local_state(ranks.replica(), (ranks.rank(), ranks.size()))
    }

    /// Returns all state that this rank holds, to be overwritten from a checkpoint. Sharded parameters themselves are updated by
    /// [`PolicyTrainer::resume_from`].
    ///
    /// # Errors
    /// Returns [`crate::TrainerError::Torch`] if a parameter is not contiguous.
    pub fn state_to_load(&self) -> Result<LocalState<'_>> {
        self.local_state((0, 1), (0, 1))
    }

    /// Returns part `part` of the state that this rank shards, and part `of_whole` of the weights that all ranks hold and none trains.
    fn local_state(&self, part: (usize, usize), of_whole: (usize, usize)) -> Result<LocalState<'_>> {
        let policy = &self.policy;
        local_state((&policy.vlm, &self.optimizer), policy.hooks.sharded.as_deref(), self.ranks.rank(), part, of_whole)
    }

    /// Returns the state that is not a tensor.
    pub fn progress(&self) -> TrainerProgress {
        TrainerProgress { counters: self.counters(), counts: self.optimizer.counts(), kl: Some(self.kl_controller()) }
    }

    /// Resumes from the state that was loaded into [`PolicyTrainer::state_to_load`]; all ranks call it.
    ///
    /// # Errors
    /// Returns [`crate::TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn resume_from(&mut self, progress: &TrainerProgress) -> Result<()> {
        self.optimizer.resume(progress.counters.updates, &progress.counts)?;
        self.restore_counters(progress.counters, progress.kl.as_ref());
        Ok(())
    }
}
