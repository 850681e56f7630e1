//! The world: all ranks after the rendezvous, and the groups they are split into.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::failure_detector::FailureDetector;
use crate::heartbeat::{Call, CallRecord};
use crate::shared::WorldShared;
use crate::transport::{ConnectOptions, Gloo, Nccl, Solo, Transport};
use crate::{Backend, CollectiveError, Fault, Group, Result, Setup};

/// All ranks of a run. Dropping the world and its groups waits until the other ranks have done so too, for up to
/// [`crate::Timeouts::heartbeat`].
#[derive(Debug)]
pub struct World {
    all: Group,
    connector: GroupConnector,
    splits: AtomicU64,
}

/// Connects the groups of a world.
#[derive(Debug)]
struct GroupConnector {
    setup: Setup,
    local_address: String,
    shared: Arc<WorldShared>,
    detector: Option<Arc<FailureDetector>>,
}

/// Two groupings of a world, where rank = replica x shards + shard.
#[derive(Debug)]
pub struct Mesh {
    /// The ranks of this rank's replica; the group rank is the shard.
    pub shards: Group,
    /// The ranks with the same shard in all replicas; the group rank is the replica.
    pub replicas: Group,
}

impl World {
    /// Connects all ranks; other ranks reach this one at `local_address`.
    pub(crate) fn connect(
        setup: Setup,
        local_address: String,
        detector: Option<Arc<FailureDetector>>,
        deadline: Instant,
    ) -> Result<Self> {
        let shared = Arc::new(WorldShared::new(setup.rank, detector.clone()));
        let connector = GroupConnector { setup, local_address, shared, detector };
        let all = connector.connect_group("world".into(), (0..connector.setup.world).collect(), deadline)?;
        Ok(Self { all, connector, splits: AtomicU64::new(0) })
    }

    /// Returns this rank.
    pub fn rank(&self) -> usize {
        self.connector.setup.rank
    }

    /// Returns the number of ranks.
    pub fn size(&self) -> usize {
        self.connector.setup.world
    }

    /// Drops the world on a separate thread, since dropping waits for the other ranks.
    pub fn leave(self) {
        // If the thread cannot be spawned, the world is dropped on this one.
        let _thread = std::thread::Builder::new().name("leave".into()).spawn(move || drop(self));
    }

    /// Returns the group of all ranks.
    pub fn group(&self) -> &Group {
        &self.all
    }

    /// Returns the world's fault, if one is known; training code can check it between calls.
    pub fn fault(&self) -> Option<Arc<Fault>> {
        self.connector.shared.fault()
    }

    /// Splits the world into groups of ranks with equal colour, ordered by rank, and returns this rank's group. All ranks call this
    /// in the same order with the same colours. `label` names the group in messages.
    ///
    /// # Errors
    /// Returns [`CollectiveError::Fault`] if a rank does not connect in time, or the world has failed.
    pub fn split(&self, label: &str, colour: impl Fn(usize) -> usize) -> Result<Group> {
        let number = self.splits.fetch_add(1, Ordering::Relaxed);
        let own_colour = colour(self.rank());
        let members: Vec<usize> = (0..self.size()).filter(|rank| colour(*rank) == own_colour).collect();
        let deadline = Instant::now() + self.connector.setup.timeouts.rendezvous;
        self.connector.connect_group(format!("{label}.{number}.{own_colour}"), members, deadline)
    }

    /// Splits the world into `replicas` replicas of `shards` shards each. All ranks call this.
    ///
    /// # Errors
    /// Returns [`CollectiveError::Mesh`] if the world has another number of ranks; see also [`World::split`].
    pub fn mesh(&self, replicas: usize, shards: usize) -> Result<Mesh> {
        if replicas.checked_mul(shards) != Some(self.size()) {
            return Err(CollectiveError::Mesh { replicas, shards, world: self.size() });
        }
        let shard_group = self.split("shards", |rank| rank / shards)?;
        let replica_group = self.split("replicas", |rank| rank % shards)?;
        Ok(Mesh { shards: shard_group, replicas: replica_group })
    }
}

impl GroupConnector {
    fn connect_group(&self, name: String, members: Vec<usize>, deadline: Instant) -> Result<Group> {
        if let Some(fault) = self.shared.fault() {
            return Err(fault.into());
        }
        let rank = self.setup.rank;
        let group_rank = members.iter().filter(|member| **member < rank).count();
        let record = CallRecord { sequence: 0, collective: "connect".into(), count: 0 };
        let call = Call { group: name.into(), members: members.into(), record };
        self.shared.record_call(&call);
        let transport = self.connect_transport(&call, group_rank, deadline).map_err(|e| {
            let cause = self.shared.failure_reason(&call).unwrap_or(e);
            self.shared.fail_call(&call, cause)
        })?;
        self.shared.register(transport.clone());
        Ok(Group {
            name: call.group,
            members: call.members,
            group_rank,
            transport,
            shared: self.shared.clone(),
            timeout: self.setup.timeouts.call,
            calls: AtomicU64::new(0),
        })
    }

    fn connect_transport(
        &self,
        call: &Call,
        group_rank: usize,
        deadline: Instant,
    ) -> Result<Arc<dyn Transport>, String> {
        let ranks = call.members.len();
        let timeout = self.setup.timeouts.call;
        let options = ConnectOptions { name: &call.group, group_rank, ranks, timeout, deadline };
        let store = self.detector.as_ref().map(|detector| detector.store());
        match (self.setup.backend, store) {
            (Backend::Nccl { device }, _) => {
                let detector = self.detector.clone();
                let call = call.clone();
                let cancelled = Box::new(move || detector.as_ref().is_some_and(|d| d.failure_reason(&call).is_some()));
                Ok(Arc::new(Nccl::connect(store, &options, device, cancelled)?))
            }
            (Backend::Gloo, Some(store)) if ranks > 1 => {
                let cancelled = || self.shared.failure_reason(call).is_some();
                Ok(Arc::new(Gloo::connect(store, &options, &self.local_address, cancelled)?))
            }
            _ => Ok(Arc::new(Solo)),
        }
    }
}
