//! CPU backend: libtorch's Gloo.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tch::{Device, Tensor};
use unveil_torch_ext::{ExtError, GlooGroup, GlooWork, Store};

use super::{CollectiveRequest, ConnectOptions, Pending, Transport};

#[derive(Debug)]
pub(crate) struct Gloo(Mutex<GlooGroup>);

impl Gloo {
    /// Connects the ranks of a group; `cancelled` is polled while waiting.
    pub(crate) fn connect(
        store: &Store,
        options: &ConnectOptions<'_>,
        local_address: &str,
        cancelled: impl FnMut() -> bool,
    ) -> Result<Self, String> {
        let prefix = format!("gloo/{}", options.name);
        let place = (options.group_rank, options.ranks);
        let group =
            GlooGroup::connect(store, &prefix, place, local_address, options.timeout, options.deadline, cancelled);
        group.map(|g| Self(Mutex::new(g))).map_err(|e| e.to_string())
    }
}

impl Transport for Gloo {
    fn check_device(&self, device: Device) -> Result<(), String> {
        if device == Device::Cpu {
            Ok(())
        } else {
            Err(format!("gloo supports tensors on the CPU only; this one is on {device:?}"))
        }
    }

    fn start(&self, request: CollectiveRequest) -> Result<Box<dyn Pending>, String> {
        let group = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let work = match &request {
            CollectiveRequest::AllReduce(tensor) => group.all_reduce(tensor),
            CollectiveRequest::ReduceScatter(tensor) => group.reduce_scatter(tensor),
            CollectiveRequest::AllGather(tensor) => group.all_gather(tensor),
            CollectiveRequest::Broadcast(tensor, root) => group.broadcast(tensor, *root),
            CollectiveRequest::Barrier => group.barrier(),
        };
        Ok(Box::new(work.map_err(|e| e.to_string())?))
    }

    /// Does nothing: Gloo cannot abort calls. They end at their timeout, and a separate thread frees the group.
    fn abort(&self) {}
}

impl Pending for GlooWork {
    fn poll(&mut self, timeout: Duration) -> Result<bool, String> {
        self.wait(timeout).map_err(|e: ExtError| e.to_string())
    }

    fn take(self: Box<Self>) -> Result<Option<Tensor>, String> {
        Self::into_result(*self).map_err(|e| e.to_string())
    }
}
