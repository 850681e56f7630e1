//! Decode steps as recorded CUDA graphs. On a GPU the hundreds of small operations of a step cost more to launch than to run, so a step is
//! recorded once per shape and replayed with new values in the same memory.

use std::collections::HashMap;

use tch::Tensor;
use unveil_torch_ext::{CudaGraph, ExtError, GraphPool};

use crate::Result;
use crate::generation::decode_slots::StepTensors;

/// Recorded steps of one cache.
#[derive(Default, Debug)]
pub(crate) struct StepGraphs {
    steps: HashMap<i64, RecordedStep>,
    /// Memory of all recordings: steps run one after another, and their results are read in between.
    pool: GraphPool,
    /// Number of steps that were replayed.
    pub replayed: u64,
    backoff: RecordingBackoff,
}

impl StepGraphs {
    /// Replays the recorded step of this shape, if there is one.
    pub(crate) fn replay(&mut self, tokens: &Tensor, inputs: &StepTensors) -> Option<StepResult> {
        let output = self.steps.get_mut(&inputs.used)?.replay(tokens, inputs);
        self.replayed += u64::from(output.is_ok());
        Some(output)
    }

    /// Returns whether this step should be recorded.
    pub(crate) fn should_record(&mut self) -> bool {
        self.backoff.due()
    }

    /// Replaces the memory pool if it has ended with its last recording.
    pub(crate) fn refresh_pool(&mut self) {
        if self.steps.is_empty() {
            self.pool = GraphPool::default();
        }
    }

    /// Returns the memory pool of recordings.
    pub(crate) fn pool(&self) -> &GraphPool {
        &self.pool
    }

    /// Keeps a successful recording; backs off after a failed one.
    pub(crate) fn finish_recording(&mut self, tokens: Tensor, inputs: StepTensors, recording: Recording) {
        match recording {
            Ok((graph, Ok((hidden, attention)))) => {
                self.backoff.record_success();
                self.steps.insert(inputs.used, RecordedStep { graph, tokens, inputs, hidden, attention });
            }
            Ok((_, Err(e))) => self.backoff.record_failure(e.to_string(), false),
            Err(e) => {
                let permanent = matches!(e, ExtError::Unavailable { .. });
                self.backoff.record_failure(e.to_string(), permanent);
            }
        }
    }

    /// Drops all recordings, because tensors have moved.
    pub(crate) fn clear(&mut self) {
        self.steps.clear();
    }

    /// Returns why the latest recording failed. Steps run operation by operation until a recording succeeds.
    pub(crate) fn last_error(&self) -> Option<&str> {
        self.backoff.error.as_deref()
    }
}

/// Back-off after failed recordings, whose cause may be transient (another thread or process).
#[derive(Default, Debug)]
struct RecordingBackoff {
    error: Option<String>,
    failures: u32,
    /// Number of steps before the next attempt.
    wait: u64,
}

impl RecordingBackoff {
    /// Steps before the second attempt; doubled for each further one, since an attempt costs about as much as a step.
    const FIRST_WAIT: u64 = 4;
    const MAX_WAIT: u64 = 4096;

    /// Returns whether this step should be recorded.
    fn due(&mut self) -> bool {
        let due = self.wait == 0;
        self.wait = self.wait.saturating_sub(1);
        due
    }

    fn record_failure(&mut self, error: String, permanent: bool) {
        let wait = Self::FIRST_WAIT.checked_shl(self.failures).unwrap_or(Self::MAX_WAIT).min(Self::MAX_WAIT);
        self.wait = if permanent { u64::MAX } else { wait };
        self.failures += 1;
        self.error = Some(error);
    }

    fn record_success(&mut self) {
        *self = Self::default();
    }
}

/// A recorded step, with the tensors that it reads and writes.
#[derive(Debug)]
struct RecordedStep {
    graph: CudaGraph,
    tokens: Tensor,
    inputs: StepTensors,
    hidden: Tensor,
    attention: Option<Tensor>,
}

impl RecordedStep {
    fn replay(&mut self, tokens: &Tensor, inputs: &StepTensors) -> StepResult {
        self.tokens.f_copy_(tokens)?;
        self.inputs.copy_values_from(inputs)?;
        self.graph.replay()?;
        Ok((self.hidden.shallow_clone(), self.attention.as_ref().map(Tensor::shallow_clone)))
    }
}

/// Hidden states and attention rows of a step.
pub(crate) type StepResult = Result<(Tensor, Option<Tensor>)>;
/// Result of recording a step, with that of the step itself.
pub(crate) type Recording = std::result::Result<(CudaGraph, StepResult), ExtError>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_is_bounded_and_reset_by_success() {
        let mut backoff = RecordingBackoff::default();
        for _ in 0..80 {
            backoff.record_failure("x".into(), false);
            assert!(backoff.wait <= RecordingBackoff::MAX_WAIT);
        }
        backoff.record_success();
        assert!(backoff.due() && backoff.error.is_none());
        backoff.record_failure("x".into(), false);
        assert_eq!(backoff.wait, RecordingBackoff::FIRST_WAIT);
    }
}
