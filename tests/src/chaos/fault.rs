//! What can go wrong, drawn at random, and how each thing is done and undone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use unveil_testkit::{StoreCall, StoreFault, StoreProxy, Weather, committed};

use super::crew::{Crew, Role};

/// Something that goes wrong, for a while or at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// kill -9.
    Kill(Role),
    /// SIGSTOP, and SIGCONT after the time.
    Pause(Role, Duration),
    /// The network between a worker and the learner (0) or the reward service (1).
    Network {
        /// Which worker.
        worker: usize,
        /// Which of its links.
        link: usize,
        /// What the network does.
        weather: Weather,
        /// For how long.
        time: Duration,
    },
    /// The object store answers some requests wrongly or not at all.
    Store {
        /// How.
        fault: StoreFault,
        /// One request of so many.
        one_in: usize,
        /// For how long.
        time: Duration,
    },
    /// A bit of an object of the newest checkpoint flips, and the learner is killed.
    Damage,
    /// An object of the newest checkpoint is gone, and the learner is killed.
    Loss,
}

impl Fault {
    /// Under what its recovery is counted.
    pub fn group(&self) -> &'static str {
        match self {
            Self::Kill(Role::Learner) | Self::Damage | Self::Loss => "learner",
            Self::Kill(Role::Rollout(_)) => "rollout",
            Self::Kill(Role::Reward) => "reward",
            Self::Pause(..) => "pause",
            Self::Network { .. } => "network",
            Self::Store { .. } => "store",
        }
    }

    /// How long it lasts.
    pub fn time(&self) -> Duration {
        match self {
            Self::Pause(_, time) | Self::Network { time, .. } | Self::Store { time, .. } => *time,
            Self::Kill(_) | Self::Damage | Self::Loss => Duration::ZERO,
        }
    }

    /// The role that has to start again because of it.
    pub fn killed(&self) -> Option<Role> {
        match self {
            Self::Kill(role) => Some(*role),
            Self::Damage | Self::Loss => Some(Role::Learner),
            _ => None,
        }
    }
}

/// Draws faults: every kind once in each round, in random order, with random victims and times.
pub struct Deck {
    rng: ChaCha8Rng,
    workers: usize,
    longest: Duration,
    left: Vec<usize>,
}

/// Kinds of [`Deck::card`].
const KINDS: usize = 16;

impl Deck {
    /// A fresh deck; no fault lasts longer than `longest`.
    pub fn new(rng: ChaCha8Rng, workers: usize, longest: Duration) -> Self {
        Self { rng, workers, longest, left: Vec::new() }
    }

    /// The next fault.
    pub fn draw(&mut self) -> Fault {
        if self.left.is_empty() {
            self.left = (0..KINDS).collect();
            self.left.shuffle(&mut self.rng);
        }
        let kind = self.left.pop().unwrap_or_default();
        self.card(kind)
    }

    /// How long nothing goes wrong until the next fault.
    pub fn calm(&mut self) -> Duration {
        self.longest.mul_f64(self.rng.random_range(0.0..0.4))
    }

    fn card(&mut self, kind: usize) -> Fault {
        let rng = &mut self.rng;
        let worker = rng.random_range(0..self.workers);
        let link = rng.random_range(0..2);
        let time = self.longest.mul_f64(rng.random_range(0.2..1.0));
        let network = |weather| Fault::Network { worker, link, weather, time };
        let store = |fault, one_in| Fault::Store { fault, one_in, time };
        match kind {
            0 => Fault::Kill(Role::Rollout(worker)),
            1 => Fault::Kill(Role::Learner),
            2 => Fault::Kill(Role::Reward),
            3 => Fault::Pause(Role::Rollout(worker), time),
            4 => Fault::Pause(Role::Learner, time),
            5 => Fault::Pause(Role::Reward, time),
            6 => network(Weather::Slow { delay: Duration::from_millis(rng.random_range(20..200)), rate: 4 << 20 }),
            7 => network(Weather::Cut),
            8 => network(Weather::Silent),
            9 => store([StoreFault::Status(500, "InternalError"), StoreFault::Status(503, "SlowDown")][link], 2),
            10 => store(StoreFault::Status(403, "AccessDenied"), 3),
            11 => store(StoreFault::Status(507, "InsufficientStorage"), 1),
            12 => store(if link == 0 { StoreFault::Half } else { StoreFault::LostAnswer }, 3),
            13 => {
                let late = Duration::from_millis(rng.random_range(100..1500));
                store(if link == 0 { StoreFault::Late(late) } else { StoreFault::Silence(self.longest) }, 2)
            }
            14 => Fault::Damage,
            _ => Fault::Loss,
        }
    }
}

/// Does a fault. `place` is the folder of the run's prefix in the store; returns the object that was damaged or removed.
pub fn inflict(fault: &Fault, crew: &mut Crew<'_>, store: &StoreProxy, place: &Path) -> Option<PathBuf> {
    match fault {
        Fault::Kill(role) => crew.signal(*role, Signal::SIGKILL),
        Fault::Pause(role, _) => crew.signal(*role, Signal::SIGSTOP),
        Fault::Network { worker, link, weather, .. } => crew.links(*worker)[*link].set(*weather),
        Fault::Store { fault, one_in, .. } => {
            let (fault, one_in) = (*fault, *one_in);
            let full = matches!(fault, StoreFault::Status(507, _));
            store.fail(move |c: &StoreCall| {
                let hit = c.number.is_multiple_of(one_in) && (!full || matches!(c.method.as_str(), "PUT" | "POST"));
                hit.then_some(fault)
            });
        }
        Fault::Damage | Fault::Loss => {
            let object = newest_object(place);
            match (&object, fault) {
                (Some(path), Fault::Loss) => drop(std::fs::remove_file(path)),
                (Some(path), _) => flip(path),
                _ => {}
            }
            crew.signal(Role::Learner, Signal::SIGKILL);
            return object;
        }
    }
    None
}

/// Ends a fault that lasts.
pub fn heal(fault: &Fault, crew: &mut Crew<'_>, store: &StoreProxy) {
    match fault {
        Fault::Pause(role, _) => crew.signal(*role, Signal::SIGCONT),
        Fault::Network { worker, link, .. } => crew.links(*worker)[*link].set(Weather::Fine),
        Fault::Store { .. } => store.heal(),
        Fault::Kill(_) | Fault::Damage | Fault::Loss => {}
    }
}

/// The largest object of the newest checkpoint that is there; none where no other could take its place.
fn newest_object(place: &Path) -> Option<PathBuf> {
    let folder = |step: &u64| place.join(format!("checkpoints/step-{step}"));
    let mut steps = committed(place);
    steps.retain(|step| folder(step).is_dir());
    let newest = steps.last().filter(|_| steps.len() > 1).map(folder)?;
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

fn flip(path: &Path) {
    if let Ok(mut bytes) = std::fs::read(path) {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        drop(std::fs::write(path, bytes));
    }
}
