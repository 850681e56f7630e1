//! A call in flight.

use std::sync::Arc;
use std::time::Instant;

use tch::Tensor;

use crate::beat::Call;
use crate::transport::Pending;
use crate::watch::LOOK;
use crate::world::Ties;
use crate::{CollectiveError, Result};

/// A call in flight. Wait for each one: what is not waited for is not checked.
#[must_use = "a call that is not waited for is not checked"]
pub struct Work {
    pub(crate) call: Call,
    pub(crate) pending: Box<dyn Pending>,
    pub(crate) ties: Arc<Ties>,
}

impl Work {
    /// Waits for the call to end and gives its tensor. On a GPU, what the calling thread computes from here on sees the result;
    /// the thread itself waits too, so that a failure is known here.
    ///
    /// # Errors
    /// [`CollectiveError::Fault`] when the call does not end by the deadline, or a rank is gone, anywhere in the world.
    pub fn wait(self, deadline: Instant) -> Result<Tensor> {
        let call = self.call.made.collective.clone();
        let none = || CollectiveError::Setup(format!("{call} gave no tensor"));
        self.end(deadline)?.ok_or_else(none)
    }

    fn end(mut self, deadline: Instant) -> Result<Option<Tensor>> {
        let begin = Instant::now();
        let cause = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.pending.poll(LOOK.min(left)) {
                Ok(true) => match self.pending.take() {
                    Ok(result) => return Ok(result),
                    Err(e) => return Err(self.ties.fail(&self.call, e)),
                },
                Ok(false) => {}
                Err(e) => break e,
            }
            if let Some(cause) = self.ties.suspect(&self.call) {
                break cause;
            }
            if left.is_zero() {
                break format!("not ended after {:.1} s of waiting", begin.elapsed().as_secs_f64());
            }
        };
        Err(self.ties.fail(&self.call, cause))
    }
}

/// A barrier in flight.
#[must_use = "a barrier that is not waited for holds nobody"]
pub struct Barrier(pub(crate) Work);

impl Barrier {
    /// Waits until all ranks have come.
    ///
    /// # Errors
    /// As [`Work::wait`].
    pub fn wait(self, deadline: Instant) -> Result<()> {
        self.0.end(deadline).map(drop)
    }
}
