//! The interface of a backend. Validation, ordering, deadlines and failure handling belong to the group.

mod gloo;
mod nccl;
mod solo;

pub(crate) use gloo::Gloo;
pub(crate) use nccl::{Nccl, load_library};
pub(crate) use solo::Solo;

use std::fmt::Debug;
use std::time::{Duration, Instant};

use tch::{Device, Tensor};

/// Parameters of a group to connect.
pub(crate) struct ConnectOptions<'a> {
    /// The group's name: the same on all of its ranks, and unique in the world.
    pub(crate) name: &'a str,
    /// This rank's number in the group.
    pub(crate) group_rank: usize,
    /// Number of ranks in the group.
    pub(crate) ranks: usize,
    /// The backend's timeout of a call.
    pub(crate) timeout: Duration,
    /// Time by which all ranks must be connected.
    pub(crate) deadline: Instant,
}

/// A validated call: tensors are flat, contiguous, not empty, on a supported device, and divide evenly where required.
pub(crate) enum CollectiveRequest {
    AllReduce(Tensor),
    ReduceScatter(Tensor),
    AllGather(Tensor),
    /// The tensor and the root's rank in the group.
    Broadcast(Tensor, usize),
    Barrier,
}

/// The connections among the ranks of a group.
pub(crate) trait Transport: Debug + Send + Sync {
    /// Checks that tensors on this device are supported; the error says which device is required.
    fn check_device(&self, device: Device) -> Result<(), String>;

    /// Starts a call without blocking.
    fn start(&self, request: CollectiveRequest) -> Result<Box<dyn Pending>, String>;

    /// Ends calls in flight, as far as the backend can. No further call is made.
    fn abort(&self);
}

/// A backend's handle of a call in flight.
pub(crate) trait Pending: Debug + Send {
    /// Waits up to `timeout` and returns whether the call has completed.
    fn poll(&mut self, timeout: Duration) -> Result<bool, String>;

    /// Returns the result before the call has completed, if work that the calling thread enqueues afterwards waits for it on the device;
    /// `None` if the host has to wait.
    fn result_on_stream(&mut self) -> Result<Option<Tensor>, String> {
        Ok(None)
    }

    /// Returns the result of a completed call; `None` for a barrier.
    fn take(self: Box<Self>) -> Result<Option<Tensor>, String>;
}
