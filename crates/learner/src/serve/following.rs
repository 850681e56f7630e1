//! The open call of a worker that takes part in broadcasts: how it is known at once that the worker is gone, whether it leaves or
//! dies. Must not know: rounds beyond that, weights.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio_stream::Stream;
use tonic::Status;
use unveil_proto::v1;

use super::Shared;

/// A stream without messages. It ends when the service does; dropped, because the call or its connection has ended, it takes the
/// worker off the rounds.
pub(super) struct Following {
    shared: Arc<Shared>,
    worker: String,
    /// Its number among the streams; none where weights are not broadcast.
    stream: Option<u64>,
    stopped: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Following {
    pub fn open(shared: &Arc<Shared>, worker: String) -> Self {
        let stream = shared.lock().rounds.as_mut().map(|rounds| rounds.follow(&worker));
        let stopped = Box::pin(shared.ending.clone().cancelled_owned());
        Self { shared: shared.clone(), worker, stream, stopped }
    }
}

impl Stream for Following {
    type Item = Result<v1::FollowResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.stopped.as_mut().poll(context).map(|()| None)
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if let (Some(stream), Some(rounds)) = (self.stream, &mut state.rounds) {
            rounds.ended_stream(&self.worker, stream);
        }
    }
}
