//! The order of a training stage on rank 0: resume, update, evaluate and save when due, save at the end or when interrupted, export.
//!
//! Both stages share it. What differs between them is passed in as a [`StagePlan`], a [`StageTrainer`] and [`StageParts`]; the other
//! ranks follow in [`follow`](crate::follower::follow).

mod best;
mod start;

use std::time::Instant;

use serde::Serialize;
use unveil_trainer::ZeroStage;
use unveil_trainer::lora::BaseModel;

use crate::checkpoint_meta::{CheckpointMeta, SavedAdapters, StaticFiles};
use crate::error::Result;
use crate::metrics::LearnerMetrics;
use crate::rank_control::{Command, RankControl, Signal};
use crate::saver::{Save, SaveResult, Saver};
use crate::snapshot::copy_to_host;
use crate::stage::{Outcome, Stage, ValidationResult};
use crate::stage_plan::StagePlan;
use crate::stage_trainer::StageTrainer;
use best::BestTracker;

pub(crate) use start::StageStart;

/// Work of a stage that differs from the other stage, on rank 0.
pub(crate) trait StageParts {
    /// The trainer of the stage.
    type Trainer: StageTrainer;

    /// Waits for the next batch, updates on all ranks, and reports the update. Returns `false`, without an update, if the stage is
    /// cancelled meanwhile.
    fn update(&mut self, run: &mut StageLoop<'_, Self::Trainer>) -> Result<bool>;

    /// Adds the state of the stage besides its trainer to the metadata of a checkpoint.
    fn add_to_checkpoint(&self, meta: &mut CheckpointMeta);
}

/// Rank 0 of a stage that has resumed.
pub(crate) struct StageLoop<'a, T> {
    pub stage: Stage<'a>,
    pub trainer: T,
    control: RankControl,
    plan: StagePlan,
    saver: Saver,
    files: StaticFiles,
    /// Base model of the adapters; `None` in full fine-tuning.
    base: Option<BaseModel>,
    best: BestTracker,
    metrics: Option<LearnerMetrics>,
}

impl<T: StageTrainer> StageLoop<'_, T> {
    /// Sets the metrics that evaluations and saves update.
    pub(crate) fn set_metrics(&mut self, metrics: LearnerMetrics) {
        self.saver.set_metrics(metrics.save_metrics());
        self.metrics = Some(metrics);
    }

    /// Returns the term of this learner.
    pub(crate) fn term(&self) -> u64 {
        self.saver.term
    }

    /// Trains until the last update or a cancellation, saves the last checkpoint, and ends the other ranks.
    ///
    /// # Errors
    /// Returns any error of the stage, and [`LearnerError::SavesFailed`](crate::LearnerError::SavesFailed) if the last checkpoint
    /// cannot be saved.
    pub(crate) fn train(&mut self, parts: &mut impl StageParts<Trainer = T>) -> Result<Outcome> {
        let plan = self.plan;
        let metrics = self.metrics.clone();
        let mut outcome = Outcome::default();
        if plan.evaluates_start && self.trainer.step() == 0 && plan.total > 0 && plan.eval_every > 0 {
            self.gather_parameters()?;
            outcome.last = self.evaluate()?;
        }
        while self.trainer.step() < plan.total && !self.stage.cancel.is_cancelled() && parts.update(self)? {
            let step = self.trainer.step();
            let evaluation = if plan.is_due(plan.eval_every, step) {
                self.gather_parameters()?;
                timed(metrics.as_ref(), "evaluate", || self.evaluate())?
            } else {
                None
            };
            let score = evaluation.as_ref().map(|e| e.score).filter(|_| plan.exports_best);
            let is_best = score.is_some_and(|score| self.best.record_score(step, score));
            outcome.last = evaluation.or(outcome.last);
            if is_best || plan.is_due(plan.checkpoint_every, step) {
                timed(metrics.as_ref(), "save", || self.save(&*parts, is_best))?;
            }
        }
        outcome.step = self.trainer.step();
        outcome.skipped = self.trainer.progress().counters.skipped;
        outcome.interrupted = outcome.step < plan.total;
        let has_saved = self.save_last(&*parts)?;
        self.gather_parameters()?;
        self.control.command(|| Signal::Shutdown)?;
        if has_saved && !outcome.interrupted && !plan.exports_best {
            outcome.last = self.evaluate()?.or(outcome.last);
        }
        Ok(outcome)
    }

    /// Exports the model of the best evaluated checkpoint, or of the last one, to [`Stage::out`].
    ///
    /// # Errors
    /// Returns [`LearnerError::Checkpoint`](crate::LearnerError::Checkpoint) if the checkpoint cannot be read, and
    /// [`LearnerError::Io`](crate::LearnerError::Io) if the directory cannot be replaced.
    pub(crate) fn export(&mut self, outcome: Outcome) -> Result<Outcome> {
        let step = self.best.best().map_or(outcome.step, |b| b.step);
        match &self.base {
            Some(base) => self.saver.export_adapted(step, self.stage.out, self.trainer.vlm_mut(), base)?,
            None => self.saver.export(step, self.stage.out)?,
        }
        Ok(Outcome { exported: Some(step), ..outcome })
    }

    /// Ends the loop and returns the control of the ranks.
    pub(crate) fn into_control(self) -> RankControl {
        self.control
    }

    /// Tells the other ranks that the stage continues, while it waits for a batch. If one of them was asked to stop, the stage is
    /// cancelled.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`](crate::LearnerError::Trainer) if another rank has failed or timed out.
    pub(crate) fn keep_ranks(&mut self) -> Result<()> {
        if self.control.keepalive()? {
            self.stage.cancel.cancel();
        }
        Ok(())
    }

    /// Sends a command about a batch to the other ranks. If one of them was asked to stop, the stage ends after this update.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`](crate::LearnerError::Trainer) if another rank has failed or timed out.
    pub(crate) fn send_batch<B: Serialize>(&mut self, command: impl FnOnce() -> B) -> Result<()> {
        if self.control.command(|| Command::Batch(command()))? {
            self.stage.cancel.cancel();
        }
        Ok(())
    }

    /// Gathers all sharded parameters on this rank.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`](crate::LearnerError::Trainer) if another rank has failed or timed out.
    pub(crate) fn gather_parameters(&mut self) -> Result<()> {
        if self.control.ranks.zero_stage() == ZeroStage::Parameters {
            self.control.command(|| Signal::GatherParameters)?;
            self.trainer.gather_on_rank_0()?;
        }
        Ok(())
    }

    /// Tells the other ranks to take part in [`StageTrainer::visit_parameters`], which must follow, and returns true; returns false if
    /// parameters are not sharded.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`](crate::LearnerError::Trainer) if another rank has failed or timed out.
    pub(crate) fn begin_visit(&mut self) -> Result<bool> {
        let sharded = self.control.ranks.zero_stage() == ZeroStage::Parameters;
        if sharded {
            self.control.command(|| Signal::VisitParameters)?;
        }
        Ok(sharded)
    }

    /// Advances the pending save, and logs its result once it is known.
    ///
    /// # Errors
    /// See [`Saver::poll`].
    pub(crate) fn poll_save(&mut self) -> Result<()> {
        let result = self.saver.poll(&mut self.control)?;
        self.record_save(result)
    }

    /// Evaluates the present weights, whose parameters must be gathered.
    fn evaluate(&mut self) -> Result<Option<ValidationResult>> {
        let step = self.trainer.step();
        self.stage.evaluate(self.plan.name, self.trainer.vlm_mut(), step)
    }

    /// Starts saving a checkpoint on all ranks, after the previous save has finished.
    fn save(&mut self, parts: &impl StageParts<Trainer = T>, best: bool) -> Result<()> {
        let wait_start = Instant::now();
        self.wait_for_save()?;
        let wait = wait_start.elapsed();
        let step = self.trainer.step();
        let term = self.saver.term;
        self.control.command(|| Signal::Save { step, term })?;
        let copy = copy_to_host(&self.trainer.state_to_save()?, &self.saver.buffers)?;
        let vlm = self.trainer.vlm();
        let base = self.base.as_ref();
        let files = self.files.objects(vlm, base)?;
        let mut meta = CheckpointMeta {
            best: self.best.best(),
            adapters: SavedAdapters::new(vlm, base),
            ..CheckpointMeta::new(self.plan.name, self.stage.config, self.trainer.progress())
        };
        parts.add_to_checkpoint(&mut meta);
        let save = Save { meta: &meta, best, is_only_rank: self.control.ranks.size() == 1 };
        self.saver.save(step, (wait, copy), files, save)
    }

    /// Waits for the pending save, and saves the present step unless it is saved; returns whether it was not.
    fn save_last(&mut self, parts: &impl StageParts<Trainer = T>) -> Result<bool> {
        self.wait_for_save()?;
        if self.saver.last() == Some(self.trainer.step()) {
            return Ok(false);
        }
        self.save(parts, false)?;
        let last = self.saver.wait_last(&mut self.control)?;
        self.record_save(last.map(SaveResult::Saved))?;
        Ok(true)
    }

    /// Waits for the pending save, if there is one, and logs its result.
    fn wait_for_save(&mut self) -> Result<()> {
        let result = self.saver.wait(&mut self.control)?;
        self.record_save(result)
    }

    /// Logs the result of a save.
    fn record_save(&mut self, result: Option<SaveResult>) -> Result<()> {
        let Some(result) = result else { return Ok(()) };
        match &result {
            SaveResult::Saved(saved) => self.best.record_committed(saved.step()),
            SaveResult::Failed(failed) => self.best.record_failed(failed.step()),
        }
        self.stage.event(&result.event(self.plan.name))
    }
}

/// Runs a part of a step and records its duration, if there are metrics.
fn timed<R>(metrics: Option<&LearnerMetrics>, part: &'static str, work: impl FnOnce() -> R) -> R {
    match metrics {
        Some(metrics) => metrics.time(part, work),
        None => work(),
    }
}
