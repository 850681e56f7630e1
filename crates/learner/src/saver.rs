//! Saving of checkpoints while training continues: state is copied to host memory and uploaded by a thread. At most one
//! save is pending. Rank 0 commits once every rank has reported what it wrote.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tch::Tensor;
use tokio::runtime::Handle;
use unveil_checkpoint::{
    Access, CheckpointHeader, CheckpointInfo, Checkpoints, Error, Object, Resume, ResumeCandidates, Retention, Store,
    WriteReport, WriteTask, write,
};
use unveil_config::Config;
use unveil_model::Vlm;
use unveil_trainer::lora::{self, BaseModel};

use crate::checkpoint_meta::CheckpointMeta;
use crate::error::{LearnerError, Result};
use crate::metrics::SaveMetrics;
use crate::rank_control::{RankControl, Signal};
use crate::snapshot::{ADAPTER, HostBufferPool, HostCopy, MODEL};
use crate::threads::{spawn, start_runtime};

/// Interval at which rank 0 polls the pending save.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Name of the threads that upload.
const WRITER: &str = "checkpoint";
/// The reports on written shards, as errors name them.
const REPORTS: &str = "the reports on a checkpoint";

/// Result of a save.
#[derive(Debug)]
pub(crate) enum SaveResult {
    /// The checkpoint is committed.
    Saved(SavedCheckpoint),
    /// No checkpoint of this step exists. Training continues: the previous checkpoint is kept, and the next save may
    /// succeed.
    Failed(FailedSave),
}

/// A save that failed.
#[derive(Debug)]
pub(crate) struct FailedSave {
    step: u64,
    /// Consecutive failed saves, including this one.
    in_a_row: u32,
    /// Step of the newest committed checkpoint.
    newest: Option<u64>,
    why: LearnerError,
}

/// A committed checkpoint.
#[derive(Debug)]
pub(crate) struct SavedCheckpoint {
    info: CheckpointInfo,
    /// Time that training was blocked by the previous save.
    wait: Duration,
    /// Time that training was blocked by the copy to host memory.
    copy: Duration,
    /// Upload time of rank 0's objects.
    upload: Duration,
}

/// Opens the checkpoint store of `config` under `prefix`.
pub(crate) fn open_store(
    handle: &Handle,
    config: &Config,
    prefix: &str,
    environment: &[(String, String)],
) -> Result<Store> {
    let url = config.checkpoint_url(prefix);
    Ok(handle.block_on(Store::open(&url, environment.to_vec(), Access::Write))?)
}

/// A save in progress.
struct Pending {
    thread: JoinHandle<Result<(CheckpointInfo, Duration), Error>>,
    /// Set once the objects of rank 0 are written.
    written: Arc<AtomicBool>,
    /// Sends the reports of the other ranks to the writer; `None` once they are sent.
    reports: Option<Sender<Vec<WriteReport>>>,
    /// Error of another rank that could not write its shard.
    rank_error: Option<LearnerError>,
    step: u64,
    wait: Duration,
    copy: Duration,
}

/// Saves the checkpoints of a run on rank 0, whose learner has claimed the run.
pub(crate) struct Saver {
    handle: Handle,
    store: Store,
    checkpoints: Arc<Mutex<Checkpoints>>,
    /// Host memory for copies.
    pub buffers: HostBufferPool,
    pending: Option<Pending>,
    last: Option<u64>,
    /// Step that was last committed or resumed from.
    newest: Option<u64>,
    failures: u32,
    /// Consecutive failures that end the run.
    max_failures: u32,
    metrics: Option<SaveMetrics>,
    /// Term of this learner.
    pub term: u64,
}

impl Saver {
    /// Claims the run at `checkpoint.url` (or the run directory if unset) plus `prefix`.
    pub(crate) fn open(
        handle: &Handle,
        config: &Config,
        prefix: &str,
        environment: &[(String, String)],
    ) -> Result<Self> {
        let c = &config.checkpoint;
        let retention = Retention { keep: c.keep, keep_best: true, keep_every: c.keep_every };
        let store = open_store(handle, config, prefix, environment)?;
        let checkpoints = handle.block_on(Checkpoints::claim(store.clone(), retention))?;
        let term = checkpoints.term();
        Ok(Self {
            handle: handle.clone(),
            store,
            checkpoints: Arc::new(Mutex::new(checkpoints)),
            buffers: HostBufferPool::default(),
            pending: None,
            last: None,
            newest: None,
            failures: 0,
            max_failures: c.max_failures,
            metrics: None,
            term,
        })
    }

    /// Sets the metrics to update on every save.
    pub(crate) fn set_metrics(&mut self, metrics: SaveMetrics) {
        self.metrics = Some(metrics);
    }

    /// Returns the checkpoint store.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Returns the checkpoints to resume from, newest first.
    pub(crate) fn resume_candidates(&self, resume: Resume) -> Result<ResumeCandidates> {
        Ok(lock(&self.checkpoints).resume_candidates(resume)?)
    }

    /// Records the checkpoint that the run resumes from.
    pub(crate) fn record_resume(&mut self, from: Option<&CheckpointInfo>) -> Result<()> {
        self.last = from.map(|c| c.step);
        self.newest = self.last;
        Ok(self.handle.block_on(lock(&self.checkpoints).record_resume(from))?)
    }

    /// Returns the step that was last saved or resumed from; failed saves do not count.
    pub(crate) fn last(&self) -> Option<u64> {
        self.last
    }

    /// Starts writing a copy that was taken after a wait of `wait`. No save may be pending.
    pub(crate) fn save(
        &mut self,
        step: u64,
        (wait, copy): (Duration, HostCopy),
        files: Vec<Object>,
        save: Save<'_>,
    ) -> Result<()> {
        let meta: Value =
            serde_json::to_value(save.meta).map_err(|e| LearnerError::CheckpointState { step, what: e.to_string() })?;
        let header = CheckpointHeader { step, meta, best: save.best };
        let objects = files.into_iter().chain(copy.objects).collect();
        let task = WriteTask { step, term: self.term, rank: 0, objects };
        let (send, receive) = channel();
        let reports = if save.is_only_rank { send.send(Vec::new()).ok().and(None) } else { Some(send) };
        let written = Arc::new(AtomicBool::new(false));
        let work = {
            let handle = self.handle.clone();
            let store = self.store.clone();
            let checkpoints = self.checkpoints.clone();
            let written = written.clone();
            move || commit(&handle, &store, &checkpoints, (header, task), (&*written, &receive))
        };
        let thread = spawn(WRITER, work)?;
        self.pending = Some(Pending { thread, written, reports, rank_error: None, step, wait, copy: copy.took });
        self.last = Some(step);
        Ok(())
    }

    /// Advances the pending save: gathers the reports of the other ranks, and returns the result once it is known.
    ///
    /// # Errors
    /// Returns [`LearnerError::SavesFailed`] after `checkpoint.max_failures` consecutive failures,
    /// [`LearnerError::Checkpoint`] if another learner has claimed the run, and [`LearnerError::Trainer`] if another rank
    /// has failed or timed out.
    pub(crate) fn poll(&mut self, control: &mut RankControl) -> Result<Option<SaveResult>> {
        let Some(p) = &mut self.pending else { return Ok(None) };
        if p.reports.is_some() && p.written.load(Ordering::Acquire) {
            control.command(|| Signal::CollectReports)?;
            if let Some(messages) = control.gather_bytes(Some(&[]))? {
                let reports = messages.iter().enumerate().skip(1).map(|(rank, text)| decode_report(rank, text));
                match (reports.collect::<Result<Vec<_>>>(), p.reports.take()) {
                    (Ok(reports), Some(send)) => drop(send.send(reports)),
                    // Dropping the sender ends the writer's wait.
                    (Err(error), send) => (p.rank_error, _) = (Some(error), send),
                    (Ok(_), None) => {}
                }
            }
        }
        if !p.thread.is_finished() {
            return Ok(None);
        }
        let Some(p) = self.pending.take() else { return Ok(None) };
        let result = p.thread.join().map_err(|_| LearnerError::ThreadEnded("the checkpoint writer"))?;
        let (info, upload) = match result {
            Ok(committed) => committed,
            Err(fenced @ Error::Fenced { .. }) => return Err(fenced.into()),
            Err(e) => {
                return self.failed(p.step, p.rank_error.unwrap_or(e.into())).map(|f| Some(SaveResult::Failed(f)));
            }
        };
        (self.newest, self.failures) = (Some(info.step), 0);
        if let Some(metrics) = &self.metrics {
            metrics.committed(p.copy + upload);
        }
        Ok(Some(SaveResult::Saved(SavedCheckpoint { info, wait: p.wait, copy: p.copy, upload })))
    }

    /// Counts a failed save.
    fn failed(&mut self, step: u64, why: LearnerError) -> Result<FailedSave> {
        self.failures += 1;
        self.last = self.newest;
        if let Some(metrics) = &self.metrics {
            metrics.failed();
        }
        if self.failures >= self.max_failures {
            let in_a_row = self.failures;
            return Err(LearnerError::SavesFailed { step, in_a_row, source: Box::new(why) });
        }
        tracing::warn!(
            step,
            in_a_row = self.failures,
            newest = self.newest,
            "checkpoint could not be written, training continues: {why}"
        );
        Ok(FailedSave { step, in_a_row: self.failures, newest: self.newest, why })
    }

    /// Waits for the pending save; returns `None` if there is none. A slow store thus blocks training instead of taking
    /// memory for a second copy.
    ///
    /// # Errors
    /// See [`Saver::poll`].
    pub(crate) fn wait(&mut self, control: &mut RankControl) -> Result<Option<SaveResult>> {
        while self.pending.is_some() {
            if let Some(result) = self.poll(control)? {
                return Ok(Some(result));
            }
            control.keepalive()?;
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(None)
    }

    /// Waits for the last save of a stage, which must succeed.
    ///
    /// # Errors
    /// See [`Saver::poll`]; returns [`LearnerError::SavesFailed`] also after a single failure.
    pub(crate) fn wait_last(&mut self, control: &mut RankControl) -> Result<Option<SavedCheckpoint>> {
        match self.wait(control)? {
            None => Ok(None),
            Some(SaveResult::Saved(saved)) => Ok(Some(saved)),
            Some(SaveResult::Failed(f)) => {
                Err(LearnerError::SavesFailed { step: f.step, in_a_row: f.in_a_row, source: Box::new(f.why) })
            }
        }
    }

    /// Exports the adapters of a step next to `out`, and the model with the adapters merged (those of `vlm` on `base`)
    /// to `out`. Existing directories are replaced.
    pub(crate) fn export_adapted(&mut self, step: u64, out: &Path, vlm: &mut Vlm, base: &BaseModel) -> Result<()> {
        let adapter = lora::adapter_dir(out);
        let fresh = sibling(out);
        let fresh_adapter = sibling(&adapter);
        remove(&fresh_adapter)?;
        let export = unveil_checkpoint::export(&self.store, Some(step), &fresh_adapter, ADAPTER, "adapter_model");
        self.handle.block_on(export)?;
        let files = unveil_model::read_adapter_files(&fresh_adapter)?;
        let named: Vec<(String, Tensor)> = files.adapters.into_iter().chain(files.parameters).collect();
        vlm.load_adapters(&named)?;
        remove(&fresh)?;
        lora::export(vlm, &base.dir, &fresh, &fresh_adapter)?;
        unveil_model::record_adapter_base(&fresh_adapter, &base.hash)?;
        for (from, to) in [(&fresh_adapter, &adapter), (&fresh, &out.to_path_buf())] {
            remove(to)?;
            std::fs::rename(from, to).map_err(LearnerError::io("replace", to))?;
        }
        Ok(())
    }

    /// Exports the model directory of a step to `out`, replacing an existing one.
    pub(crate) fn export(&mut self, step: u64, out: &Path) -> Result<()> {
        let fresh = sibling(out);
        remove(&fresh)?;
        self.handle.block_on(unveil_checkpoint::export(&self.store, Some(step), &fresh, MODEL, MODEL))?;
        remove(out)?;
        std::fs::rename(&fresh, out).map_err(LearnerError::io("replace", out))
    }
}

/// Metadata and options of a save.
pub(crate) struct Save<'a> {
    pub meta: &'a CheckpointMeta,
    /// Whether this is the best checkpoint so far.
    pub best: bool,
    /// Whether there are no other ranks to wait for.
    pub is_only_rank: bool,
}

/// Writes the objects of rank 0, waits for the reports of the other ranks, and commits.
fn commit(
    handle: &Handle,
    store: &Store,
    checkpoints: &Mutex<Checkpoints>,
    (header, task): (CheckpointHeader, WriteTask),
    (written, other_reports): (&AtomicBool, &Receiver<Vec<WriteReport>>),
) -> Result<(CheckpointInfo, Duration), Error> {
    let mut checkpoints = lock(checkpoints);
    let step = header.step;
    let start = Instant::now();
    let report = handle.block_on(async {
        checkpoints.begin_save(step).await?;
        match write(store, task).await {
            Ok(report) => Ok(report),
            Err(e) => Err(checkpoints.abandon_save(step, e).await),
        }
    })?;
    let took = start.elapsed();
    written.store(true, Ordering::Release);
    let Ok(other_reports) = other_reports.recv() else {
        let why = "the learner ended before all ranks had reported".to_owned();
        return Err(Error::IncompleteTensors { location: store.location().to_owned(), step, why });
    };
    let reports = std::iter::once(report).chain(other_reports).collect();
    let info = handle.block_on(checkpoints.commit(header, reports))?;
    Ok((info, took))
}

/// Decodes the report of another rank.
fn decode_report(rank: usize, message: &[u8]) -> Result<WriteReport> {
    let report: Result<WriteReport, String> =
        serde_json::from_slice(message).map_err(LearnerError::rank_message(REPORTS))?;
    report.map_err(|why| LearnerError::ShardWrite { rank, why })
}

/// Writes the checkpoint shards of a rank other than 0.
pub(crate) struct ShardWriter {
    runtime: tokio::runtime::Runtime,
    store: Store,
    pub buffers: HostBufferPool,
    writing: Option<JoinHandle<Result<WriteReport, Error>>>,
    /// Encoded report that rank 0 has not received yet.
    report: Option<Vec<u8>>,
}

impl ShardWriter {
    /// Opens the checkpoint store of `config` under `prefix`.
    pub(crate) fn open(config: &Config, prefix: &str, environment: &[(String, String)]) -> Result<Self> {
        let runtime = start_runtime(2)?;
        let store = open_store(runtime.handle(), config, prefix, environment)?;
        Ok(Self { runtime, store, buffers: HostBufferPool::default(), writing: None, report: None })
    }

    /// Returns the store and the runtime that runs requests to it.
    pub(crate) fn store(&self) -> (&Handle, &Store) {
        (self.runtime.handle(), &self.store)
    }

    /// Starts writing a copy.
    pub(crate) fn save(&mut self, (step, term, rank): (u64, u64, usize), copy: HostCopy) -> Result<()> {
        // Rank 0 has abandoned a save that is still being written.
        if let Some(previous) = self.writing.take() {
            let _ = previous.join();
        }
        self.report = None;
        let task = WriteTask { step, term, rank, objects: copy.objects };
        let handle = self.runtime.handle().clone();
        let store = self.store.clone();
        let work = move || handle.block_on(write(&store, task));
        self.writing = Some(spawn(WRITER, work)?);
        Ok(())
    }

    /// Reports the result to rank 0 if the save has finished.
    pub(crate) fn report(&mut self, control: &RankControl) -> Result<()> {
        if let Some(thread) = self.writing.take_if(|t| t.is_finished()) {
            let result = thread.join().map_err(|_| LearnerError::ThreadEnded("the checkpoint writer"))?;
            let message = serde_json::to_vec(&result.map_err(|e| e.to_string()));
            self.report = Some(message.map_err(LearnerError::rank_message(REPORTS))?);
        }
        if control.gather_bytes(self.report.as_deref())?.is_some() {
            self.report = None;
        }
        Ok(())
    }
}

fn lock(checkpoints: &Mutex<Checkpoints>) -> MutexGuard<'_, Checkpoints> {
    checkpoints.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a hidden temporary path next to `out`.
fn sibling(out: &Path) -> PathBuf {
    let name = out.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    out.with_file_name(format!(".{name}.new"))
}

/// Removes a directory if it exists.
fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(LearnerError::io("remove", dir)(e)),
        _ => Ok(()),
    }
}

impl SaveResult {
    /// Returns the `checkpoint` event, or the `checkpoint_failed` event with the newest committed step.
    pub(crate) fn event(&self, stage: &str) -> Value {
        match self {
            Self::Saved(saved) => saved.event(stage),
            Self::Failed(f) => serde_json::json!({
                "kind": "checkpoint_failed", "stage": stage, "step": f.step, "in_a_row": f.in_a_row, "newest": f.newest,
                "why": f.why.to_string(),
            }),
        }
    }
}

impl FailedSave {
    /// Returns the step whose save failed.
    pub(crate) fn step(&self) -> u64 {
        self.step
    }
}

impl SavedCheckpoint {
    /// Returns the step of the checkpoint.
    pub(crate) fn step(&self) -> u64 {
        self.info.step
    }

    /// Returns the `checkpoint` event; `wait_s` and `copy_s` are the times that training was blocked.
    pub(crate) fn event(&self, stage: &str) -> Value {
        let i = &self.info;
        serde_json::json!({
            "kind": "checkpoint", "stage": stage, "step": i.step, "path": i.path, "bytes": i.bytes, "best": i.best,
            "wait_s": self.wait.as_secs_f64(), "copy_s": self.copy.as_secs_f64(), "upload_s": self.upload.as_secs_f64(),
        })
    }
}
