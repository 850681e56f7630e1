//! The loop of the ranks other than rank 0: they execute the commands of rank 0 and write their own shards of
//! checkpoints.

use std::net::SocketAddr;

use unveil_core::{Record, TrainGroup};
use unveil_trainer::PolicyTrainer;
use unveil_trainer::wire::GroupDump;

use crate::error::{LearnerError, Result};
use crate::rank_control::{Command, RankControl};
use crate::resume::resume_on_all_ranks;
use crate::saver::ShardWriter;
use crate::snapshot::copy_to_host;
use crate::stage::{Outcome, Stage};
use crate::trainer_start::{make_trainer, read_checkpoint};

/// Executes the commands of rank 0 until stage 2 ends. `on_joined` is called once this rank has loaded the model.
///
/// # Errors
/// See [`LearnerError`].
pub(crate) fn follow(stage: &Stage<'_>, on_joined: impl FnOnce()) -> Result<Outcome> {
    let ignore_address = |_: SocketAddr| ();
    let control = RankControl::open(stage.config, stage.model_dir, &stage.data.ids(), ignore_address)?;
    let mut writer = ShardWriter::open(stage.config, &stage.environment)?;
    let (mut trainer, base) = make_trainer(stage, &control)?;
    if let Some((_, meta)) = resume_on_all_ranks(&control, writer.store(), None, |r| {
        read_checkpoint(stage, &trainer, base.as_ref(), r, writer.store().0)
    })? {
        trainer.resume_from(&meta.progress)?;
    }
    on_joined();
    let mut outcome = Outcome::default();
    loop {
        match control.next_command(stage.cancel.is_cancelled())? {
            Command::Idle => {}
            Command::Update(groups) => {
                let batch = rebuild_batch(stage, &trainer, groups)?;
                trainer.update(&batch)?;
            }
            Command::ComputeValues(groups) => {
                let batch = rebuild_batch(stage, &trainer, groups)?;
                trainer.compute_values(&batch)?;
            }
            Command::GatherParameters => trainer.gather_parameters()?,
            Command::Save { step, term } => {
                let copy = copy_to_host(&trainer.state_to_save()?, &writer.buffers)?;
                writer.save((step, term, control.ranks.rank()), copy)?;
            }
            Command::CollectReports => writer.report(&control)?,
            Command::Shutdown => break,
        }
    }
    (outcome.step, outcome.skipped) = (trainer.step(), trainer.counters().skipped);
    outcome.interrupted = outcome.step < stage.config.learner.steps;
    Ok(outcome)
}

/// Rebuilds the batch of rank 0, with the pixels of the groups that this rank computes.
fn rebuild_batch(stage: &Stage<'_>, trainer: &PolicyTrainer, groups: Vec<GroupDump>) -> Result<Vec<TrainGroup>> {
    let mut batch: Vec<TrainGroup> = groups.into_iter().map(|g| g.into_train_group(Vec::new())).collect();
    for i in trainer.local_groups(&batch) {
        let group = &batch[i];
        let Record { id, .. } = &group.input.record;
        let index = stage.data.index(id).ok_or_else(|| {
            LearnerError::Setting(format!(
                "record `{id}` is missing from the data of this rank: give all ranks the same data"
            ))
        })?;
        let item = stage.data.item(index, group.id.pass, false)?;
        if item.input.prompt != group.input.prompt {
            return Err(LearnerError::Setting(format!(
                "record `{id}` has another prompt on this rank than on rank 0: give all ranks the same images and model files"
            )));
        }
        batch[i].input = item.input.clone();
    }
    Ok(batch)
}
