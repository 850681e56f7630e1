//! What a backend does; checks, order, deadlines and failures are the group's.

mod gloo;
mod nccl;
mod solo;

pub(crate) use gloo::Gloo;
pub(crate) use nccl::{Nccl, library};
pub(crate) use solo::Solo;

use std::time::{Duration, Instant};

use tch::{Device, Tensor};

/// A group to be connected.
pub(crate) struct Connect<'a> {
    /// The group's name, the same on all of its ranks and of no other group.
    pub(crate) name: &'a str,
    /// This rank's place in the group, and how many ranks it has.
    pub(crate) place: (usize, usize),
    /// The longest that a call may take.
    pub(crate) limit: Duration,
    /// By when all ranks must be connected.
    pub(crate) deadline: Instant,
}

/// One call; tensors are flat, contiguous, not empty, on a device that the transport takes, and sizes divide.
pub(crate) enum Request {
    AllReduce(Tensor),
    ReduceScatter(Tensor),
    AllGather(Tensor),
    Broadcast(Tensor, usize),
    Barrier,
}

/// Connections among the ranks of one group.
pub(crate) trait Transport: Send + Sync {
    /// Whether tensors of this device can be taken; else what is needed.
    fn takes(&self, device: Device) -> Result<(), String>;

    /// Starts a call.
    fn start(&self, request: Request) -> Result<Box<dyn Pending>, String>;

    /// Ends calls in flight, as far as the backend can; no call comes after it.
    fn abort(&self);
}

/// A call in flight.
pub(crate) trait Pending: Send {
    /// Waits up to `limit`; whether the call has ended.
    fn poll(&mut self, limit: Duration) -> Result<bool, String>;

    /// The result of a call that has ended; none for a barrier.
    fn take(self: Box<Self>) -> Result<Option<Tensor>, String>;
}
