//! Faults of the soak: their random choice, injection and end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use unveil_testkit::{NetworkCondition, StoreCall, StoreFault, StoreProxy, committed_steps};

use super::role_supervisor::{Role, RoleSupervisor};

/// A fault, lasting or instantaneous.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// kill -9.
    Kill(Role),
    /// SIGSTOP, and SIGCONT after a time.
    Pause(Role, Duration),
    /// A condition of the network between a worker and the learner (link 0) or the reward service (link 1).
    Network {
        /// Number of the worker.
        worker: usize,
        /// Number of its link.
        link: usize,
        /// Condition of the network.
        condition: NetworkCondition,
        /// Duration.
        time: Duration,
    },
    /// The object store answers some requests incorrectly or not at all.
    Store {
        /// Fault of the store.
        fault: StoreFault,
        /// Fraction of affected requests: one in this many.
        one_in: usize,
        /// Duration.
        time: Duration,
    },
    /// A bit of an object of the newest checkpoint flips, and the learner is killed.
    Damage,
    /// An object of the newest checkpoint is removed, and the learner is killed.
    Loss,
}

impl Fault {
    /// Returns the kind under which its recovery is reported.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Kill(Role::Learner) | Self::Damage | Self::Loss => "learner",
            Self::Kill(Role::Rollout(_)) => "rollout",
            Self::Kill(Role::Reward) => "reward",
            Self::Pause(..) => "pause",
            Self::Network { .. } => "network",
            Self::Store { .. } => "store",
        }
    }

    /// Returns how long it lasts.
    pub(super) fn duration(&self) -> Duration {
        match self {
            Self::Pause(_, time) | Self::Network { time, .. } | Self::Store { time, .. } => *time,
            Self::Kill(_) | Self::Damage | Self::Loss => Duration::ZERO,
        }
    }

    /// Returns the role that it kills.
    pub(super) fn killed(&self) -> Option<Role> {
        match self {
            Self::Kill(role) => Some(*role),
            Self::Damage | Self::Loss => Some(Role::Learner),
            _ => None,
        }
    }
}

/// Deck of faults: every kind once per round, in random order, with random victims and durations.
pub(super) struct FaultDeck {
    rng: ChaCha8Rng,
    workers: usize,
    max_duration: Duration,
    remaining: Vec<usize>,
}

/// Number of kinds in [`FaultDeck::fault_of_kind`].
const KINDS: usize = 16;

impl FaultDeck {
    /// Creates a deck; no fault lasts longer than `max_duration`.
    pub(super) fn new(rng: ChaCha8Rng, workers: usize, max_duration: Duration) -> Self {
        Self { rng, workers, max_duration, remaining: Vec::new() }
    }

    /// Draws the next fault.
    pub(super) fn draw(&mut self) -> Fault {
        if self.remaining.is_empty() {
            self.remaining = (0..KINDS).collect();
            self.remaining.shuffle(&mut self.rng);
        }
        let kind = self.remaining.pop().unwrap_or_default();
        self.fault_of_kind(kind)
    }

    /// Draws the pause before the next fault.
    pub(super) fn pause(&mut self) -> Duration {
        self.max_duration.mul_f64(self.rng.random_range(0.0..0.4))
    }

    fn fault_of_kind(&mut self, kind: usize) -> Fault {
        let rng = &mut self.rng;
        let worker = rng.random_range(0..self.workers);
        let link = rng.random_range(0..2);
        let time = self.max_duration.mul_f64(rng.random_range(0.2..1.0));
        let network = |condition| Fault::Network { worker, link, condition, time };
        let store = |fault, one_in| Fault::Store { fault, one_in, time };
        match kind {
            0 => Fault::Kill(Role::Rollout(worker)),
            1 => Fault::Kill(Role::Learner),
            2 => Fault::Kill(Role::Reward),
            3 => Fault::Pause(Role::Rollout(worker), time),
            4 => Fault::Pause(Role::Learner, time),
            5 => Fault::Pause(Role::Reward, time),
            6 => network(NetworkCondition::Slow {
                delay: Duration::from_millis(rng.random_range(20..200)),
                rate: 4 << 20,
            }),
            7 => network(NetworkCondition::Cut),
            8 => network(NetworkCondition::Silent),
            9 => store([StoreFault::Status(500, "InternalError"), StoreFault::Status(503, "SlowDown")][link], 2),
            10 => store(StoreFault::Status(403, "AccessDenied"), 3),
            11 => store(StoreFault::Status(507, "InsufficientStorage"), 1),
            12 => store(if link == 0 { StoreFault::TruncatedAnswer } else { StoreFault::LostAnswer }, 3),
            13 => {
                let delay = Duration::from_millis(rng.random_range(100..1500));
                store(if link == 0 { StoreFault::Delay(delay) } else { StoreFault::Silence(self.max_duration) }, 2)
            }
            14 => Fault::Damage,
            _ => Fault::Loss,
        }
    }
}

/// Begins a fault. `objects` is the directory of the run's objects in the store. Returns the object that was damaged or removed.
pub(super) fn begin_fault(
    fault: &Fault,
    roles: &mut RoleSupervisor<'_>,
    store: &StoreProxy,
    objects: &Path,
) -> Option<PathBuf> {
    match fault {
        Fault::Kill(role) => roles.signal(*role, Signal::SIGKILL),
        Fault::Pause(role, _) => roles.signal(*role, Signal::SIGSTOP),
        Fault::Network { worker, link, condition, .. } => roles.links(*worker)[*link].set(*condition),
        Fault::Store { fault, one_in, .. } => {
            let fault = *fault;
            let one_in = *one_in;
            let writes_only = matches!(fault, StoreFault::Status(507, _));
            store.inject_faults(move |c: &StoreCall| {
                let hit =
                    c.number.is_multiple_of(one_in) && (!writes_only || matches!(c.method.as_str(), "PUT" | "POST"));
                hit.then_some(fault)
            });
        }
        Fault::Damage | Fault::Loss => {
            let object = newest_object(objects);
            match (&object, fault) {
                (Some(path), Fault::Loss) => drop(std::fs::remove_file(path)),
                (Some(path), _) => flip_bit(path),
                _ => {}
            }
            roles.signal(Role::Learner, Signal::SIGKILL);
            return object;
        }
    }
    None
}

/// Ends a lasting fault.
pub(super) fn end_fault(fault: &Fault, roles: &mut RoleSupervisor<'_>, store: &StoreProxy) {
    match fault {
        Fault::Pause(role, _) => roles.signal(*role, Signal::SIGCONT),
        Fault::Network { worker, link, .. } => roles.links(*worker)[*link].set(NetworkCondition::Normal),
        Fault::Store { .. } => store.clear_faults(),
        Fault::Kill(_) | Fault::Damage | Fault::Loss => {}
    }
}

/// Returns the largest object of the newest checkpoint; `None` unless there is another checkpoint to fall back to.
fn newest_object(objects: &Path) -> Option<PathBuf> {
    let step_dir = |step: &u64| objects.join(format!("checkpoints/step-{step}"));
    let mut steps = committed_steps(objects);
    steps.retain(|step| step_dir(step).is_dir());
    let newest = steps.last().filter(|_| steps.len() > 1).map(step_dir)?;
    let mut todo = vec![newest];
    let mut largest: Option<(u64, PathBuf)> = None;
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).ok()?.flatten() {
            match entry.metadata().ok()? {
                m if m.is_dir() => todo.push(entry.path()),
                m => largest = largest.max(Some((m.len(), entry.path()))),
            }
        }
    }
    largest.map(|(_, path)| path)
}

fn flip_bit(path: &Path) {
    if let Ok(mut bytes) = std::fs::read(path) {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        drop(std::fs::write(path, bytes));
    }
}
