//! Groups of ranks: validates calls before they start, and numbers them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use crate::heartbeat::{Call, CallRecord};
use crate::shared::WorldShared;
use crate::transport::{CollectiveRequest, Transport};
use crate::{Barrier, CollectiveError, Result, Work};

/// Collective calls, which all ranks of a group make in the same order.
///
/// Tensors are flat, contiguous and not empty, fp32, fp64, bf16 or int64, on the backend's device, with the same number of elements
/// on all ranks. The `start_*` methods do not block; do not use a tensor before its call has completed. In-place calls return the
/// tensor that they were given. Gloo sums bf16 in fp32 and rounds once; NCCL rounds after every rank.
pub trait Collective {
    /// Returns this rank's number in the group, from 0.
    fn rank(&self) -> usize;

    /// Returns the number of ranks in the group.
    fn world_size(&self) -> usize;

    /// Returns the timeout of the blocking calls, which is also the backend's timeout of every call.
    fn timeout(&self) -> Duration;

    /// Starts an all-reduce: sums a tensor over all ranks, in place.
    ///
    /// # Errors
    /// Returns [`CollectiveError::Tensor`] for an unsupported tensor, and [`CollectiveError::Fault`] if the world has failed.
    fn start_all_reduce(&self, tensor: Tensor) -> Result<Work>;

    /// Starts a reduce-scatter: sums over all ranks, and returns shard r of the sum to rank r as a new tensor.
    ///
    /// # Errors
    /// Returns [`CollectiveError::Indivisible`] if the elements do not divide evenly over the ranks; see also
    /// [`Collective::start_all_reduce`].
    fn start_reduce_scatter(&self, tensor: Tensor) -> Result<Work>;

    /// Starts an all-gather: concatenates the tensors of all ranks into a new tensor.
    ///
    /// # Errors
    /// See [`Collective::start_all_reduce`].
    fn start_all_gather(&self, tensor: Tensor) -> Result<Work>;

    /// Starts a broadcast: copies the tensor of group rank `root` to all ranks, in place.
    ///
    /// # Errors
    /// Returns [`CollectiveError::Rank`] if the group has no such rank; see also [`Collective::start_all_reduce`].
    fn start_broadcast(&self, tensor: Tensor, root: usize) -> Result<Work>;

    /// Starts a barrier, which completes when all ranks have reached it.
    ///
    /// # Errors
    /// Returns [`CollectiveError::Fault`] if the world has failed.
    fn start_barrier(&self) -> Result<Barrier>;

    /// Sums a tensor over all ranks, in place, and waits for the result.
    ///
    /// # Errors
    /// See [`Collective::start_all_reduce`] and [`Work::wait`].
    fn all_reduce(&self, tensor: Tensor) -> Result<Tensor> {
        self.start_all_reduce(tensor)?.wait(Instant::now() + self.timeout())
    }

    /// Sums over all ranks and waits for this rank's shard of the sum, a new tensor.
    ///
    /// # Errors
    /// See [`Collective::start_reduce_scatter`] and [`Work::wait`].
    fn reduce_scatter(&self, tensor: Tensor) -> Result<Tensor> {
        self.start_reduce_scatter(tensor)?.wait(Instant::now() + self.timeout())
    }

    /// Concatenates the tensors of all ranks into a new tensor, and waits for it.
    ///
    /// # Errors
    /// See [`Collective::start_all_gather`] and [`Work::wait`].
    fn all_gather(&self, tensor: Tensor) -> Result<Tensor> {
        self.start_all_gather(tensor)?.wait(Instant::now() + self.timeout())
    }

    /// Copies the tensor of group rank `root` to all ranks, in place, and waits for it.
    ///
    /// # Errors
    /// See [`Collective::start_broadcast`] and [`Work::wait`].
    fn broadcast(&self, tensor: Tensor, root: usize) -> Result<Tensor> {
        self.start_broadcast(tensor, root)?.wait(Instant::now() + self.timeout())
    }

    /// Waits until all ranks have reached the barrier.
    ///
    /// # Errors
    /// See [`Collective::start_barrier`] and [`Work::wait`].
    fn barrier(&self) -> Result<()> {
        self.start_barrier()?.wait(Instant::now() + self.timeout())
    }
}

/// A group of some or all ranks of the world.
#[derive(Debug)]
pub struct Group {
    pub(crate) name: Arc<str>,
    /// World ranks, in the group's order.
    pub(crate) members: Arc<[usize]>,
    pub(crate) group_rank: usize,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) shared: Arc<WorldShared>,
    pub(crate) timeout: Duration,
    pub(crate) calls: AtomicU64,
}

impl Group {
    /// Returns the group's name, as messages show it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the world ranks of the group's members, in the group's order.
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    fn check_tensor(&self, call: &'static str, tensor: &Tensor) -> Result<()> {
        let error = |message: String| CollectiveError::Tensor { call, message };
        let kind = tensor.kind();
        let shape = tensor.size();
        if !matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Int64) {
            return Err(error(format!(
                "a tensor of dtype {kind:?} is not supported; use Float, Double, BFloat16 or Int64"
            )));
        }
        if shape.len() != 1 || tensor.numel() == 0 || !tensor.is_contiguous() {
            return Err(error(format!(
                "a tensor of shape {shape:?} is not supported; it must be flat, contiguous and not empty"
            )));
        }
        self.transport.check_device(tensor.device()).map_err(error)
    }

    fn start(&self, collective: &'static str, count: usize, request: CollectiveRequest) -> Result<Work> {
        if let Some(fault) = self.shared.fault() {
            return Err(fault.into());
        }
        let sequence = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        let record = CallRecord { sequence, collective: collective.into(), count };
        let call = Call { group: self.name.clone(), members: self.members.clone(), record };
        self.shared.record_call(&call);
        match self.transport.start(request) {
            Ok(pending) => Ok(Work { call, pending, shared: self.shared.clone() }),
            Err(e) => Err(self.shared.fail_call(&call, e)),
        }
    }
}

impl Collective for Group {
    fn rank(&self) -> usize {
        self.group_rank
    }

    fn world_size(&self) -> usize {
        self.members.len()
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn start_all_reduce(&self, tensor: Tensor) -> Result<Work> {
        const CALL: &str = "all_reduce";
        self.check_tensor(CALL, &tensor)?;
        self.start(CALL, tensor.numel(), CollectiveRequest::AllReduce(tensor))
    }

    fn start_reduce_scatter(&self, tensor: Tensor) -> Result<Work> {
        const CALL: &str = "reduce_scatter";
        self.check_tensor(CALL, &tensor)?;
        let count = tensor.numel();
        let ranks = self.world_size();
        if !count.is_multiple_of(ranks) {
            return Err(CollectiveError::Indivisible { call: CALL, count, ranks });
        }
        self.start(CALL, count, CollectiveRequest::ReduceScatter(tensor))
    }

    fn start_all_gather(&self, tensor: Tensor) -> Result<Work> {
        const CALL: &str = "all_gather";
        self.check_tensor(CALL, &tensor)?;
        self.start(CALL, tensor.numel(), CollectiveRequest::AllGather(tensor))
    }

    fn start_broadcast(&self, tensor: Tensor, root: usize) -> Result<Work> {
        const CALL: &str = "broadcast";
        let ranks = self.world_size();
        if root >= ranks {
            return Err(CollectiveError::Rank { call: CALL, rank: root, ranks });
        }
        self.check_tensor(CALL, &tensor)?;
        self.start(CALL, tensor.numel(), CollectiveRequest::Broadcast(tensor, root))
    }

    fn start_barrier(&self) -> Result<Barrier> {
        self.start("barrier", 0, CollectiveRequest::Barrier).map(Barrier)
    }
}
