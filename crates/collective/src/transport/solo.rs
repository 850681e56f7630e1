//! Backend of a group with one rank: every sum has one term.

use std::time::Duration;

use tch::{Device, Tensor};

use super::{CollectiveRequest, Pending, Transport};

#[derive(Debug)]
pub(crate) struct Solo;

/// Copies a tensor into new memory.
fn copy(tensor: &Tensor) -> Result<Tensor, String> {
    tch::no_grad(|| tensor.f_to_dtype(tensor.kind(), false, true)).map_err(|e| e.to_string())
}

#[derive(Debug)]
struct CompletedWork(Option<Tensor>);

impl Transport for Solo {
    fn check_device(&self, _: Device) -> Result<(), String> {
        Ok(())
    }

    fn start(&self, request: CollectiveRequest) -> Result<Box<dyn Pending>, String> {
        let result = match request {
            CollectiveRequest::AllReduce(tensor) | CollectiveRequest::Broadcast(tensor, _) => Some(tensor),
            // These calls return new memory, as with several ranks.
            CollectiveRequest::ReduceScatter(tensor) | CollectiveRequest::AllGather(tensor) => Some(copy(&tensor)?),
            CollectiveRequest::Barrier => None,
        };
        Ok(Box::new(CompletedWork(result)))
    }

    fn abort(&self) {}
}

impl Pending for CompletedWork {
    fn poll(&mut self, _: Duration) -> Result<bool, String> {
        Ok(true)
    }

    fn take(self: Box<Self>) -> Result<Option<Tensor>, String> {
        Ok(self.0)
    }
}
