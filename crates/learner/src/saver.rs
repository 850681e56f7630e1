//! Checkpoints are written while training goes on: a copy in host memory, then a thread that uploads it; the one before must be whole
//! first. Rank 0 commits when every rank has told what it wrote. Must not know: what is trained.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::runtime::Handle;
use unveil_checkpoint::{
    Access, CheckpointInfo, Checkpoints, Choice, Error, Object, Report, Resume, Retention, Snapshot, Store, Task, write,
};
use unveil_config::Config;
use unveil_model::Vlm;

use crate::crew::{Crew, Order};
use crate::error::{LearnerError, Result};
use crate::lora::{self, ADAPTER, Base};
use crate::meter::Saves;
use crate::snapshot::{Buffers, Copied, MODEL};
use crate::state::Meta;

/// How often a waiting rank 0 looks.
const LOOK: Duration = Duration::from_millis(10);

/// What came of a save.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The checkpoint is whole.
    Saved(Saved),
    /// There is none of this step, and training goes on: the one before stays, and the next save may work.
    Failed(Failed),
}

/// A save that failed.
#[derive(Debug)]
pub(crate) struct Failed {
    step: u64,
    /// Saves that have failed in a row, this one among them.
    in_a_row: u32,
    /// The step of the newest checkpoint that is whole.
    newest: Option<u64>,
    why: LearnerError,
}

/// A checkpoint that is whole.
#[derive(Debug)]
pub(crate) struct Saved {
    info: CheckpointInfo,
    /// What training stood still for: the wait for the one before, and the copy.
    wait: Duration,
    copy: Duration,
    /// What rank 0's objects took.
    upload: Duration,
}

/// The store of `config`'s checkpoints below `prefix`.
pub(crate) fn store(handle: &Handle, config: &Config, prefix: &str, environment: &[(String, String)]) -> Result<Store> {
    let base = if config.checkpoint.url.is_empty() { &config.run.dir } else { &config.checkpoint.url };
    let place = if prefix.is_empty() { base.clone() } else { format!("{}/{prefix}", base.trim_end_matches('/')) };
    Ok(handle.block_on(Store::open(&place, environment.to_vec(), Access::Write))?)
}

/// A save that goes on.
struct Pending {
    thread: JoinHandle<Result<(CheckpointInfo, Duration), Error>>,
    /// Rank 0's own objects are there.
    written: Arc<AtomicBool>,
    /// Takes what the other ranks report; none when that is done.
    others: Option<Sender<Vec<Report>>>,
    /// Why another rank could not write its part.
    fault: Option<LearnerError>,
    step: u64,
    wait: Duration,
    copy: Duration,
}

/// Rank 0's hold on the run's checkpoints.
pub(crate) struct Saver {
    handle: Handle,
    store: Store,
    checkpoints: Arc<Mutex<Checkpoints>>,
    /// Memory of copies.
    pub buffers: Buffers,
    pending: Option<Pending>,
    last: Option<u64>,
    /// The step that is committed, or was resumed from.
    newest: Option<u64>,
    failures: u32,
    /// Failures in a row that are an error.
    most_failures: u32,
    saves: Option<Saves>,
    /// The learner's term.
    pub term: u64,
}

impl Saver {
    /// Claims the run under `checkpoint.url` (else the run directory) plus `prefix`.
    pub fn open(handle: &Handle, config: &Config, prefix: &str, environment: &[(String, String)]) -> Result<Self> {
        let c = &config.checkpoint;
        let retention = Retention { keep: c.keep, keep_best: true, keep_every: c.keep_every };
        let store = store(handle, config, prefix, environment)?;
        let checkpoints = handle.block_on(Checkpoints::claim(store.clone(), retention))?;
        let term = checkpoints.term();
        Ok(Self {
            handle: handle.clone(),
            store,
            checkpoints: Arc::new(Mutex::new(checkpoints)),
            buffers: Buffers::default(),
            pending: None,
            last: None,
            newest: None,
            failures: 0,
            most_failures: c.max_failures,
            saves: None,
            term,
        })
    }

    /// Tells `saves` of every checkpoint that is committed from here on.
    pub fn tell(&mut self, saves: Saves) {
        self.saves = Some(saves);
    }

    /// Where it writes.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What to go on from.
    pub fn choice(&self, resume: Resume) -> Result<Choice> {
        Ok(lock(&self.checkpoints).choice(resume)?)
    }

    /// Records what is gone on from.
    pub fn resumed(&mut self, from: Option<&CheckpointInfo>) -> Result<()> {
        self.last = from.map(|c| c.step);
        self.newest = self.last;
        Ok(self.handle.block_on(lock(&self.checkpoints).resumed(from))?)
    }

    /// The step that was saved, or resumed from, last; one whose save failed does not count.
    pub fn last(&self) -> Option<u64> {
        self.last
    }

    /// Starts writing what was copied after a wait of `wait`. None may be pending.
    pub fn save(
        &mut self,
        step: u64,
        (wait, copied): (Duration, Copied),
        files: Vec<Object>,
        save: Save<'_>,
    ) -> Result<()> {
        let meta: Value =
            serde_json::to_value(save.meta).map_err(|e| LearnerError::State { step, what: e.to_string() })?;
        let snapshot = Snapshot { step, meta, best: save.best };
        let objects = files.into_iter().chain(copied.objects).collect();
        let task = Task { step, term: self.term, rank: 0, objects };
        let (send, reports) = channel();
        let others = if save.alone { send.send(Vec::new()).ok().and(None) } else { Some(send) };
        let written = Arc::new(AtomicBool::new(false));
        let work = {
            let (handle, store, checkpoints) = (self.handle.clone(), self.store.clone(), self.checkpoints.clone());
            let written = written.clone();
            move || commit(&handle, &store, &checkpoints, (snapshot, task), (&*written, &reports))
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(work);
        let thread = thread.map_err(LearnerError::io("thread checkpoint"))?;
        self.pending = Some(Pending { thread, written, others, fault: None, step, wait, copy: copied.took });
        self.last = Some(step);
        Ok(())
    }

    /// Brings the pending save on: asks the other ranks, and returns what came of it once that is known.
    ///
    /// # Errors
    /// It failed, and so did as many before it as `checkpoint.max_failures` allows; another learner holds the run; a rank is gone.
    pub fn poll(&mut self, crew: &mut Crew) -> Result<Option<Ended>> {
        let Some(p) = &mut self.pending else { return Ok(None) };
        if p.others.is_some() && p.written.load(Ordering::Acquire) {
            crew.give(|| Order::Collect)?;
            if let Some(told) = crew.collect(Some(&[]))? {
                let reports = told.iter().enumerate().skip(1).map(|(rank, text)| parse(rank, text));
                match (reports.collect::<Result<Vec<_>>>(), p.others.take()) {
                    (Ok(reports), Some(others)) => drop(others.send(reports)),
                    // The writer hears that there is nothing more to come.
                    (Err(fault), others) => (p.fault, _) = (Some(fault), others),
                    (Ok(_), None) => {}
                }
            }
        }
        if !p.thread.is_finished() {
            return Ok(None);
        }
        let Some(p) = self.pending.take() else { return Ok(None) };
        let ended = p.thread.join().map_err(|_| LearnerError::Lost("the checkpoint writer"))?;
        let (info, upload) = match ended {
            Ok(whole) => whole,
            Err(fenced @ Error::Fenced { .. }) => return Err(fenced.into()),
            Err(e) => return self.failed(p.step, p.fault.unwrap_or(e.into())).map(|f| Some(Ended::Failed(f))),
        };
        (self.newest, self.failures) = (Some(info.step), 0);
        if let Some(saves) = &self.saves {
            saves.committed(p.copy + upload);
        }
        Ok(Some(Ended::Saved(Saved { info, wait: p.wait, copy: p.copy, upload })))
    }

    /// Counts a save that failed.
    fn failed(&mut self, step: u64, why: LearnerError) -> Result<Failed> {
        self.failures += 1;
        self.last = self.newest;
        if let Some(saves) = &self.saves {
            saves.failed();
        }
        if self.failures >= self.most_failures {
            let in_a_row = self.failures;
            return Err(LearnerError::Saves { step, in_a_row, source: Box::new(why) });
        }
        let kept = self.newest.map_or_else(|| "there is none yet".to_owned(), |n| format!("that of step {n} stays"));
        tracing::warn!(
            step,
            in_a_row = self.failures,
            "a checkpoint could not be written, {kept}, and training goes on: {why}"
        );
        Ok(Failed { step, in_a_row: self.failures, newest: self.newest, why })
    }

    /// Waits for the pending save. A store that is slow makes training wait rather than a second copy.
    ///
    /// # Errors
    /// As [`Saver::poll`].
    pub fn wait(&mut self, crew: &mut Crew) -> Result<Option<Ended>> {
        while self.pending.is_some() {
            if let Some(ended) = self.poll(crew)? {
                return Ok(Some(ended));
            }
            crew.hold()?;
            std::thread::sleep(LOOK);
        }
        Ok(None)
    }

    /// [`Saver::wait`] for the last save of a stage, which nothing comes after.
    ///
    /// # Errors
    /// As there, and where it failed.
    pub fn wait_last(&mut self, crew: &mut Crew) -> Result<Option<Saved>> {
        match self.wait(crew)? {
            None => Ok(None),
            Some(Ended::Saved(saved)) => Ok(Some(saved)),
            Some(Ended::Failed(f)) => {
                Err(LearnerError::Saves { step: f.step, in_a_row: f.in_a_row, source: Box::new(f.why) })
            }
        }
    }

    /// Writes the model of a step, whose checkpoint holds adapters to that of `vlm` on `base`, merged to `out`, and the adapters beside
    /// it, replacing what is there.
    pub fn export_adapted(&mut self, step: u64, out: &Path, vlm: &mut Vlm, base: &Base) -> Result<()> {
        let (adapter, fresh) = (lora::beside(out), sibling(out));
        let fresh_adapter = sibling(&adapter);
        remove(&fresh_adapter)?;
        let export = unveil_checkpoint::export(&self.store, Some(step), &fresh_adapter, ADAPTER, "adapter_model");
        self.handle.block_on(export)?;
        let (_, named) = unveil_model::read_adapters(&fresh_adapter)?;
        vlm.load_adapters(&named)?;
        remove(&fresh)?;
        lora::export(vlm, &base.dir, &fresh, &fresh_adapter)?;
        for (made, place) in [(&fresh_adapter, &adapter), (&fresh, &out.to_path_buf())] {
            remove(place)?;
            std::fs::rename(made, place).map_err(LearnerError::io(place))?;
        }
        Ok(())
    }

    /// Writes the model directory of a step to `out`, replacing what is there.
    pub fn export(&mut self, step: u64, out: &Path) -> Result<()> {
        let fresh = sibling(out);
        remove(&fresh)?;
        self.handle.block_on(unveil_checkpoint::export(&self.store, Some(step), &fresh, MODEL, MODEL))?;
        remove(out)?;
        std::fs::rename(&fresh, out).map_err(LearnerError::io(out))
    }
}

/// What a save says.
pub(crate) struct Save<'a> {
    pub meta: &'a Meta,
    pub best: bool,
    /// There is no other rank.
    pub alone: bool,
}

/// Writes rank 0's objects, waits for what the others report, commits.
fn commit(
    handle: &Handle,
    store: &Store,
    checkpoints: &Mutex<Checkpoints>,
    (snapshot, task): (Snapshot, Task),
    (written, others): (&AtomicBool, &Receiver<Vec<Report>>),
) -> Result<(CheckpointInfo, Duration), Error> {
    let mut checkpoints = lock(checkpoints);
    let (step, start) = (snapshot.step, Instant::now());
    let own = handle.block_on(async {
        checkpoints.begin(step).await?;
        match write(store, task).await {
            Ok(report) => Ok(report),
            Err(e) => Err(checkpoints.failed(step, e).await),
        }
    })?;
    let took = start.elapsed();
    written.store(true, Ordering::Release);
    let Ok(others) = others.recv() else {
        // The learner ends for a reason of its own.
        let why = "the learner ended before all ranks had reported".to_owned();
        return Err(Error::Parts { place: store.place().to_owned(), step, why });
    };
    let reports = std::iter::once(own).chain(others).collect();
    let info = handle.block_on(checkpoints.commit(snapshot, reports))?;
    Ok((info, took))
}

fn parse(rank: usize, text: &[u8]) -> Result<Report> {
    let fault =
        |what: String| LearnerError::Setting(format!("rank {rank} could not write its part of a checkpoint: {what}"));
    let told: Result<Report, String> = serde_json::from_slice(text).map_err(|e| fault(e.to_string()))?;
    told.map_err(fault)
}

/// The part of another rank than 0 in saving.
pub(crate) struct Helper {
    runtime: tokio::runtime::Runtime,
    store: Store,
    pub buffers: Buffers,
    writing: Option<JoinHandle<Result<Report, Error>>>,
    /// What is to be told.
    report: Option<Vec<u8>>,
}

impl Helper {
    /// Opens the store that rank 0 writes to.
    pub fn open(config: &Config, environment: &[(String, String)]) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(LearnerError::io("runtime"))?;
        let store = store(runtime.handle(), config, "", environment)?;
        Ok(Self { runtime, store, buffers: Buffers::default(), writing: None, report: None })
    }

    /// Its store, and what runs requests to it.
    pub fn place(&self) -> (&Handle, &Store) {
        (self.runtime.handle(), &self.store)
    }

    /// Starts writing what was copied.
    pub fn save(&mut self, (step, term, rank): (u64, u64, usize), copied: Copied) -> Result<()> {
        // One that rank 0 gave up is of no use to it any more.
        if let Some(before) = self.writing.take() {
            let _ = before.join();
        }
        self.report = None;
        let task = Task { step, term, rank, objects: copied.objects };
        let (handle, store) = (self.runtime.handle().clone(), self.store.clone());
        let work = move || handle.block_on(write(&store, task));
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(work);
        self.writing = Some(thread.map_err(LearnerError::io("thread checkpoint"))?);
        Ok(())
    }

    /// Tells rank 0 what was written, if it was.
    pub fn tell(&mut self, crew: &Crew) -> Result<()> {
        if let Some(thread) = self.writing.take_if(|t| t.is_finished()) {
            let done = thread.join().map_err(|_| LearnerError::Lost("the checkpoint writer"))?;
            let text = serde_json::to_vec(&done.map_err(|e| e.to_string()));
            self.report = Some(text.map_err(|e| LearnerError::Setting(format!("a report of objects: {e}")))?);
        }
        if crew.collect(self.report.as_deref())?.is_some() {
            self.report = None;
        }
        Ok(())
    }
}

fn lock(checkpoints: &Mutex<Checkpoints>) -> MutexGuard<'_, Checkpoints> {
    checkpoints.lock().unwrap_or_else(PoisonError::into_inner)
}

fn sibling(out: &Path) -> PathBuf {
    let name = out.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    out.with_file_name(format!(".{name}.new"))
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(LearnerError::io(dir)(e)),
        _ => Ok(()),
    }
}

impl Ended {
    /// The `checkpoint` event, or `checkpoint_failed` with the newest step that is whole.
    pub fn event(&self, stage: &str) -> Value {
        match self {
            Self::Saved(saved) => saved.event(stage),
            Self::Failed(f) => serde_json::json!({
                "kind": "checkpoint_failed", "stage": stage, "step": f.step, "in_a_row": f.in_a_row, "newest": f.newest,
                "why": f.why.to_string(),
            }),
        }
    }
}

impl Failed {
    /// The step that there is no checkpoint of.
    pub fn step(&self) -> u64 {
        self.step
    }
}

impl Saved {
    /// Its step.
    pub fn step(&self) -> u64 {
        self.info.step
    }

    /// The `checkpoint` event: `wait_s` and `copy_s` are what training stood still for.
    pub fn event(&self, stage: &str) -> Value {
        let i = &self.info;
        serde_json::json!({
            "kind": "checkpoint", "stage": stage, "step": i.step, "path": i.path, "bytes": i.bytes, "best": i.best,
            "wait_s": self.wait.as_secs_f64(), "copy_s": self.copy.as_secs_f64(), "upload_s": self.upload.as_secs_f64(),
        })
    }
}
