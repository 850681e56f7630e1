//! Errors that end a training stage, each with advice.

use std::path::PathBuf;

use unveil_trainer::TrainerError;

/// Cause of an error that depends on what was being done.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Errors of the learner.
#[derive(Debug, thiserror::Error)]
pub enum LearnerError {
    /// The trainer, or the model, tensor library or ranks that it computes with, cannot continue. A failure of those has this form
    /// also where the learner calls them itself: another rank that has failed or timed out is always [`TrainerError::Ranks`].
    #[error(transparent)]
    Trainer(#[from] TrainerError),
    /// An image could not be read.
    #[error(transparent)]
    Image(#[from] unveil_data::image_store::ImageError),
    /// A prompt or answer could not be preprocessed.
    #[error("record \"{record}\": {source}")]
    Prepare {
        /// Id of the record.
        record: String,
        /// The cause.
        source: unveil_preprocess::preprocessor::PreprocessError,
    },
    /// Records do not fit the model; found before the first update.
    #[error("records that do not fit the model: {0}")]
    Fit(#[from] unveil_preprocess::context_fit::FitError),
    /// A record no longer fits after augmentation.
    #[error("record \"{record}\": {source}")]
    Misfit {
        /// Id of the record.
        record: String,
        /// The cause.
        source: unveil_preprocess::context_fit::Misfit,
    },
    /// The tokenizer or processor of the model directory could not be loaded.
    #[error(transparent)]
    Processor(#[from] unveil_preprocess::preprocessor::PreprocessError),
    /// The training split is empty.
    #[error(
        "{file} has no record of split `{split}` (data.train_split): name one of its splits, or give records this one"
    )]
    EmptySplit {
        /// The record file.
        file: PathBuf,
        /// Name of the split.
        split: String,
    },
    /// A setting of `data.augment` is out of range, or a box of a record lies outside its image.
    #[error(transparent)]
    Augment(#[from] unveil_preprocess::augment::AugmentError),
    /// A record was asked for by an index that the training split does not have.
    #[error("record {index} does not exist: the training split has {count} records")]
    RecordIndex {
        /// The index, from 0.
        index: usize,
        /// Number of records.
        count: usize,
    },
    /// The records cannot be scored with the configured rewards.
    #[error(transparent)]
    Reward(#[from] unveil_reward::RewardError),
    /// A record of rank 0's batch is not in the data of this rank.
    #[error("record \"{record}\" is missing from the data of this rank: give all ranks the same data")]
    RecordMissing {
        /// Id of the record.
        record: String,
    },
    /// A record has another prompt on this rank than on rank 0.
    #[error(
        "record \"{record}\" has another prompt on this rank than on rank 0: give all ranks the same images and model files"
    )]
    PromptDiffers {
        /// Id of the record.
        record: String,
    },
    /// A message between ranks could not be encoded or decoded.
    #[error("the ranks cannot exchange {message}: {source}. Start all of them with the same build")]
    RankMessage {
        /// Description of the message.
        message: &'static str,
        /// The cause.
        source: Cause,
    },
    /// Another rank cannot resume from a checkpoint.
    #[error("rank {rank} cannot resume from the checkpoint of step {step}: {why}")]
    RankResume {
        /// Number of the rank.
        rank: usize,
        /// Step of the checkpoint.
        step: u64,
        /// Message of the rank, with its advice.
        why: String,
    },
    /// Another rank could not write its shard of a checkpoint.
    #[error("rank {rank} could not write its shard of a checkpoint: {why}")]
    ShardWrite {
        /// Number of the rank.
        rank: usize,
        /// Message of the rank, with its advice.
        why: String,
    },
    /// The experience server cannot continue.
    #[error(transparent)]
    Server(#[from] unveil_experience_rpc::ServerError),
    /// The accounting of groups failed.
    #[error("experience: {0}")]
    Experience(#[from] unveil_experience::ExperienceError),
    /// A checkpoint could not be read or written.
    #[error("checkpoint: {0}")]
    Checkpoint(#[from] unveil_checkpoint::Error),
    /// Too many saves in a row failed.
    #[error(
        "the checkpoint of step {step} could not be written ({in_a_row} in a row; checkpoint.max_failures): {source}"
    )]
    SavesFailed {
        /// Step of the last checkpoint that failed.
        step: u64,
        /// Number of failures in a row.
        in_a_row: u32,
        /// The last failure.
        source: Box<Self>,
    },
    /// The contents of a checkpoint do not fit the run.
    #[error("checkpoint of step {step}: {what}")]
    CheckpointState {
        /// Step of the checkpoint.
        step: u64,
        /// Description of the problem.
        what: String,
    },
    /// A service could not be started or reached.
    #[error(transparent)]
    Service(#[from] unveil_service::ServiceError),
    /// A file or directory could not be read, written, created or replaced.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// The operation, a verb.
        action: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The operating system refused a thread.
    #[error("cannot start thread `{name}`: {source}. Raise the limit of processes (`ulimit -u`) or of the container")]
    Thread {
        /// Name of the thread.
        name: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// An event could not be converted to JSON.
    #[error("cannot encode event `{kind}`: {source}")]
    Event {
        /// Kind of the event.
        kind: &'static str,
        /// The cause.
        source: serde_json::Error,
    },
    /// Too many groups lack a component of their reward.
    #[error(
        "step {step}: `{component}` is masked for {masked} of the last {groups} groups (limit {limit}, learner.max_masked), most often because {reason}. The remaining rewards train something other than what was configured: fix the component, or raise the limit"
    )]
    Masked {
        /// Number of the update.
        step: u64,
        /// The component; `total` for the whole reward.
        component: String,
        /// Number of groups that lack it.
        masked: usize,
        /// Number of groups in the window.
        groups: usize,
        /// Largest allowed share of groups that lack it.
        limit: f64,
        /// The most frequent reason.
        reason: String,
    },
    /// No group of a batch teaches anything, although as many groups as allowed were replaced.
    #[error(
        "step {step}: all {looked_at} groups that were looked at teach nothing ({replaced} of them were replaced, the maximum of learner.max_replaced): their rewards are equal, or all their responses were cut. Their responses are in rollouts/step-{step}.jsonl: if they are all right, the task is solved; if they are all wrong, train longer in stage 1 or use easier records; else raise learner.max_replaced, rollout.temperature or rollout.n",
        looked_at = .groups + .replaced
    )]
    NothingToLearn {
        /// Number of the update.
        step: u64,
        /// Groups of the batch.
        groups: usize,
        /// Groups that were replaced before.
        replaced: usize,
    },
    /// The held-out evaluation failed.
    #[error("evaluation at step {step}: {source}")]
    Evaluate {
        /// Number of updates before it.
        step: u64,
        /// The cause.
        source: Cause,
    },
    /// A background thread ended without reporting an error.
    #[error("{0} ended unexpectedly")]
    ThreadEnded(&'static str),
}

/// Wraps errors of what the trainer computes with as the trainer does.
macro_rules! from_causes_of_trainer_errors {
    ($($cause:ty),+) => {
        $(impl From<$cause> for LearnerError {
            fn from(cause: $cause) -> Self {
                Self::Trainer(cause.into())
            }
        })+
    };
}

from_causes_of_trainer_errors!(
    unveil_model::ModelError,
    tch::TchError,
    unveil_collective::CollectiveError,
    unveil_torch_ext::ExtError
);

impl LearnerError {
    /// Returns a conversion of I/O errors of the operation `action` (a verb) on `path`.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// Returns a conversion of errors of encoding or decoding `message`, which ranks exchange.
    pub(crate) fn rank_message<E: Into<Cause>>(message: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::RankMessage { message, source: source.into() }
    }
}

/// Result of this crate.
pub type Result<T, E = LearnerError> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_rank_is_the_same_error_wherever_it_is_noticed() {
        let failure = || unveil_collective::CollectiveError::Setup("rank 1 has left".to_owned());
        let direct = LearnerError::from(failure());
        let in_the_trainer = LearnerError::from(TrainerError::from(failure()));
        for error in [&direct, &in_the_trainer] {
            assert!(matches!(error, LearnerError::Trainer(TrainerError::Ranks(_))), "{error:?}");
        }
        assert_eq!(direct.to_string(), "ranks: rank 1 has left");
    }

    #[test]
    fn io_errors_name_operation_and_path() {
        let error = LearnerError::io("replace", "/runs/a/model")(std::io::ErrorKind::PermissionDenied.into());
        assert_eq!(error.to_string(), "cannot replace /runs/a/model: permission denied");
    }

    #[test]
    fn undecodable_messages_between_ranks_are_named() {
        let decoded = serde_json::from_str::<u64>("no number").map_err(LearnerError::rank_message("a test message"));
        let text = decoded.map_err(|e| e.to_string()).err().unwrap_or_default();
        assert!(
            text.starts_with("the ranks cannot exchange a test message: ") && text.ends_with("same build"),
            "{text}"
        );
    }
}
