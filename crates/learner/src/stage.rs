//! What a training stage is given and gives back: configuration, data, and the traits through which it speaks to the event log,
//! the terminal and the evaluation.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};
use tch::{Device, Kind};
use unveil_config::Config;
use unveil_model::Vlm;
use unveil_report::{EventLog, StageProgress};
use unveil_service::CancellationToken;

use crate::dataset::Dataset;
use crate::error::{LearnerError, Result};

/// Takes events, one JSON object each, for `events.jsonl`.
pub trait EventSink {
    /// Appends one event.
    ///
    /// # Errors
    /// The file cannot be written.
    fn append(&mut self, event: &Value) -> std::io::Result<()>;
}

impl EventSink for EventLog {
    fn append(&mut self, event: &Value) -> std::io::Result<()> {
        EventLog::append(self, event)
    }
}

impl EventSink for Vec<Value> {
    fn append(&mut self, event: &Value) -> std::io::Result<()> {
        self.push(event.clone());
        Ok(())
    }
}

/// Shows a person how a stage goes.
pub trait Progress {
    /// Step `step` is done, `done` units (images, responses) were processed by this process so far, `parts` are numbers to show.
    fn update(&mut self, step: u64, done: u64, parts: &[(&str, f64)]);
    /// A line worth reading.
    fn note(&mut self, text: &str);
}

impl Progress for StageProgress {
    fn update(&mut self, step: u64, done: u64, parts: &[(&str, f64)]) {
        StageProgress::update(self, step, done, parts);
    }

    fn note(&mut self, text: &str) {
        StageProgress::note(self, text);
    }
}

/// Shows nothing.
pub struct Silent;

impl Progress for Silent {
    fn update(&mut self, _: u64, _: u64, _: &[(&str, f64)]) {}

    fn note(&mut self, _: &str) {}
}

/// Result of a held-out evaluation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Evaluation {
    /// Metrics by name; they go into the `eval` event as they are.
    pub metrics: Map<String, Value>,
    /// What the best checkpoint is chosen by; higher is better.
    pub score: f64,
}

/// Evaluates the model on held-out data. Must leave the weights as they are.
pub trait Evaluator {
    /// Evaluates the weights after `step` updates.
    ///
    /// # Errors
    /// Any; the stage ends with it, unless it was cancelled meanwhile.
    fn evaluate(&mut self, vlm: &mut Vlm, step: u64) -> Result<Evaluation, Box<dyn std::error::Error + Send + Sync>>;
}

impl<F> Evaluator for F
where
    F: FnMut(&mut Vlm, u64) -> Result<Evaluation, Box<dyn std::error::Error + Send + Sync>>,
{
    fn evaluate(&mut self, vlm: &mut Vlm, step: u64) -> Result<Evaluation, Box<dyn std::error::Error + Send + Sync>> {
        self(vlm, step)
    }
}

/// What a stage works with.
pub struct Stage<'a> {
    /// The whole configuration.
    pub config: &'a Config,
    /// Model directory that the stage starts from.
    pub model_dir: &'a Path,
    /// Where the resulting model directory is written; what was there is replaced.
    pub out: &'a Path,
    /// Training records.
    pub data: Arc<Dataset>,
    /// Environment for the object store (`AWS_*`), read by the configuration room.
    pub environment: Vec<(String, String)>,
    /// Cancelled when the run is to stop: the stage saves a checkpoint and returns.
    pub cancel: CancellationToken,
    /// The event log.
    pub events: &'a mut dyn EventSink,
    /// The terminal.
    pub progress: &'a mut dyn Progress,
    /// Held-out evaluation; none = no evaluation.
    pub evaluator: Option<&'a mut dyn Evaluator>,
}

impl Stage<'_> {
    pub(crate) fn event(&mut self, event: &Value) -> Result<()> {
        let path = Path::new(&self.config.run.dir).join("events.jsonl");
        self.events.append(event).map_err(LearnerError::io(path))
    }

    /// Evaluates and logs; `None` when there is no evaluator, or the evaluation was cancelled.
    pub(crate) fn evaluate(&mut self, name: &str, vlm: &mut Vlm, step: u64) -> Result<Option<Evaluation>> {
        let Some(evaluator) = self.evaluator.as_mut() else { return Ok(None) };
        let started = std::time::Instant::now();
        let result = vlm.merged(|vlm| tch::no_grad(|| evaluator.evaluate(vlm, step)))?;
        let found = match result {
            Ok(e) => e,
            Err(_) if self.cancel.is_cancelled() => return Ok(None),
            Err(source) => return Err(LearnerError::Evaluate { step, source }),
        };
        let mut event = serde_json::json!({"kind": "eval", "stage": name, "step": step});
        if let Some(map) = event.as_object_mut() {
            map.extend(found.metrics.clone());
            map.insert("score".into(), found.score.into());
            map.insert("eval_s".into(), started.elapsed().as_secs_f64().into());
        }
        self.event(&event)?;
        Ok(Some(found))
    }
}

/// How a stage ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// It was cancelled; a checkpoint of `step` is saved and the exit code should be 130.
    pub interrupted: bool,
    /// Updates done.
    pub step: u64,
    /// Step whose weights are in [`Stage::out`]; none after an interrupt.
    pub exported: Option<u64>,
    /// The last evaluation.
    pub last: Option<Evaluation>,
    /// Steps that were skipped.
    pub skipped: u64,
}

/// Loads the model of a stage in `kind`, and sets the number of threads and whether results must be the same again.
pub(crate) fn load_model_as(config: &Config, threads: usize, dir: &Path, kind: Kind, device: Device) -> Result<Vlm> {
    unveil_torch_ext::set_deterministic(config.run.deterministic)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if threads == 0 { cores } else { threads };
    tch::set_num_threads(threads as i32);
    Ok(Vlm::load(dir, device, kind)?)
}
