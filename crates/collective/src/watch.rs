//! Who lives: a thread of each rank writes a sign of life to the store and reads those of all others. From them it is known, when
//! a call fails, who did not come. The first rank that finds out writes the fault to the store, and every rank takes it over.
//!
//! Rank 0 hosts the store: when it does not answer, rank 0 is the one that is gone.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use unveil_torch_ext::Store;

use crate::beat::{self, Beat, Call, Phase};
use crate::error::list;
use crate::verdict::{Seen, verdict};
use crate::{Fault, Timing, Why};

/// The key of the world's fault; rank 0 sets it to [`NO_FAULT`] before others come.
pub(crate) const FAULT: &str = "fault";
pub(crate) const NO_FAULT: &[u8] = b"none";

/// What a rank knows of the others.
pub(crate) struct Watch {
    rank: usize,
    store: Store,
    timing: Timing,
    state: Mutex<State>,
    /// The state has changed.
    changed: Condvar,
    /// The thread has something to write.
    wake: Condvar,
}

struct State {
    mine: Beat,
    peers: Vec<Peer>,
    /// When signs were exchanged last, and how often.
    exchanged: Instant,
    exchanges: u64,
    fault: Option<Arc<Fault>>,
    /// The store does not answer.
    lost: Option<String>,
    /// Something is to be written at once.
    hurry: bool,
    stop: bool,
    ended: bool,
}

struct Peer {
    beat: Beat,
    /// When a new sign came last, and how many have come.
    seen: Instant,
    signs: u64,
}

impl Watch {
    /// Begins to watch; every rank's sign of life and the fault's key are in the store already.
    pub(crate) fn start(rank: usize, ranks: usize, store: Store, timing: Timing) -> std::io::Result<Arc<Self>> {
        let now = Instant::now();
        let peer = || Peer { beat: Beat::default(), seen: now, signs: 0 };
        let state = State {
            mine: Beat::default(),
            peers: std::iter::repeat_with(peer).take(ranks).collect(),
            exchanged: now,
            exchanges: 0,
            fault: None,
            lost: None,
            hurry: false,
            stop: false,
            ended: false,
        };
        let (changed, wake) = (Condvar::new(), Condvar::new());
        let this = Arc::new(Self { rank, store, timing, state: Mutex::new(state), changed, wake });
        let runner = this.clone();
        std::thread::Builder::new().name("watch".into()).spawn(move || runner.run())?;
        Ok(this)
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let peers = self.lock().peers.len();
        let keys: Vec<String> = (0..peers).map(beat::key).chain([FAULT.to_owned()]).collect();
        loop {
            let (mine, stop) = {
                let mut state = self.lock();
                state.mine.number += 1;
                state.hurry = false;
                (state.mine.clone(), state.stop)
            };
            let read = self.exchange(&mine, &keys);
            let mut state = self.lock();
            match read {
                Ok((beats, fault)) => state.take_in(beats, fault),
                Err(e) => state.lost = Some(e),
            }
            state.ended = stop || state.lost.is_some();
            self.changed.notify_all();
            if state.ended {
                return;
            }
            if !state.hurry {
                drop(self.wake.wait_timeout_while(state, self.timing.beat, |s| !s.hurry));
            }
        }
    }

    /// Writes this rank's sign and reads all, with the fault.
    fn exchange(&self, mine: &Beat, keys: &[String]) -> Result<(Vec<Beat>, Option<Fault>), String> {
        let deadline = Instant::now() + self.timing.lost;
        let text = serde_json::to_vec(mine).map_err(|e| e.to_string())?;
        self.store.set(&beat::key(self.rank), &text, deadline).map_err(|e| e.to_string())?;
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let mut values = self.store.get_all(&keys, deadline).map_err(|e| e.to_string())?;
        let fault = values.pop().unwrap_or_default();
        let bad = |e: serde_json::Error| format!("the store holds something else than signs of life: {e}");
        let beats = values.iter().map(|v| serde_json::from_slice(v)).collect::<Result<_, _>>().map_err(bad)?;
        Ok((beats, decode(&fault).map_err(bad)?))
    }

    /// The world's fault, where there is one.
    pub(crate) fn fault(&self) -> Option<Arc<Fault>> {
        self.lock().fault.clone()
    }

    /// Notes a call that this rank makes now; it is told with the next sign of life.
    pub(crate) fn note(&self, call: &Call) {
        self.lock().mine.calls.insert(call.group.to_string(), call.made.clone());
    }

    /// Why a call cannot end, as far as is known: a fault, a store without its host, a silent rank, a member that has left.
    pub(crate) fn suspect(&self, call: &Call) -> Option<String> {
        let state = self.lock();
        if let Some(fault) = &state.fault {
            return Some(fault.cause.clone());
        }
        if let Some(lost) = &state.lost {
            return Some(lost.clone());
        }
        let ranks = |f: &dyn Fn(usize, &Peer) -> bool| -> Vec<usize> {
            let all = state.peers.iter().enumerate();
            all.filter(|(rank, peer)| *rank != self.rank && f(*rank, peer)).map(|(rank, _)| rank).collect()
        };
        // Counted from the last exchange: a store that is slow is not the others' fault.
        let silent = ranks(&|_, p| {
            p.beat.phase == Phase::Running && state.exchanged.saturating_duration_since(p.seen) > self.timing.lost
        });
        if !silent.is_empty() {
            return Some(format!("no sign of life from {} for {:?}", list(&silent), self.timing.lost));
        }
        let left =
            ranks(&|rank, p| p.beat.phase == Phase::Left && call.members.contains(&rank) && !p.beat.reached(call));
        (!left.is_empty()).then(|| format!("{} closed the world", list(&left)))
    }

    /// Finds out who did not come to a call that failed, and tells all ranks; the first finding of any rank counts.
    pub(crate) fn diagnose(&self, call: &Call, cause: String) -> Arc<Fault> {
        let (ranks, why, note) = match self.look(call) {
            Ok(fault) => return fault,
            Err(finding) => finding,
        };
        let mut fault = Fault {
            collective: call.made.collective.clone(),
            group: call.group.to_string(),
            sequence: call.made.sequence,
            ranks,
            why,
            found_by: self.rank,
            cause: match note {
                Some(note) if note != cause => format!("{cause}; {note}"),
                _ => cause,
            },
        };
        let told = serde_json::to_vec(&fault).map_err(|e| e.to_string()).and_then(|text| {
            let deadline = Instant::now() + self.timing.lost;
            self.store.swap(FAULT, NO_FAULT, &text, deadline).map_err(|e| e.to_string())
        });
        // Another rank may have been faster; where the store is gone, each rank keeps its own finding.
        if let Some(first) = told.ok().and_then(|text| decode(&text).ok().flatten()) {
            fault = first;
        }
        self.lock().close(fault, &self.changed, &self.wake)
    }

    /// Watches signs of life until it is clear who lives: the known fault, or a finding.
    fn look(&self, call: &Call) -> Result<Arc<Fault>, (Vec<usize>, Why, Option<String>)> {
        let begin = Instant::now();
        let window = self.timing.lost / 2;
        let mut state = self.lock();
        let before: Vec<u64> = state.peers.iter().map(|p| p.signs).collect();
        let exchanges = state.exchanges;
        loop {
            if let Some(fault) = &state.fault {
                return Ok(fault.clone());
            }
            // The store's own deadline is near; past it the store counts as gone.
            if state.lost.is_some() || begin.elapsed() > window + self.timing.lost * 2 {
                let running = state.peers[0].beat.phase == Phase::Running;
                return Err((vec![0], if running { Why::Silent } else { Why::Left }, state.lost.clone()));
            }
            // Signs that were written before the call failed may still come in: two new signs are not yet proof of life.
            let fresh = state
                .peers
                .iter()
                .zip(&before)
                .enumerate()
                .all(|(rank, (p, b))| rank == self.rank || p.beat.phase != Phase::Running || p.signs >= b + PROOF);
            if state.exchanges >= exchanges + PROOF && (fresh || begin.elapsed() >= window) {
                break;
            }
            let wait = self.changed.wait_timeout(state, self.timing.beat);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        let seen: Vec<_> =
            state.peers.iter().zip(&before).map(|(p, b)| Seen { beat: &p.beat, alive: p.signs >= b + PROOF }).collect();
        Err(verdict(self.rank, call, &seen))
    }

    /// Says good-bye, and waits until the others have done so too, know of the fault, or are gone; then stops the thread.
    pub(crate) fn leave(&self) {
        let end = Instant::now() + self.timing.lost;
        let mut state = self.lock();
        state.mine.phase = Phase::Left;
        state.hurry = true;
        self.wake.notify_all();
        let written = state.exchanges + 2;
        loop {
            let silent = state.fault.iter().filter(|f| f.why == Why::Silent);
            let gone: Vec<usize> = silent.flat_map(|f| f.ranks.clone()).collect();
            let settled = state.peers.iter().enumerate().all(|(rank, p)| {
                let silent = p.seen.elapsed() > self.timing.lost / 2;
                rank == self.rank || p.beat.phase != Phase::Running || gone.contains(&rank) || silent
            });
            if state.ended || (settled && state.exchanges >= written) || Instant::now() >= end {
                break;
            }
            let wait = self.changed.wait_timeout(state, self.timing.beat);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.stop = true;
        state.hurry = true;
        self.wake.notify_all();
        // A store that does not answer holds the thread; it ends by itself.
        let limit = self.timing.beat * 2;
        drop(self.changed.wait_timeout_while(state, limit, |s| !s.ended));
    }
}

fn decode(text: &[u8]) -> Result<Option<Fault>, serde_json::Error> {
    if text == NO_FAULT { Ok(None) } else { serde_json::from_slice(text).map(Some) }
}

impl State {
    fn take_in(&mut self, beats: Vec<Beat>, fault: Option<Fault>) {
        let now = Instant::now();
        self.exchanged = now;
        self.exchanges += 1;
        for (peer, beat) in self.peers.iter_mut().zip(beats) {
            if beat.number != peer.beat.number {
                peer.seen = now;
                peer.signs += 1;
            }
            peer.beat = beat;
        }
        if let Some(fault) = fault {
            self.set(fault);
        }
    }

    /// Keeps the first fault; the others are told at once that it is known here.
    fn set(&mut self, fault: Fault) -> Arc<Fault> {
        if self.mine.phase == Phase::Running {
            self.mine.phase = Phase::Told;
            self.hurry = true;
        }
        self.fault.get_or_insert_with(|| Arc::new(fault)).clone()
    }

    fn close(&mut self, fault: Fault, changed: &Condvar, wake: &Condvar) -> Arc<Fault> {
        let fault = self.set(fault);
        changed.notify_all();
        wake.notify_all();
        fault
    }
}

/// New signs of life that show that a rank lives.
const PROOF: u64 = 3;

/// Between two looks of a waiting call at what the watch knows.
pub(crate) const LOOK: Duration = Duration::from_millis(20);
