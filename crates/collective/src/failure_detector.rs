//! Failure detection: a thread of each rank publishes heartbeats to the store and reads those of all other ranks.
//!
//! When a call fails, the heartbeats show which ranks did not make it. The first rank that detects a failure writes the fault to the
//! store, and every rank adopts it. Rank 0 hosts the store: if the store does not respond, rank 0 has failed.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use unveil_torch_ext::Store;

use crate::diagnose::{Diagnosis, Observation, diagnose};
use crate::error::list;
use crate::heartbeat::{self, Call, Heartbeat, Phase};
use crate::{Fault, FaultKind, Timeouts};

/// Store key of the world's fault; rank 0 sets it to [`NO_FAULT`] before other ranks join.
pub(crate) const FAULT_KEY: &str = "fault";
pub(crate) const NO_FAULT: &[u8] = b"none";

/// Interval at which a waiting call checks for failures.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Heartbeats after a failure that show that a rank is alive. One or two may have been written before the failure.
const MIN_FRESH_HEARTBEATS: u64 = 3;

/// Publishes this rank's heartbeats and tracks those of the other ranks.
#[derive(Debug)]
pub(crate) struct FailureDetector {
    rank: usize,
    store: Store,
    timeouts: Timeouts,
    state: Mutex<DetectorState>,
    /// Signalled when the state has changed.
    changed: Condvar,
    /// Signalled when the thread must publish immediately.
    wake: Condvar,
}

#[derive(Debug)]
struct DetectorState {
    own_heartbeat: Heartbeat,
    /// By rank; this rank's entry included.
    peers: Vec<Peer>,
    last_exchange: Instant,
    exchanges: u64,
    fault: Option<Arc<Fault>>,
    /// Why the store does not respond.
    store_error: Option<String>,
    /// The heartbeat must be published without waiting for the interval.
    publish_now: bool,
    stop: bool,
    stopped: bool,
}

#[derive(Debug)]
struct Peer {
    heartbeat: Heartbeat,
    /// Time at which the newest heartbeat was received.
    last_seen: Instant,
    /// Number of heartbeats received.
    received: u64,
}

impl FailureDetector {
    /// Starts the thread; every rank's first heartbeat and the fault's key are already in the store.
    pub(crate) fn start(rank: usize, ranks: usize, store: Store, timeouts: Timeouts) -> std::io::Result<Arc<Self>> {
        let now = Instant::now();
        let peer = || Peer { heartbeat: Heartbeat::default(), last_seen: now, received: 0 };
        let state = DetectorState {
            own_heartbeat: Heartbeat::default(),
            peers: std::iter::repeat_with(peer).take(ranks).collect(),
            last_exchange: now,
            exchanges: 0,
            fault: None,
            store_error: None,
            publish_now: false,
            stop: false,
            stopped: false,
        };
        let detector = Arc::new(Self {
            rank,
            store,
            timeouts,
            state: Mutex::new(state),
            changed: Condvar::new(),
            wake: Condvar::new(),
        });
        let runner = detector.clone();
        std::thread::Builder::new().name("heartbeat".into()).spawn(move || runner.run())?;
        Ok(detector)
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    fn lock(&self) -> MutexGuard<'_, DetectorState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let peers = self.lock().peers.len();
        let keys: Vec<String> = (0..peers).map(heartbeat::key).chain([FAULT_KEY.to_owned()]).collect();
        loop {
            let (heartbeat, stop) = {
                let mut state = self.lock();
                state.own_heartbeat.number += 1;
                state.publish_now = false;
                (state.own_heartbeat.clone(), state.stop)
            };
            let exchanged = self.exchange(&heartbeat, &keys);
            let mut state = self.lock();
            match exchanged {
                Ok((heartbeats, fault)) => state.update(heartbeats, fault),
                Err(e) => state.store_error = Some(e),
            }
            state.stopped = stop || state.store_error.is_some();
            self.changed.notify_all();
            if state.stopped {
                return;
            }
            if !state.publish_now {
                let interval = self.timeouts.heartbeat_interval;
                drop(self.wake.wait_timeout_while(state, interval, |s| !s.publish_now));
            }
        }
    }

    /// Publishes this rank's heartbeat, and reads those of all ranks and the fault.
    fn exchange(&self, heartbeat: &Heartbeat, keys: &[String]) -> Result<(Vec<Heartbeat>, Option<Fault>), String> {
        let deadline = Instant::now() + self.timeouts.heartbeat;
        let text = serde_json::to_vec(heartbeat).map_err(|e| e.to_string())?;
        self.store.set(&heartbeat::key(self.rank), &text, deadline).map_err(|e| e.to_string())?;
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let mut values = self.store.get_all(&keys, deadline).map_err(|e| e.to_string())?;
        let fault = values.pop().unwrap_or_default();
        let invalid = |e: serde_json::Error| format!("cannot decode a heartbeat or fault in the store: {e}");
        let heartbeats = values.iter().map(|v| serde_json::from_slice(v)).collect::<Result<_, _>>().map_err(invalid)?;
        Ok((heartbeats, decode_fault(&fault).map_err(invalid)?))
    }

    /// Returns the world's fault, if there is one.
    pub(crate) fn fault(&self) -> Option<Arc<Fault>> {
        self.lock().fault.clone()
    }

    /// Records a call that this rank is making; the next heartbeat publishes it.
    pub(crate) fn record_call(&self, call: &Call) {
        self.lock().own_heartbeat.calls.insert(call.group.to_string(), call.record.clone());
    }

    /// Returns why a call cannot complete, if known: a fault, a store that does not respond, a silent rank, or a member that left.
    pub(crate) fn failure_reason(&self, call: &Call) -> Option<String> {
        let state = self.lock();
        if let Some(fault) = &state.fault {
            return Some(fault.cause.clone());
        }
        if let Some(error) = &state.store_error {
            return Some(error.clone());
        }
        let other_ranks_where = |condition: &dyn Fn(usize, &Peer) -> bool| -> Vec<usize> {
            let peers = state.peers.iter().enumerate();
            peers.filter(|(rank, peer)| *rank != self.rank && condition(*rank, peer)).map(|(rank, _)| rank).collect()
        };
        // Measured up to the last exchange: a slow store must not make other ranks look silent.
        let silent = other_ranks_where(&|_, peer| {
            let silence = state.last_exchange.saturating_duration_since(peer.last_seen);
            peer.heartbeat.phase == Phase::Running && silence > self.timeouts.heartbeat
        });
        if !silent.is_empty() {
            return Some(format!("no heartbeat from {} for {:?}", list(&silent), self.timeouts.heartbeat));
        }
        let left = other_ranks_where(&|rank, peer| {
            peer.heartbeat.phase == Phase::Left && call.members.contains(&rank) && !peer.heartbeat.reached(call)
        });
        (!left.is_empty()).then(|| format!("{} closed the world", list(&left)))
    }

    /// Determines why a call failed and publishes the fault; the first fault that any rank publishes counts for all.
    pub(crate) fn report_failure(&self, call: &Call, cause: String) -> Arc<Fault> {
        let (ranks, kind, detail) = match self.observe(call) {
            Ok(fault) => return fault,
            Err(diagnosis) => diagnosis,
        };
        let mut fault = Fault {
            collective: call.record.collective.clone(),
            group: call.group.to_string(),
            sequence: call.record.sequence,
            ranks,
            kind,
            found_by: self.rank,
            cause: match detail {
                Some(detail) if detail != cause => format!("{cause}; {detail}"),
                _ => cause,
            },
        };
        let published = serde_json::to_vec(&fault).map_err(|e| e.to_string()).and_then(|text| {
            let deadline = Instant::now() + self.timeouts.heartbeat;
            self.store.compare_set(FAULT_KEY, NO_FAULT, &text, deadline).map_err(|e| e.to_string())
        });
        // Another rank may have been faster; if the store has failed, each rank keeps its own fault.
        if let Some(first) = published.ok().and_then(|text| decode_fault(&text).ok().flatten()) {
            fault = first;
        }
        let fault = self.lock().adopt_fault(fault);
        self.changed.notify_all();
        self.wake.notify_all();
        fault
    }

    /// Observes heartbeats until it is clear which ranks are alive. Returns a fault that is already known, else a diagnosis.
    fn observe(&self, call: &Call) -> Result<Arc<Fault>, Diagnosis> {
        let begin = Instant::now();
        let window = self.timeouts.heartbeat / 2;
        let mut state = self.lock();
        let received_before: Vec<u64> = state.peers.iter().map(|p| p.received).collect();
        let exchanges_before = state.exchanges;
        loop {
            if let Some(fault) = &state.fault {
                return Ok(fault.clone());
            }
            // Store calls time out earlier than this; beyond it the store counts as failed.
            if state.store_error.is_some() || begin.elapsed() > window + self.timeouts.heartbeat * 2 {
                let running = state.peers[0].heartbeat.phase == Phase::Running;
                let kind = if running { FaultKind::Silent } else { FaultKind::Left };
                return Err((vec![0], kind, state.store_error.clone()));
            }
            let all_fresh = state.peers.iter().zip(&received_before).enumerate().all(|(rank, (peer, before))| {
                rank == self.rank
                    || peer.heartbeat.phase != Phase::Running
                    || peer.received >= before + MIN_FRESH_HEARTBEATS
            });
            let enough_exchanges = state.exchanges >= exchanges_before + MIN_FRESH_HEARTBEATS;
            if enough_exchanges && (all_fresh || begin.elapsed() >= window) {
                break;
            }
            let wait = self.changed.wait_timeout(state, self.timeouts.heartbeat_interval);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        let observations: Vec<_> = state
            .peers
            .iter()
            .zip(&received_before)
            .map(|(peer, before)| Observation {
                heartbeat: &peer.heartbeat,
                alive: peer.received >= before + MIN_FRESH_HEARTBEATS,
            })
            .collect();
        Err(diagnose(self.rank, call, &observations))
    }

    /// Announces that this rank is leaving, waits until every other rank has left, adopted the fault or failed, and stops the thread.
    pub(crate) fn leave(&self) {
        let deadline = Instant::now() + self.timeouts.heartbeat;
        let mut state = self.lock();
        state.own_heartbeat.phase = Phase::Left;
        state.publish_now = true;
        self.wake.notify_all();
        // The first of these exchanges may have begun before the phase was set.
        let published = state.exchanges + 2;
        loop {
            let silence_fault = state.fault.iter().filter(|f| f.kind == FaultKind::Silent);
            let failed: Vec<usize> = silence_fault.flat_map(|f| f.ranks.clone()).collect();
            let settled = state.peers.iter().enumerate().all(|(rank, peer)| {
                let silent = peer.last_seen.elapsed() > self.timeouts.heartbeat / 2;
                rank == self.rank || peer.heartbeat.phase != Phase::Running || failed.contains(&rank) || silent
            });
            if state.stopped || (settled && state.exchanges >= published) || Instant::now() >= deadline {
                break;
            }
            let wait = self.changed.wait_timeout(state, self.timeouts.heartbeat_interval);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.stop = true;
        state.publish_now = true;
        self.wake.notify_all();
        // A store that does not respond blocks the thread; it ends by itself.
        let limit = self.timeouts.heartbeat_interval * 2;
        drop(self.changed.wait_timeout_while(state, limit, |s| !s.stopped));
    }
}

fn decode_fault(text: &[u8]) -> Result<Option<Fault>, serde_json::Error> {
    if text == NO_FAULT { Ok(None) } else { serde_json::from_slice(text).map(Some) }
}

impl DetectorState {
    fn update(&mut self, heartbeats: Vec<Heartbeat>, fault: Option<Fault>) {
        let now = Instant::now();
        self.last_exchange = now;
        self.exchanges += 1;
        for (peer, heartbeat) in self.peers.iter_mut().zip(heartbeats) {
            if heartbeat.number != peer.heartbeat.number {
                peer.last_seen = now;
                peer.received += 1;
            }
            peer.heartbeat = heartbeat;
        }
        if let Some(fault) = fault {
            self.adopt_fault(fault);
        }
    }

    /// Keeps the first fault, and publishes immediately that this rank has read it.
    fn adopt_fault(&mut self, fault: Fault) -> Arc<Fault> {
        if self.own_heartbeat.phase == Phase::Running {
            self.own_heartbeat.phase = Phase::FaultKnown;
            self.publish_now = true;
        }
        self.fault.get_or_insert_with(|| Arc::new(fault)).clone()
    }
}
