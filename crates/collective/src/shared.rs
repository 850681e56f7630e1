//! State that all groups of a world share: the transports in flight and the world's fault.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::failure_detector::FailureDetector;
use crate::heartbeat::Call;
use crate::transport::Transport;
use crate::{CollectiveError, Fault, FaultKind};

/// State shared by all groups of a world. When the last of them is dropped, this rank announces that it is leaving before it closes
/// connections, so that other ranks do not mistake an orderly shutdown for a failure.
#[derive(Debug)]
pub(crate) struct WorldShared {
    rank: usize,
    /// `None` in a world of one rank.
    detector: Option<Arc<FailureDetector>>,
    /// The fault of a world of one rank.
    solo_fault: OnceLock<Arc<Fault>>,
    transports: Mutex<Vec<Arc<dyn Transport>>>,
    aborted: AtomicBool,
}

impl WorldShared {
    pub(crate) fn new(rank: usize, detector: Option<Arc<FailureDetector>>) -> Self {
        Self {
            rank,
            detector,
            solo_fault: OnceLock::new(),
            transports: Mutex::default(),
            aborted: AtomicBool::new(false),
        }
    }

    pub(crate) fn fault(&self) -> Option<Arc<Fault>> {
        self.detector.as_ref().map_or_else(|| self.solo_fault.get().cloned(), |detector| detector.fault())
    }

    pub(crate) fn record_call(&self, call: &Call) {
        if let Some(detector) = &self.detector {
            detector.record_call(call);
        }
    }

    pub(crate) fn failure_reason(&self, call: &Call) -> Option<String> {
        self.detector.as_ref().and_then(|detector| detector.failure_reason(call))
    }

    /// Records a failed call, aborts all calls in flight, and returns the world's fault.
    pub(crate) fn fail_call(&self, call: &Call, cause: String) -> CollectiveError {
        let fault = match &self.detector {
            Some(detector) => detector.report_failure(call, cause),
            None => self.solo_fault.get_or_init(|| Arc::new(self.transport_fault(call, cause))).clone(),
        };
        self.abort();
        fault.into()
    }

    fn transport_fault(&self, call: &Call, cause: String) -> Fault {
        Fault {
            collective: call.record.collective.clone(),
            group: call.group.to_string(),
            sequence: call.record.sequence,
            ranks: Vec::new(),
            kind: FaultKind::Transport,
            found_by: self.rank,
            cause,
        }
    }

    fn abort(&self) {
        if !self.aborted.swap(true, Ordering::AcqRel) {
            let transports = self.transports.lock().unwrap_or_else(PoisonError::into_inner).clone();
            transports.iter().for_each(|transport| transport.abort());
        }
    }

    pub(crate) fn register(&self, transport: Arc<dyn Transport>) {
        self.transports.lock().unwrap_or_else(PoisonError::into_inner).push(transport);
    }
}

impl Drop for WorldShared {
    fn drop(&mut self) {
        if self.fault().is_some() {
            self.abort();
        }
        if let Some(detector) = &self.detector {
            detector.leave();
        }
    }
}
