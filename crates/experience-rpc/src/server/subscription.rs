//! The open stream of a worker that takes part in broadcasts. Its end shows immediately that the worker has left or
//! died.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio_stream::Stream;
use tonic::Status;
use unveil_proto::v1;

use super::Shared;

/// A stream without messages that ends with the service. Dropping it, when the call or its connection ends, removes the
/// worker from the broadcast groups.
pub(super) struct Subscription {
    shared: Arc<Shared>,
    worker: String,
    /// Number of the stream; `None` if weights are not broadcast.
    stream: Option<u64>,
    stopped: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Subscription {
    /// Opens the stream of `worker` and registers the worker as a subscriber.
    pub(super) fn open(shared: &Arc<Shared>, worker: String) -> Self {
        let stream = shared.lock().broadcast_groups.as_mut().map(|groups| groups.subscribe(&worker));
        let stopped = Box::pin(shared.shutdown.clone().cancelled_owned());
        Self { shared: shared.clone(), worker, stream, stopped }
    }
}

impl Stream for Subscription {
    type Item = Result<v1::SubscribeResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.stopped.as_mut().poll(context).map(|()| None)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if let (Some(stream), Some(groups)) = (self.stream, &mut state.broadcast_groups) {
            groups.stream_closed(&self.worker, stream);
        }
    }
}
