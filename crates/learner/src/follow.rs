//! What the ranks of a learner other than rank 0 do: their part of every update, and of what needs all ranks. They host nothing, and
//! write their shards of checkpoints alone.

use std::net::SocketAddr;

use unveil_core::Record;

use crate::batch::TrainGroup;
use crate::crew::{Crew, Order};
use crate::error::{LearnerError, Result};
use crate::plain::Group;
use crate::resume::take_up;
use crate::run::{make_learner, read};
use crate::saver::Helper;
use crate::stage::{Outcome, Stage};
use crate::step::Learner;

/// Follows rank 0 to the end of stage 2; `joined` is called once this rank holds the model.
///
/// # Errors
/// See [`LearnerError`].
pub(crate) fn follow(stage: &Stage<'_>, joined: impl FnOnce()) -> Result<Outcome> {
    let nobody = |_: SocketAddr| ();
    let crew = Crew::open(stage.config, stage.model_dir, &stage.data.ids(), nobody)?;
    let mut helper = Helper::open(stage.config, &stage.environment)?;
    let (mut learner, base) = make_learner(stage, &crew)?;
    if let Some((_, meta)) =
        take_up(&crew, helper.place(), None, |r| read(stage, &learner, base.as_ref(), r, helper.place().0))?
    {
        learner.go_on(&meta.stand)?;
    }
    joined();
    let mut outcome = Outcome::default();
    loop {
        match crew.hear(stage.cancel.is_cancelled())? {
            Order::Wait => {}
            Order::Update(groups) => {
                let batch = batch(stage, &learner, groups)?;
                learner.update(&batch)?;
            }
            Order::Values(groups) => {
                let batch = batch(stage, &learner, groups)?;
                learner.values(&batch)?;
            }
            Order::Bring => learner.bring()?,
            Order::Save { step, term } => {
                let copied = learner.snapshot(&helper.buffers)?;
                helper.save((step, term, crew.ranks.rank()), copied)?;
            }
            Order::Collect => helper.tell(&crew)?,
            Order::End => break,
        }
    }
    (outcome.step, outcome.skipped) = (learner.step(), learner.counters().skipped);
    outcome.interrupted = outcome.step < stage.config.learner.steps;
    Ok(outcome)
}

/// A batch of rank 0 with the pixels of the groups that this rank computes.
fn batch(stage: &Stage<'_>, learner: &Learner, groups: Vec<Group>) -> Result<Vec<TrainGroup>> {
    let mut batch: Vec<TrainGroup> = groups.into_iter().map(|g| g.into_train(Vec::new())).collect();
    for i in learner.own_groups(&batch) {
        let group = &batch[i];
        let Record { id, .. } = &group.input.record;
        let index = stage.data.index(id).ok_or_else(|| {
            LearnerError::Setting(format!("record `{id}` is not among this rank's data: give all ranks the same data"))
        })?;
        let item = stage.data.item(index, group.id.pass, false)?;
        if item.input.prompt != group.input.prompt {
            return Err(LearnerError::Setting(format!(
                "record `{id}`: this rank makes another prompt of it than rank 0: give all ranks the same images and model files"
            )));
        }
        batch[i].input = item.input.clone();
    }
    Ok(batch)
}
