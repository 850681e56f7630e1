//! All ranks that came together, and how they are split into groups.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use crate::beat::{Call, Made};
use crate::transport::{Connect, Gloo, Nccl, Solo, Transport};
use crate::watch::Watch;
use crate::{Backend, CollectiveError, Fault, Group, Result, Setup, Why};

/// What all groups of a world share. When the last of them goes, this rank says good-bye to the others, and connections are closed
/// after that: nobody mistakes an orderly end for a failure.
pub(crate) struct Ties {
    rank: usize,
    /// None in a world of one.
    watch: Option<Arc<Watch>>,
    alone: OnceLock<Arc<Fault>>,
    transports: Mutex<Vec<Arc<dyn Transport>>>,
    aborted: AtomicBool,
}

impl Ties {
    pub(crate) fn new(rank: usize, watch: Option<Arc<Watch>>) -> Self {
        Self { rank, watch, alone: OnceLock::new(), transports: Mutex::default(), aborted: AtomicBool::new(false) }
    }

    pub(crate) fn fault(&self) -> Option<Arc<Fault>> {
        self.watch.as_ref().map_or_else(|| self.alone.get().cloned(), |watch| watch.fault())
    }

    pub(crate) fn note(&self, call: &Call) {
        if let Some(watch) = &self.watch {
            watch.note(call);
        }
    }

    pub(crate) fn suspect(&self, call: &Call) -> Option<String> {
        self.watch.as_ref().and_then(|watch| watch.suspect(call))
    }

    /// The world's fault after a call that failed; ends all calls in flight.
    pub(crate) fn fail(&self, call: &Call, cause: String) -> CollectiveError {
        let fault = match &self.watch {
            Some(watch) => watch.diagnose(call, cause),
            None => self.alone.get_or_init(|| Arc::new(self.own_fault(call, cause))).clone(),
        };
        self.abort();
        fault.into()
    }

    fn own_fault(&self, call: &Call, cause: String) -> Fault {
        Fault {
            collective: call.made.collective.clone(),
            group: call.group.to_string(),
            sequence: call.made.sequence,
            ranks: Vec::new(),
            why: Why::Transport,
            found_by: self.rank,
            cause,
        }
    }

    fn abort(&self) {
        if !self.aborted.swap(true, Ordering::AcqRel) {
            let all = self.transports.lock().unwrap_or_else(PoisonError::into_inner).clone();
            all.iter().for_each(|transport| transport.abort());
        }
    }

    fn keep(&self, transport: Arc<dyn Transport>) {
        self.transports.lock().unwrap_or_else(PoisonError::into_inner).push(transport);
    }
}

impl Drop for Ties {
    fn drop(&mut self) {
        if self.fault().is_some() {
            self.abort();
        }
        if let Some(watch) = &self.watch {
            watch.leave();
        }
    }
}

/// All ranks. Dropping it and its groups waits until the others have done so too, up to [`crate::Timing::lost`].
pub struct World {
    all: Group,
    base: Base,
    splits: AtomicU64,
}

/// What is needed to connect a group.
struct Base {
    setup: Setup,
    local: String,
    ties: Arc<Ties>,
    watch: Option<Arc<Watch>>,
}

/// Two ways to group a world: rank = replica x shards + shard.
pub struct Mesh {
    /// The shards of this rank's replica; this rank's place in it is its shard.
    pub shards: Group,
    /// The same shard of all replicas; this rank's place in it is its replica.
    pub replicas: Group,
}

impl World {
    /// Connects all ranks; `local` is the address by which the others reach this one.
    pub(crate) fn connect(setup: Setup, local: String, watch: Option<Arc<Watch>>, deadline: Instant) -> Result<Self> {
        let ties = Arc::new(Ties::new(setup.rank, watch.clone()));
        let base = Base { setup, local, ties, watch };
        let all = base.group("world".into(), (0..base.setup.world).collect(), deadline)?;
        Ok(Self { all, base, splits: AtomicU64::new(0) })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.base.setup.rank
    }

    /// Ranks in all.
    pub fn size(&self) -> usize {
        self.base.setup.world
    }

    /// Drops the world on a thread of its own, since that waits for the others.
    pub fn part(self) {
        // Without the thread it is dropped here.
        let _left = std::thread::Builder::new().name("leave".into()).spawn(move || drop(self));
    }

    /// The group of all ranks.
    pub fn group(&self) -> &Group {
        &self.all
    }

    /// The world's fault, where one is known: training code can look for it between calls.
    pub fn fault(&self) -> Option<Arc<Fault>> {
        self.base.ties.fault()
    }

    /// Splits the world into groups of equal colour, each in the order of ranks; gives this rank's group. All ranks call this in
    /// the same order with the same colours. `label` is for messages.
    ///
    /// # Errors
    /// A rank does not come, or the world has a fault.
    pub fn split(&self, label: &str, colour: impl Fn(usize) -> usize) -> Result<Group> {
        let number = self.splits.fetch_add(1, Ordering::Relaxed);
        let own = colour(self.rank());
        let members: Vec<usize> = (0..self.size()).filter(|rank| colour(*rank) == own).collect();
        let deadline = Instant::now() + self.base.setup.timing.join;
        self.base.group(format!("{label}.{number}.{own}"), members, deadline)
    }

    /// Splits the world into `replicas` replicas of `shards` shards each. All ranks call this.
    ///
    /// # Errors
    /// The world has another number of ranks; or as [`World::split`].
    pub fn mesh(&self, replicas: usize, shards: usize) -> Result<Mesh> {
        if replicas.checked_mul(shards) != Some(self.size()) {
            return Err(CollectiveError::Mesh { replicas, shards, world: self.size() });
        }
        let inner = self.split("shards", |rank| rank / shards)?;
        let outer = self.split("replicas", |rank| rank % shards)?;
        Ok(Mesh { shards: inner, replicas: outer })
    }
}

impl Base {
    fn group(&self, name: String, members: Vec<usize>, deadline: Instant) -> Result<Group> {
        if let Some(fault) = self.ties.fault() {
            return Err(fault.into());
        }
        let Setup { rank, timing, .. } = self.setup;
        let place = members.iter().filter(|member| **member < rank).count();
        let made = Made { sequence: 0, collective: "connect".into(), count: 0 };
        let call = Call { group: name.into(), members: members.into(), made };
        self.ties.note(&call);
        let transport = self.transport(&call, place, deadline).map_err(|e| {
            let cause = self.ties.suspect(&call).unwrap_or(e);
            self.ties.fail(&call, cause)
        })?;
        self.ties.keep(transport.clone());
        let Call { group: name, members, .. } = call;
        let ties = self.ties.clone();
        Ok(Group { name, members, place, transport, ties, limit: timing.call, calls: AtomicU64::new(0) })
    }

    fn transport(&self, call: &Call, place: usize, deadline: Instant) -> Result<Arc<dyn Transport>, String> {
        let place = (place, call.members.len());
        let to = Connect { name: &call.group, place, limit: self.setup.timing.call, deadline };
        let store = self.watch.as_ref().map(|watch| watch.store());
        match (self.setup.backend, store) {
            (Backend::Nccl { device }, _) => {
                let (watch, call) = (self.watch.clone(), call.clone());
                let give_up = Box::new(move || watch.as_ref().is_some_and(|w| w.suspect(&call).is_some()));
                Ok(Arc::new(Nccl::connect(store, &to, device, give_up)?))
            }
            (Backend::Gloo, Some(store)) if place.1 > 1 => {
                let give_up = || self.ties.suspect(call).is_some();
                Ok(Arc::new(Gloo::connect(store, &to, &self.local, give_up)?))
            }
            _ => Ok(Arc::new(Solo)),
        }
    }
}
