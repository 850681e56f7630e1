//! The worker's side of the experience service: calls with retry.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};
use unveil_core::Secret;
use unveil_proto::v1;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_proto::v1::release_request::Cause;
use unveil_service::{
    Backoff, ClientOptions, ServiceError, authorised, carry, connect_with, limited, retry, with_deadline,
};

use crate::hand::{Hand, Progress};
use crate::ready::Ready;
use crate::{Result, RolloutError};

/// How long an answer may come late, beyond the time that the service may wait.
const LATE: Duration = Duration::from_secs(10);

/// An answer, or why the service does not trust the weights that this worker holds.
pub(crate) type Trusted<T> = Result<T, Distrust>;

/// Why the service does not trust weights.
#[derive(Debug)]
pub(crate) enum Distrust {
    /// It has not sent them: they are of a learner that was there before it.
    Foreign(String),
    /// They are not as it sent them.
    Damaged(String),
}

/// A client; cheap to clone, clones share the connection.
#[derive(Clone)]
pub(crate) struct Experience {
    inner: ExperienceClient<Channel>,
    pub address: String,
    worker: String,
    token: Option<Arc<Secret>>,
    patience: Duration,
}

impl Experience {
    /// Connects, trying until `patience` is over.
    pub async fn connect(address: &str, worker: &str, options: &ClientOptions, patience: Duration) -> Result<Self> {
        let channel = connect_with(address, options, patience).await.map_err(|e| failed(address, e))?;
        let inner = limited!(ExperienceClient::new(channel));
        let token = options.token.clone().map(Arc::new);
        Ok(Self { inner, address: address.to_owned(), worker: worker.to_owned(), token, patience })
    }

    fn request<T>(&self, message: T, deadline: Duration) -> Result<Request<T>, Status> {
        authorised(with_deadline(message, deadline), self.token.as_deref())
    }

    async fn call<T, F, Fut>(&self, what: &str, call: F) -> Result<T>
    where
        F: FnMut(Duration) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        retry(what, self.patience, Backoff::default(), call).await.map_err(|e| failed(&self.address, e))
    }

    /// Groups to generate, as call `call` of `hand`; waits up to `wait` on the server. `ready` hears whether the service answers: who
    /// holds weights and is answered can do its work.
    pub async fn lease(
        &self,
        (hand, call): (&Hand, u64),
        max_groups: usize,
        wait: Duration,
        weights: Option<v1::HeldWeights>,
        ready: &Ready,
    ) -> Result<Trusted<v1::LeaseResponse>> {
        let request = v1::LeaseRequest {
            worker: self.worker.clone(),
            max_groups: max_groups as u32,
            wait_ms: wait.as_millis() as u32,
            weights,
            session: hand.session,
            call,
        };
        let answer = self.call("lease", |_| {
            // A peer that vanished without a word must not be waited for.
            let (mut client, request) = (self.inner.clone(), self.request(request.clone(), wait + LATE));
            async move {
                let answer = client.lease(request?).await;
                match (&answer, weights) {
                    (Ok(_), Some(_)) => ready.learner(true),
                    (Ok(_), None) => {}
                    (Err(_), _) => ready.learner(false),
                }
                answer
            }
        });
        trusted(answer.await)
    }

    /// Tells what is in hand, once: the next heartbeat follows soon. None where it did not arrive.
    pub async fn heartbeat(&self, hand: &Hand, within: Duration) -> Option<v1::HeartbeatResponse> {
        let (done, in_hand) = hand.told();
        let request = v1::HeartbeatRequest { worker: self.worker.clone(), session: hand.session, done, in_hand };
        let mut client = self.inner.clone();
        let call = async { client.heartbeat(self.request(request, within)?).await };
        match tokio::time::timeout(within, call).await {
            Ok(Ok(answer)) => Some(answer.into_inner()),
            _ => {
                tracing::debug!("a heartbeat did not arrive at {}", self.address);
                None
            }
        }
    }

    /// Fetches the image of a lease that has `bytes` bytes; none when the lease is lost. A stream that breaks off is asked for again
    /// while some of it arrives within the patience.
    pub async fn image(&self, lease: &str, bytes: u64, progress: &Progress) -> Result<Option<Bytes>> {
        let (mut backoff, mut since) = (Backoff::default(), Instant::now());
        loop {
            let request = v1::ImageRequest { worker: self.worker.clone(), lease: lease.to_owned() };
            let mut image = BytesMut::new();
            let what = match self.image_once(request, &mut image, bytes, progress).await {
                Ok(()) if image.len() as u64 == bytes => return Ok(Some(image.freeze())),
                Ok(()) => {
                    let what =
                        format!("announced an image of {bytes} bytes for lease `{lease}` and sent {}", image.len());
                    return Err(RolloutError::Protocol { address: self.address.clone(), what });
                }
                Err(status) if status.code() == Code::NotFound => return Ok(None),
                Err(status) => status,
            };
            if !image.is_empty() {
                (backoff, since) = (Backoff::default(), Instant::now());
            }
            if since.elapsed() >= self.patience || permanent(what.code()) {
                let what = ServiceError::Call { what: format!("image of lease `{lease}`"), status: Box::new(what) };
                return Err(failed(&self.address, what));
            }
            tracing::warn!("the image of lease `{lease}` is asked for again: {}", what.message());
            tokio::time::sleep(backoff.draw()).await;
        }
    }

    async fn image_once(
        &self,
        request: v1::ImageRequest,
        image: &mut BytesMut,
        most: u64,
        progress: &Progress,
    ) -> Result<(), Status> {
        let mut client = self.inner.clone();
        let mut stream = client.image(self.request(request, LATE)?).await?.into_inner();
        let stands = |_| Status::unavailable(format!("it stood still for {:.0} s", self.patience.as_secs_f64()));
        while let Some(part) = tokio::time::timeout(self.patience, stream.message()).await.map_err(stands)?? {
            image.extend_from_slice(&part.data);
            progress.step();
            if image.len() as u64 > most {
                break;
            }
        }
        Ok(())
    }

    /// Hands a whole group in; where it is refused, the answer says why. The current span goes on in the service.
    pub async fn submit(
        &self,
        mut request: v1::SubmitRequest,
    ) -> Result<Trusted<(v1::submit_response::Verdict, String)>> {
        request.worker.clone_from(&self.worker);
        let answer = self.call("submit", |left| {
            let (mut client, request) = (self.inner.clone(), self.request(request.clone(), left));
            async move { client.submit(carry(request?, &tracing::Span::current())).await }
        });
        Ok(trusted(answer.await)?.map(|answer| (answer.verdict(), answer.why)))
    }

    /// Opens a stream of what is newer than `holds`; waits up to `wait` on the server.
    /// `joins` says how the worker can take them by broadcast.
    pub async fn weights(
        &self,
        holds: Option<v1::HeldWeights>,
        wait: Duration,
        joins: Option<v1::Joins>,
    ) -> Result<Streaming<v1::WeightsChunk>> {
        let request =
            v1::WeightsRequest { worker: self.worker.clone(), holds, wait_ms: wait.as_millis() as u32, joins };
        let answer = self.call("weights", |_| {
            let (mut client, request) = (self.inner.clone(), self.request(request.clone(), wait + LATE));
            async move { client.weights(request?).await }
        });
        Ok(answer.await?.into_inner())
    }

    /// Opens the call that tells that this worker takes part in broadcasts, as long as it is open.
    pub async fn follow(&self) -> Result<Streaming<v1::FollowResponse>> {
        let request = v1::FollowRequest { worker: self.worker.clone() };
        let answer = self.call("follow", |_| {
            let (mut client, request) =
                (self.inner.clone(), authorised(Request::new(request.clone()), self.token.as_deref()));
            async move { client.follow(request?).await }
        });
        Ok(answer.await?.into_inner())
    }

    /// Hands leases back, once and for a short time: they run out by themselves otherwise.
    pub async fn release(&self, leases: Vec<String>) {
        self.give_back(leases, Cause::Unspecified, String::new()).await;
    }

    /// [`Experience::release`] with what became of them.
    pub async fn give_back(&self, leases: Vec<String>, cause: Cause, why: String) {
        let within = Duration::from_secs(1);
        let mut client = self.inner.clone();
        let worker = self.worker.clone();
        let request = self.request(v1::ReleaseRequest { worker, leases, cause: cause.into(), why }, within);
        let call = async move { client.release(request?).await };
        match tokio::time::timeout(within, call).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => tracing::warn!("leases were not handed back, they will run out: {}", e.message()),
            Err(_) => tracing::warn!("leases were not handed back in time, they will run out"),
        }
    }
}

/// The service refuses a worker whose weights are not what it published with `FAILED_PRECONDITION`, or `NOT_FOUND` where it has never
/// sent them.
fn trusted<T>(answer: Result<tonic::Response<T>>) -> Result<Trusted<T>> {
    match answer {
        Ok(answer) => Ok(Ok(answer.into_inner())),
        Err(RolloutError::Service { source, role, address }) => match *source {
            ServiceError::Call { status, .. } if status.code() == Code::FailedPrecondition => {
                Ok(Err(Distrust::Damaged(status.message().to_owned())))
            }
            ServiceError::Call { status, .. } if status.code() == Code::NotFound => {
                Ok(Err(Distrust::Foreign(status.message().to_owned())))
            }
            other => Err(RolloutError::Service { source: Box::new(other), role, address }),
        },
        Err(other) => Err(other),
    }
}

/// Whether the same call cannot succeed later: the service is there, and refuses.
pub(crate) fn permanent(code: Code) -> bool {
    use Code::{InvalidArgument, OutOfRange, PermissionDenied, Unauthenticated, Unimplemented};
    matches!(code, InvalidArgument | OutOfRange | PermissionDenied | Unauthenticated | Unimplemented)
}

fn failed(address: &str, source: ServiceError) -> RolloutError {
    RolloutError::Service { role: "experience", address: address.to_owned(), source: Box::new(source) }
}
