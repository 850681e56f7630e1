//! Input and result of a training stage, and the traits that connect it to the event log, the progress display and the
//! evaluation.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};
use unveil_config::Config;
use unveil_model::Vlm;
use unveil_report::{EventLog, StageProgress};
use unveil_service::CancellationToken;

use crate::dataset::Dataset;
use crate::error::{LearnerError, Result};

/// Sink of the events in `events.jsonl`, one JSON object each.
pub trait EventSink {
    /// Appends one event.
    ///
    /// # Errors
    /// Returns the I/O error if the file cannot be written.
    fn append(&mut self, event: &Value) -> std::io::Result<()>;
}

impl EventSink for EventLog {
    fn append(&mut self, event: &Value) -> std::io::Result<()> {
        Self::append(self, event)
    }
}

impl EventSink for Vec<Value> {
    fn append(&mut self, event: &Value) -> std::io::Result<()> {
        self.push(event.clone());
        Ok(())
    }
}

/// Displays the progress of a stage to the user.
pub trait Progress {
    /// Shows that step `step` is complete and that this process has processed `done` units (images or responses);
    /// `parts` are named values to show.
    fn update(&mut self, step: u64, done: u64, parts: &[(&str, f64)]);
    /// Shows a line of text.
    fn note(&mut self, text: &str);
}

impl Progress for StageProgress {
    fn update(&mut self, step: u64, done: u64, parts: &[(&str, f64)]) {
        Self::update(self, step, done, parts);
    }

    fn note(&mut self, text: &str) {
        Self::note(self, text);
    }
}

/// Displays nothing.
#[derive(Debug)]
pub struct SilentProgress;

impl Progress for SilentProgress {
    fn update(&mut self, _: u64, _: u64, _: &[(&str, f64)]) {}

    fn note(&mut self, _: &str) {}
}

/// Result of a held-out evaluation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ValidationResult {
    /// Metrics by name; they go into the `eval` event as they are.
    pub metrics: Map<String, Value>,
    /// Score that selects the best checkpoint; higher is better.
    pub score: f64,
}

/// Error of an [`Evaluator`].
pub type EvaluatorError = Box<dyn std::error::Error + Send + Sync>;

/// Evaluates the model on held-out data without changing its weights.
pub trait Evaluator {
    /// Evaluates the weights after `step` updates.
    ///
    /// # Errors
    /// Any error ends the stage, unless the stage was cancelled in the meantime.
    fn evaluate(&mut self, vlm: &mut Vlm, step: u64) -> Result<ValidationResult, EvaluatorError>;
}

impl<F> Evaluator for F
where
    F: FnMut(&mut Vlm, u64) -> Result<ValidationResult, EvaluatorError>,
{
    fn evaluate(&mut self, vlm: &mut Vlm, step: u64) -> Result<ValidationResult, EvaluatorError> {
        self(vlm, step)
    }
}

/// Input of a training stage.
pub struct Stage<'a> {
    /// Configuration of the run.
    pub config: &'a Config,
    /// Model directory that the stage starts from.
    pub model_dir: &'a Path,
    /// Output model directory; an existing one is replaced.
    pub out: &'a Path,
    /// Training records.
    pub data: Arc<Dataset>,
    /// Environment for the object store (`AWS_*`), read by the config crate.
    pub environment: Vec<(String, String)>,
    /// Stops the run when cancelled: the stage saves a checkpoint and returns.
    pub cancel: CancellationToken,
    /// Event log.
    pub events: &'a mut dyn EventSink,
    /// Progress display.
    pub progress: &'a mut dyn Progress,
    /// Held-out evaluation; `None` disables it.
    pub evaluator: Option<&'a mut dyn Evaluator>,
}

impl std::fmt::Debug for Stage<'_> {
    /// Leaves out the environment, which contains credentials.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut fields = f.debug_struct("Stage");
        fields.field("model_dir", &self.model_dir).field("out", &self.out).field("records", &self.data.len());
        fields.finish_non_exhaustive()
    }
}

impl Stage<'_> {
    /// Appends an event to the event log.
    pub(crate) fn event(&mut self, event: &Value) -> Result<()> {
        let path = Path::new(&self.config.run.dir).join("events.jsonl");
        self.events.append(event).map_err(LearnerError::io("append to", path))
    }

    /// Evaluates the model and logs the result; returns `None` if there is no evaluator or the evaluation was
    /// cancelled.
    pub(crate) fn evaluate(&mut self, name: &str, vlm: &mut Vlm, step: u64) -> Result<Option<ValidationResult>> {
        let Some(evaluator) = self.evaluator.as_mut() else { return Ok(None) };
        let started = std::time::Instant::now();
        let result = vlm.merged(|vlm| tch::no_grad(|| evaluator.evaluate(vlm, step)))?;
        let evaluation = match result {
            Ok(evaluation) => evaluation,
            Err(_) if self.cancel.is_cancelled() => return Ok(None),
            Err(source) => return Err(LearnerError::Evaluate { step, source }),
        };
        let mut event = serde_json::json!({"kind": "eval", "stage": name, "step": step});
        if let Some(map) = event.as_object_mut() {
            map.extend(evaluation.metrics.clone());
            map.insert("score".into(), evaluation.score.into());
            map.insert("eval_s".into(), started.elapsed().as_secs_f64().into());
        }
        self.event(&event)?;
        Ok(Some(evaluation))
    }
}

/// Result of a stage.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// Whether the stage was cancelled; a checkpoint of `step` has been saved, and the exit code should be 130.
    pub interrupted: bool,
    /// Number of updates.
    pub step: u64,
    /// Step whose weights are in [`Stage::out`]; `None` after an interrupt.
    pub exported: Option<u64>,
    /// Last evaluation.
    pub last: Option<ValidationResult>,
    /// Number of skipped updates.
    pub skipped: u64,
}
