//! Resuming from a checkpoint that is valid on all ranks: rank 0 proposes the newest one, every rank reads and verifies
//! its shard, and all fall back to the one before if any finds damage.

pub(crate) mod compatibility;

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use unveil_checkpoint::{CheckpointInfo, Error, Reader, ResumeCandidates, Store};
use unveil_config::Config;
use unveil_trainer::lora::BaseModel;

use crate::checkpoint_meta::CheckpointMeta;
use crate::error::{LearnerError, Result};
use crate::rank_control::RankControl;
use crate::snapshot::read_state;
use crate::stage_plan::StagePlan;
use crate::stage_trainer::StageTrainer;
use compatibility::allowed_changes;

/// The messages of [`resume_on_all_ranks`], as errors name them.
const MESSAGES: &str = "the messages of a resume";

/// Result of a rank's attempt to read a checkpoint.
#[derive(Serialize, Deserialize)]
enum AttemptOutcome {
    Succeeded,
    Damaged { location: String, object: String, why: String },
    Failed(String),
}

/// Resumes from the newest checkpoint that is valid on all ranks; returns `None` if there is no checkpoint. Rank 0
/// passes the `candidates`; `attempt` reads this rank's shard. All ranks call it.
///
/// # Errors
/// Returns [`LearnerError::Checkpoint`] if no checkpoint can be used or the store is unreachable,
/// [`LearnerError::CheckpointState`] if the checkpoint does not fit the configuration, [`LearnerError::RankResume`] if
/// another rank cannot read it, and [`LearnerError::Trainer`] if another rank has failed or timed out.
pub(crate) fn resume_on_all_ranks(
    control: &RankControl,
    (handle, store): (&Handle, &Store),
    mut candidates: Option<&mut ResumeCandidates>,
    mut attempt: impl FnMut(&Reader) -> Result<CheckpointMeta>,
) -> Result<Option<(CheckpointInfo, CheckpointMeta)>> {
    let message_error = |e: serde_json::Error| LearnerError::rank_message(MESSAGES)(e);
    loop {
        let proposal = match &mut candidates {
            Some(candidates) => Some(serde_json::to_vec(&candidates.next_candidate()?).map_err(message_error)?),
            None => None,
        };
        let proposal = control.broadcast_bytes(proposal.as_deref())?;
        let proposal: Option<CheckpointInfo> = serde_json::from_slice(&proposal).map_err(message_error)?;
        let Some(info) = proposal else { return Ok(None) };
        let result = handle.block_on(Reader::open(store, &info)).map_err(LearnerError::from).and_then(|reader| {
            let meta = attempt(&reader)?;
            if candidates.is_some() {
                handle.block_on(reader.verify_files())?;
            }
            Ok(meta)
        });
        let outcome = match &result {
            Ok(_) => AttemptOutcome::Succeeded,
            Err(LearnerError::Checkpoint(Error::Corrupt { location, object, why })) => {
                AttemptOutcome::Damaged { location: location.clone(), object: object.clone(), why: why.clone() }
            }
            Err(e) => AttemptOutcome::Failed(e.to_string()),
        };
        let outcome = serde_json::to_vec(&outcome).map_err(message_error)?;
        let outcomes = control.gather_bytes(Some(&outcome))?.unwrap_or_default();
        let mut damage = None;
        for (rank, outcome) in outcomes.iter().enumerate() {
            match serde_json::from_slice(outcome).map_err(message_error)? {
                AttemptOutcome::Succeeded => {}
                AttemptOutcome::Damaged { location, object, why } => {
                    damage = damage.or(Some(Error::Corrupt { location, object, why }))
                }
                AttemptOutcome::Failed(_) if rank == control.ranks.rank() => {
                    return result.map(|meta| Some((info, meta)));
                }
                AttemptOutcome::Failed(why) => {
                    return Err(LearnerError::RankResume { rank, step: info.step, why });
                }
            }
        }
        let Some(damage) = damage else { return result.map(|meta| Some((info, meta))) };
        if let Some(candidates) = &mut candidates {
            candidates.reject(&info, damage)?;
        }
    }
}

/// Loads this rank's share of a checkpoint after checking that it fits the stage, the model (with its adapters on `base`, if it has
/// any) and the configuration.
///
/// # Errors
/// Returns [`LearnerError::CheckpointState`] if the checkpoint does not fit, and [`LearnerError::Checkpoint`] if it is damaged or
/// the store fails.
pub(crate) fn read_checkpoint(
    config: &Config,
    plan: &StagePlan,
    (trainer, base): (&impl StageTrainer, Option<&BaseModel>),
    (handle, reader): (&Handle, &Reader),
) -> Result<CheckpointMeta> {
    let meta = CheckpointMeta::read(reader, plan.name, config.run.seed)?;
    meta.check_fits(reader, trainer.vlm(), base, plan.critic)?;
    allowed_changes(reader.info().step, &meta.config, config)?;
    read_state(&trainer.state_to_load()?, handle, reader)?;
    Ok(meta)
}
