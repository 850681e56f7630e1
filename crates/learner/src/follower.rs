//! The loop of the ranks other than rank 0, in either stage: they execute the commands of rank 0 and write their own shards of
//! checkpoints.

use serde::de::DeserializeOwned;
use unveil_trainer::lora::BaseModel;

use crate::error::Result;
use crate::rank_control::{Command, RankControl};
use crate::resume::{read_checkpoint, resume_on_all_ranks};
use crate::saver::ShardWriter;
use crate::snapshot::copy_to_host;
use crate::stage::{Outcome, Stage};
use crate::stage_plan::StagePlan;
use crate::stage_trainer::StageTrainer;

/// Executes the commands of rank 0 until the stage ends. `make_trainer` creates the trainer of this rank, with the base model of its
/// adapters; `execute` executes the commands of the stage. `on_joined` is called once this rank has loaded the model.
///
/// # Errors
/// Returns [`LearnerError::Trainer`](crate::LearnerError::Trainer) if another rank has failed or timed out, and any error of `execute`.
pub(crate) fn follow<T: StageTrainer, B: DeserializeOwned>(
    control: &RankControl,
    stage: &Stage<'_>,
    plan: &StagePlan,
    make_trainer: impl FnOnce(&Stage<'_>, &RankControl) -> Result<(T, Option<BaseModel>)>,
    execute: impl Fn(B, &Stage<'_>, &mut T) -> Result<()>,
    on_joined: impl FnOnce(),
) -> Result<Outcome> {
    let config = stage.config;
    let mut writer = ShardWriter::open(config, plan.prefix, &stage.environment)?;
    let (mut trainer, base) = make_trainer(stage, control)?;
    if let Some((_, meta)) = resume_on_all_ranks(control, writer.store(), None, |r| {
        read_checkpoint(config, plan, (&trainer, base.as_ref()), (writer.store().0, r))
    })? {
        trainer.resume_from(&meta.progress)?;
    }
    on_joined();
    loop {
        match control.next_command(stage.cancel.is_cancelled())? {
            Command::Idle => {}
            Command::Batch(command) => execute(command, stage, &mut trainer)?,
            Command::GatherParameters => trainer.gather_on_rank_0()?,
            Command::VisitParameters => trainer.visit_parameters(&mut |_| Ok(()))?,
            Command::Save { step, term } => {
                let copy = copy_to_host(&trainer.state_to_save()?, &writer.buffers)?;
                writer.save((step, term, control.ranks.rank()), copy)?;
            }
            Command::CollectReports => writer.report(control)?,
            Command::Shutdown => break,
        }
    }
    let step = trainer.step();
    let skipped = trainer.progress().counters.skipped;
    Ok(Outcome { interrupted: step < plan.total, step, skipped, ..Outcome::default() })
}
