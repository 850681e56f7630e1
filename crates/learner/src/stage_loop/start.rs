//! The start of a stage on rank 0: it claims the run, and resumes together with the other ranks.

use serde_json::json;
use tokio::runtime::Handle;
use unveil_checkpoint::{Reader, Resume, ResumeCandidates};
use unveil_trainer::lora::BaseModel;

use super::StageLoop;
use super::best::BestTracker;
use crate::checkpoint_meta::{CheckpointMeta, StaticFiles};
use crate::error::Result;
use crate::rank_control::RankControl;
use crate::resume::compatibility::{allowed_changes, report_changes};
use crate::resume::{read_checkpoint, resume_on_all_ranks};
use crate::saver::Saver;
use crate::stage::Stage;
use crate::stage_plan::StagePlan;
use crate::stage_trainer::StageTrainer;

/// A stage that has claimed its run and not resumed yet.
pub(crate) struct StageStart {
    plan: StagePlan,
    handle: Handle,
    files: StaticFiles,
    saver: Saver,
    candidates: ResumeCandidates,
}

impl StageStart {
    /// Claims the run: an earlier learner that is still running can commit nothing from now on.
    ///
    /// # Errors
    /// Returns [`LearnerError::Checkpoint`](crate::LearnerError::Checkpoint) if the store cannot be used, and
    /// [`LearnerError::Io`](crate::LearnerError::Io) if a file of the model directory cannot be read.
    pub(crate) fn claim(stage: &Stage<'_>, plan: StagePlan, resume: Resume, handle: &Handle) -> Result<Self> {
        let files = StaticFiles::read(stage.model_dir)?;
        let saver = Saver::open(handle, stage.config, plan.prefix, &stage.environment)?;
        let candidates = saver.resume_candidates(resume)?;
        Ok(Self { plan, handle: handle.clone(), files, saver, candidates })
    }

    /// Resumes on all ranks from the newest checkpoint that is valid on all of them, if there is one, and logs the start.
    ///
    /// `trainer` comes with the base model of its adapters. `restore` returns the state of the stage besides its trainer, from the
    /// metadata of that checkpoint.
    ///
    /// # Errors
    /// See [`resume_on_all_ranks`] and [`read_checkpoint`].
    pub(crate) fn resume<'a, T: StageTrainer, S>(
        self,
        stage: Stage<'a>,
        control: RankControl,
        (mut trainer, base): (T, Option<BaseModel>),
        restore: impl FnOnce(&StageLoop<'a, T>, Option<&CheckpointMeta>) -> Result<S>,
    ) -> Result<(StageLoop<'a, T>, S)> {
        let Self { plan, handle, files, mut saver, mut candidates } = self;
        let config = stage.config;
        let attempt = |r: &Reader| read_checkpoint(config, &plan, (&trainer, base.as_ref()), (&handle, r));
        let resumed = resume_on_all_ranks(&control, (&handle, saver.store()), Some(&mut candidates), attempt)?;
        if let Some((info, meta)) = &resumed {
            let changed = allowed_changes(info.step, &meta.config, config)?;
            report_changes(&mut *stage.progress, info.step, candidates.warnings(), &changed);
        }
        saver.record_resume(resumed.as_ref().map(|(info, _)| info))?;
        if let Some((_, meta)) = &resumed {
            trainer.resume_from(&meta.progress)?;
        }
        let meta = resumed.as_ref().map(|(_, meta)| meta);
        let best = BestTracker::new(meta.and_then(|m| m.best));
        let mut run = StageLoop { stage, trainer, control, plan, saver, files, base, best, metrics: None };
        let state = restore(&run, meta)?;
        let kind = if meta.is_some() { "resumed" } else { "started" };
        let mut event = json!({"kind": kind, "stage": plan.name, "step": run.trainer.step()});
        if plan.logs_term {
            event["term"] = run.term().into();
        }
        run.stage.event(&event)?;
        Ok((run, state))
    }
}
