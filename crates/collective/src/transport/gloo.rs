//! Ranks on CPUs, by libtorch's Gloo.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tch::{Device, Tensor};
use unveil_torch_ext::{ExtError, GlooGroup, GlooWork, Store};

use super::{Connect, Pending, Request, Transport};

pub(crate) struct Gloo(Mutex<GlooGroup>);

impl Gloo {
    /// Connects the ranks of a group; `give_up` is asked meanwhile.
    pub(crate) fn connect(
        store: &Store,
        to: &Connect<'_>,
        local: &str,
        give_up: impl FnMut() -> bool,
    ) -> Result<Self, String> {
        let prefix = format!("gloo/{}", to.name);
        let group = GlooGroup::connect(store, &prefix, to.place, local, to.limit, to.deadline, give_up);
        group.map(|g| Self(Mutex::new(g))).map_err(|e| e.to_string())
    }
}

impl Transport for Gloo {
    fn takes(&self, device: Device) -> Result<(), String> {
        if device == Device::Cpu {
            Ok(())
        } else {
            Err(format!("gloo takes tensors on the CPU, this one is on {device:?}"))
        }
    }

    fn start(&self, request: Request) -> Result<Box<dyn Pending>, String> {
        let group = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let work = match &request {
            Request::AllReduce(tensor) => group.all_reduce(tensor),
            Request::ReduceScatter(tensor) => group.reduce_scatter(tensor),
            Request::AllGather(tensor) => group.all_gather(tensor),
            Request::Broadcast(tensor, root) => group.broadcast(tensor, *root),
            Request::Barrier => group.barrier(),
        };
        Ok(Box::new(work.map_err(|e| e.to_string())?))
    }

    /// Gloo cannot be told to stop; its calls end at their limit, and the group is freed by a thread of its own.
    fn abort(&self) {}
}

impl Pending for GlooWork {
    fn poll(&mut self, limit: Duration) -> Result<bool, String> {
        self.wait(limit).map_err(|e: ExtError| e.to_string())
    }

    fn take(self: Box<Self>) -> Result<Option<Tensor>, String> {
        GlooWork::take(*self).map_err(|e| e.to_string())
    }
}
