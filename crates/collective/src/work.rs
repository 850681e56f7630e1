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

    /// Returns the tensor as soon as work that the calling thread enqueues afterwards sees the result: on a GPU at once, because its stream
    /// waits, else when the call has completed by `deadline`. Wait for the second value before waiting for the device in another way,
    /// which has no deadline; `None` if the call has completed.
    ///
    /// # Errors
    /// See [`Work::wait`].
    pub fn join(mut self, deadline: Instant) -> Result<(Tensor, Option<Joined>)> {
        match self.pending.result_on_stream() {
            Ok(Some(tensor)) => Ok((tensor, Some(Joined(self)))),
            Ok(None) => Ok((self.wait(deadline)?, None)),
            Err(e) => Err(self.shared.fail_call(&self.call, e)),
        }
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

/// A call whose result is in use on the device, and which may still fail.
#[must_use = "a call that is not waited for is not checked"]
#[derive(Debug)]
pub struct Joined(Work);

impl Joined {
    /// Waits for the call to complete.
    ///
    /// # Errors
    /// See [`Work::wait`].
    pub fn wait(self, deadline: Instant) -> Result<()> {
        self.0.complete(deadline).map(drop)
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tch::{Device, Kind};

    use super::*;
    use crate::heartbeat::CallRecord;

    /// A call that completes, or fails, when it has been polled a number of times.
    #[derive(Debug)]
    struct FakePending {
        polls_left: u32,
        fails: bool,
        on_stream: bool,
    }

    fn ones() -> Tensor {
        Tensor::ones([2], (Kind::Float, Device::Cpu))
    }

    impl Pending for FakePending {
        fn poll(&mut self, _: Duration) -> Result<bool, String> {
            self.polls_left = self.polls_left.saturating_sub(1);
            match (self.polls_left, self.fails) {
                (0, true) => Err("the peer has left".into()),
                (left, _) => Ok(left == 0),
            }
        }

        fn result_on_stream(&mut self) -> Result<Option<Tensor>, String> {
            Ok(self.on_stream.then(ones))
        }

        fn take(self: Box<Self>) -> Result<Option<Tensor>, String> {
            assert_eq!(self.polls_left, 0, "taken before the call has completed");
            Ok(Some(ones()))
        }
    }

    fn work(pending: FakePending) -> Work {
        let record = CallRecord { sequence: 1, collective: "all_gather".into(), count: 2 };
        let call = Call { group: "world".into(), members: [0].into(), record };
        Work { call, pending: Box::new(pending), shared: Arc::new(WorldShared::new(0, None)) }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn join_waits_only_where_the_device_cannot() {
        let pending = |on_stream| FakePending { polls_left: 3, fails: false, on_stream };
        let (tensor, joined) = work(pending(true)).join(soon()).unwrap();
        assert_eq!(tensor, ones());
        joined.expect("the call has not completed").wait(soon()).unwrap();
        let (tensor, joined) = work(pending(false)).join(soon()).unwrap();
        assert!(joined.is_none() && tensor == ones());
    }

    #[test]
    fn failures_after_a_join_are_detected() {
        let pending = |on_stream| FakePending { polls_left: 2, fails: true, on_stream };
        let (_, joined) = work(pending(true)).join(soon()).unwrap();
        let e = joined.unwrap().wait(soon()).unwrap_err().to_string();
        assert!(e.contains("the peer has left"), "{e}");
        assert!(work(pending(false)).join(soon()).is_err());
        // A call that never completes ends at the deadline.
        let (_, joined) =
            work(FakePending { polls_left: u32::MAX, fails: false, on_stream: true }).join(soon()).unwrap();
        assert!(joined.unwrap().wait(Instant::now()).unwrap_err().to_string().contains("not complete"));
    }
}
