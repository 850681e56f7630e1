//! Calls among the ranks of one group: what is checked before a call starts, and the order of calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use crate::beat::{Call, Made};
use crate::transport::{Request, Transport};
use crate::world::Ties;
use crate::{Barrier, CollectiveError, Result, Work};

/// Calls that all ranks of a group make in the same order.
///
/// Tensors are flat, contiguous and not empty, fp32, fp64, bf16 or int64, on the backend's device; all ranks give as many elements.
/// Calls start at once; do not touch a tensor before its call has ended. In-place calls give back the tensor they were given.
/// Sums over Gloo are made in fp32 for bf16 and rounded once; NCCL rounds after every rank.
pub trait Collective {
    /// This rank's place in the group, from 0.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn world_size(&self) -> usize;

    /// The longest that a call may take; the blocking calls wait so long.
    fn limit(&self) -> Duration;

    /// Starts to sum a tensor over all ranks, in place.
    ///
    /// # Errors
    /// The tensor does not fit, or the world has a fault.
    fn start_all_reduce(&self, tensor: Tensor) -> Result<Work>;

    /// Starts to sum over all ranks; rank r gets part r of the sum, as a new tensor.
    ///
    /// # Errors
    /// The elements do not divide over the ranks, the tensor does not fit, or the world has a fault.
    fn start_reduce_scatter(&self, tensor: Tensor) -> Result<Work>;

    /// Starts to put the tensors of all ranks one after another, as a new tensor.
    ///
    /// # Errors
    /// The tensor does not fit, or the world has a fault.
    fn start_all_gather(&self, tensor: Tensor) -> Result<Work>;

    /// Starts to copy the tensor of rank `root` of the group to all, in place.
    ///
    /// # Errors
    /// There is no such rank, the tensor does not fit, or the world has a fault.
    fn start_broadcast(&self, tensor: Tensor, root: usize) -> Result<Work>;

    /// Starts to wait for all ranks.
    ///
    /// # Errors
    /// The world has a fault.
    fn start_barrier(&self) -> Result<Barrier>;

    /// [`Collective::start_all_reduce`] and its end.
    ///
    /// # Errors
    /// As there, and as [`Work::wait`].
    fn all_reduce(&self, tensor: Tensor) -> Result<Tensor> {
        self.start_all_reduce(tensor)?.wait(Instant::now() + self.limit())
    }

    /// [`Collective::start_reduce_scatter`] and its end.
    ///
    /// # Errors
    /// As there, and as [`Work::wait`].
    fn reduce_scatter(&self, tensor: Tensor) -> Result<Tensor> {
        self.start_reduce_scatter(tensor)?.wait(Instant::now() + self.limit())
    }

    /// [`Collective::start_all_gather`] and its end.
    ///
    /// # Errors
    /// As there, and as [`Work::wait`].
    fn all_gather(&self, tensor: Tensor) -> Result<Tensor> {
        self.start_all_gather(tensor)?.wait(Instant::now() + self.limit())
    }

    /// [`Collective::start_broadcast`] and its end.
    ///
    /// # Errors
    /// As there, and as [`Work::wait`].
    fn broadcast(&self, tensor: Tensor, root: usize) -> Result<Tensor> {
        self.start_broadcast(tensor, root)?.wait(Instant::now() + self.limit())
    }

    /// [`Collective::start_barrier`] and its end.
    ///
    /// # Errors
    /// As there, and as [`Work::wait`].
    fn barrier(&self) -> Result<()> {
        self.start_barrier()?.wait(Instant::now() + self.limit())
    }
}

/// Some ranks of the world, or all of them.
pub struct Group {
    pub(crate) name: Arc<str>,
    /// Ranks of the world.
    pub(crate) members: Arc<[usize]>,
    pub(crate) place: usize,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) ties: Arc<Ties>,
    pub(crate) limit: Duration,
    pub(crate) calls: AtomicU64,
}

impl Group {
    /// The group's name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The group's ranks as ranks of the world, in the group's order.
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    fn fits(&self, call: &'static str, tensor: &Tensor) -> Result<()> {
        let wrong = |message: String| CollectiveError::Tensor { call, message };
        let (kind, shape) = (tensor.kind(), tensor.size());
        if !matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Int64) {
            return Err(wrong(format!("a tensor of {kind:?} cannot be used; use Float, Double, BFloat16 or Int64")));
        }
        if shape.len() != 1 || tensor.numel() == 0 || !tensor.is_contiguous() {
            return Err(wrong(format!(
                "a tensor of shape {shape:?} cannot be used; it must be flat, contiguous, not empty"
            )));
        }
        self.transport.takes(tensor.device()).map_err(wrong)
    }

    fn start(&self, collective: &'static str, count: usize, request: Request) -> Result<Work> {
        if let Some(fault) = self.ties.fault() {
            return Err(fault.into());
        }
        let sequence = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        let made = Made { sequence, collective: collective.into(), count };
        let call = Call { group: self.name.clone(), members: self.members.clone(), made };
        self.ties.note(&call);
        match self.transport.start(request) {
            Ok(pending) => Ok(Work { call, pending, ties: self.ties.clone() }),
            Err(e) => Err(self.ties.fail(&call, e)),
        }
    }
}

impl Collective for Group {
    fn rank(&self) -> usize {
        self.place
    }

    fn world_size(&self) -> usize {
        self.members.len()
    }

    fn limit(&self) -> Duration {
        self.limit
    }

    fn start_all_reduce(&self, tensor: Tensor) -> Result<Work> {
        const CALL: &str = "all_reduce";
        self.fits(CALL, &tensor)?;
        self.start(CALL, tensor.numel(), Request::AllReduce(tensor))
    }

    fn start_reduce_scatter(&self, tensor: Tensor) -> Result<Work> {
        const CALL: &str = "reduce_scatter";
        self.fits(CALL, &tensor)?;
        let (count, ranks) = (tensor.numel(), self.world_size());
        if count % ranks != 0 {
            return Err(CollectiveError::Divide { call: CALL, count, ranks });
        }
        self.start(CALL, count, Request::ReduceScatter(tensor))
    }

    fn start_all_gather(&self, tensor: Tensor) -> Result<Work> {
        const CALL: &str = "all_gather";
        self.fits(CALL, &tensor)?;
        self.start(CALL, tensor.numel(), Request::AllGather(tensor))
    }

    fn start_broadcast(&self, tensor: Tensor, root: usize) -> Result<Work> {
        const CALL: &str = "broadcast";
        let ranks = self.world_size();
        if root >= ranks {
            return Err(CollectiveError::Rank { call: CALL, rank: root, ranks });
        }
        self.fits(CALL, &tensor)?;
        self.start(CALL, tensor.numel(), Request::Broadcast(tensor, root))
    }

    fn start_barrier(&self) -> Result<Barrier> {
        self.start("barrier", 0, Request::Barrier).map(Barrier)
    }
}
