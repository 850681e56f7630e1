//! Stage 1 as a sequence of phases: each starts from the model of the one before it, with separate optimiser state and checkpoints. Updates are counted over
//! all phases.

use std::path::Path;

use unveil_trainer::SftTrainer;
use unveil_trainer::lora::BaseModel;

use crate::error::Result;
use crate::follower::follow;
use crate::rank_control::RankControl;
use crate::run::Ready;
use crate::sft::{plan, run_phase};
use crate::sft_batch::SftUpdate;
use crate::sft_phase::phases;
use crate::stage::{Evaluator, Outcome, Stage};
use crate::trainer_start::make_sft_trainer;

/// Runs this rank of stage 1 until it ends or is interrupted. Rank 0 calls `on_ready` when other ranks can join; the other ranks call it
/// when they have joined.
///
/// Checkpoints are saved under the prefix `sft` of the run. The model after the last update, or with `eval.best` that of the best evaluated
/// checkpoint of the last phase, is written to [`Stage::out`]. Must not be called within a tokio runtime.
///
/// # Errors
/// See [`LearnerError`](crate::LearnerError).
pub fn run_sft(mut stage: Stage<'_>, mut on_ready: impl FnMut(Ready)) -> Result<Outcome> {
    let config = stage.config;
    let phases = phases(config);
    let ids = stage.data.ids();
    let parallel = &config.sft.parallel;
    let mut control =
        RankControl::open(config, stage.model_dir, &ids, parallel, |address| on_ready(Ready::Ranks(address)))?;
    let last = phases.len().saturating_sub(1);
    let is_unfinished = |i: &usize| *i == last || !phases[*i].out.join("config.json").exists();
    let first = agree(&control, (0..=last).find(is_unfinished).unwrap_or(last))?;
    let mut outcome = Outcome::default();
    for (i, phase) in phases.iter().enumerate().skip(first) {
        let before = i.checked_sub(1).and_then(|i| phases.get(i));
        let model_dir: &Path = before.map_or(stage.model_dir, |p| &p.out);
        let part = Stage {
            config: &phase.config,
            model_dir,
            out: if i == last { stage.out } else { &phase.out },
            data: stage.data.clone(),
            environment: stage.environment.clone(),
            cancel: stage.cancel.clone(),
            events: &mut *stage.events,
            progress: &mut *stage.progress,
            evaluator: match &mut stage.evaluator {
                Some(evaluator) => Some(&mut **evaluator as &mut dyn Evaluator),
                None => None,
            },
        };
        if parallel.rank == 0 {
            (outcome, control) = run_phase(part, phase, control)?;
        } else {
            let make = |stage: &Stage<'_>, control: &RankControl| -> Result<(SftTrainer, Option<BaseModel>)> {
                make_sft_trainer(stage, control, phase.first_step)
            };
            outcome = follow(&control, &part, &plan(phase), make, SftUpdate::execute, || on_ready(Ready::Joined))?;
        }
        // The other ranks wait here until rank 0 has exported the model of the phase.
        if agree(&control, usize::from(outcome.interrupted))? != 0 {
            outcome.interrupted = true;
            break;
        }
    }
    Ok(outcome)
}

/// Returns the `value` of rank 0, below 256, on all ranks.
fn agree(control: &RankControl, value: usize) -> Result<usize> {
    let bytes = [u8::try_from(value).unwrap_or(u8::MAX)];
    let is_first = control.ranks.rank() == 0;
    let sent = control.broadcast_bytes(is_first.then_some(&bytes[..]))?;
    Ok(sent.first().copied().map_or(value, usize::from))
}
