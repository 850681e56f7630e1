//! Handles of calls in flight.

use std::sync::Arc;
use std::time::Instant;

use tch::Tensor;

use crate::failure_detector::POLL_INTERVAL;
use crate::heartbeat::Call;
use crate::shared::WorldShared;
use crate::transport::Pending;
use crate::{CollectiveError, Result};

/// A call in flight. Wait for each one: only waiting detects a failure.
#[must_use = "a call that is not waited for is not checked"]
#[derive(Debug)]
pub struct Work {
    pub(crate) call: Call,
    pub(crate) pending: Box<dyn Pending>,
    pub(crate) shared: Arc<WorldShared>,
}

impl Work {
    /// Waits for the call to complete and returns its tensor. On a GPU, work that the calling thread enqueues afterwards sees the
    /// result; the thread itself blocks too, so that failures are reported here.
    ///
    /// # Errors
    /// Returns [`CollectiveError::Fault`] if the call does not complete by the deadline, or any rank of the world has failed.
    pub fn wait(self, deadline: Instant) -> Result<Tensor> {
        let collective = self.call.record.collective.clone();
        let no_tensor = || CollectiveError::Setup(format!("{collective} returned no tensor"));
        self.complete(deadline)?.ok_or_else(no_tensor)
    }

    fn complete(mut self, deadline: Instant) -> Result<Option<Tensor>> {
        let begin = Instant::now();
        let cause = loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            match self.pending.poll(POLL_INTERVAL.min(remaining)) {
                Ok(true) => match self.pending.take() {
                    Ok(result) => return Ok(result),
                    Err(e) => return Err(self.shared.fail_call(&self.call, e)),
                },
                Ok(false) => {}
                Err(e) => break e,
            }
            if let Some(cause) = self.shared.failure_reason(&self.call) {
                break cause;
            }
            if remaining.is_zero() {
                break format!("not complete after {:.1} s", begin.elapsed().as_secs_f64());
            }
        };
        Err(self.shared.fail_call(&self.call, cause))
    }
}

/// A barrier in flight.
#[must_use = "a barrier that is not waited for does not block"]
#[derive(Debug)]
pub struct Barrier(pub(crate) Work);

impl Barrier {
    /// Waits until all ranks have reached the barrier.
    ///
    /// # Errors
    /// See [`Work::wait`].
    pub fn wait(self, deadline: Instant) -> Result<()> {
        self.0.complete(deadline).map(drop)
    }
}
