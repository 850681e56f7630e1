//! Client of the experience service: calls with retry.

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
    Backoff, ClientOptions, ServiceError, authorize, connect_with, inject, limited, retry, with_deadline,
};

use super::error::{ClientError, Result};
use super::held_leases::{HeldLeases, Progress};

/// Time that an answer may take beyond the time that the service may wait.
const ANSWER_GRACE: Duration = Duration::from_secs(10);

/// An answer, or the reason why the service rejects the weights that this worker holds.
pub type WeightsChecked<T> = std::result::Result<T, WeightRejection>;

/// Reason why the service rejects weights.
#[derive(Debug)]
pub enum WeightRejection {
    /// The service never sent them: they come from an earlier learner.
    OtherLearner(String),
    /// Their checksum differs from the one that the service sent.
    Damaged(String),
}

/// A client of the experience service; cheap to clone, clones share the connection.
#[derive(Clone, Debug)]
pub struct ExperienceConnection {
    inner: ExperienceClient<Channel>,
    /// Address of the service.
    pub address: String,
    worker: String,
    token: Option<Arc<Secret>>,
    patience: Duration,
}

impl ExperienceConnection {
    /// Connects, retrying for `patience`.
    ///
    /// # Errors
    /// Returns [`ClientError::Service`] if no server answers at the address or a certificate cannot be used.
    pub async fn connect(address: &str, worker: &str, options: &ClientOptions, patience: Duration) -> Result<Self> {
        let channel = connect_with(address, options, patience).await.map_err(|e| service_error(address, e))?;
        let inner = limited!(ExperienceClient::new(channel));
        let token = options.token.clone().map(Arc::new);
        Ok(Self { inner, address: address.to_owned(), worker: worker.to_owned(), token, patience })
    }

    fn request<T>(&self, message: T, deadline: Duration) -> Result<Request<T>, Status> {
        authorize(with_deadline(message, deadline), self.token.as_deref())
    }

    async fn call<T, F, Fut>(&self, what: &str, call: F) -> Result<T>
    where
        F: FnMut(Duration) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        retry(what, self.patience, Backoff::default(), call).await.map_err(|e| service_error(&self.address, e))
    }

    /// Leases groups as call number `call` of `leases`; the server waits up to `wait` for work. Calls `on_answer` with `true` if the
    /// service answers a worker that holds weights, and with `false` after each failed attempt.
    ///
    /// # Errors
    /// Returns [`ClientError::Service`] if the service stays unreachable or refuses the call.
    pub async fn lease(
        &self,
        (leases, call): (&HeldLeases, u64),
        max_groups: usize,
        wait: Duration,
        weights: Option<v1::HeldWeights>,
        on_answer: &(dyn Fn(bool) + Sync),
    ) -> Result<WeightsChecked<v1::LeaseResponse>> {
        let request = v1::LeaseRequest {
            worker: self.worker.clone(),
            max_groups: max_groups as u32,
            wait_ms: wait.as_millis() as u32,
            weights,
            session: leases.session,
            call,
        };
        let answer = self.call("lease", |_| {
            // The deadline keeps the call from waiting for a peer that disappeared silently.
            let mut client = self.inner.clone();
            let request = self.request(request.clone(), wait + ANSWER_GRACE);
            async move {
                let answer = client.lease(request?).await;
                match (&answer, weights) {
                    (Ok(_), Some(_)) => on_answer(true),
                    (Ok(_), None) => {}
                    (Err(_), _) => on_answer(false),
                }
                answer
            }
        });
        check_weights(answer.await)
    }

    /// Sends one heartbeat about `leases`, without retry since the next one follows soon; `None` if it was not delivered.
    pub async fn heartbeat(&self, leases: &HeldLeases, within: Duration) -> Option<v1::HeartbeatResponse> {
        let (done, in_hand) = leases.heartbeat_entries();
        let request = v1::HeartbeatRequest { worker: self.worker.clone(), session: leases.session, done, in_hand };
        let mut client = self.inner.clone();
        let call = async { client.heartbeat(self.request(request, within)?).await };
        match tokio::time::timeout(within, call).await {
            Ok(Ok(answer)) => Some(answer.into_inner()),
            _ => {
                tracing::debug!("heartbeat to {} not delivered", self.address);
                None
            }
        }
    }

    /// Fetches the image of a lease, which has `bytes` bytes; `None` if the lease is lost. An interrupted stream is requested again as
    /// long as some of it arrives within the patience.
    ///
    /// # Errors
    /// Returns [`ClientError::Service`] if the stream stays interrupted, and [`ClientError::Protocol`] if the image has another size.
    pub async fn image(&self, lease: &str, bytes: u64, progress: &Progress) -> Result<Option<Bytes>> {
        let mut backoff = Backoff::default();
        let mut since = Instant::now();
        loop {
            let request = v1::ImageRequest { worker: self.worker.clone(), lease: lease.to_owned() };
            let mut image = BytesMut::new();
            let status = match self.image_once(request, &mut image, bytes, progress).await {
                Ok(()) if image.len() as u64 == bytes => return Ok(Some(image.freeze())),
                Ok(()) => {
                    let what =
                        format!("announced an image of {bytes} bytes for lease `{lease}` and sent {}", image.len());
                    return Err(ClientError::Protocol { address: self.address.clone(), what });
                }
                Err(status) if status.code() == Code::NotFound => return Ok(None),
                Err(status) => status,
            };
            if !image.is_empty() {
                (backoff, since) = (Backoff::default(), Instant::now());
            }
            if since.elapsed() >= self.patience || is_permanent(status.code()) {
                let call = ServiceError::Call { what: format!("image of lease `{lease}`"), status: Box::new(status) };
                return Err(service_error(&self.address, call));
            }
            tracing::warn!(lease, "retrying the image stream: {}", status.message());
            tokio::time::sleep(backoff.next_delay()).await;
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
        let mut stream = client.image(self.request(request, ANSWER_GRACE)?).await?.into_inner();
        let stalled = |_| Status::unavailable(format!("the stream stalled for {:.0} s", self.patience.as_secs_f64()));
        while let Some(chunk) = tokio::time::timeout(self.patience, stream.message()).await.map_err(stalled)?? {
            image.extend_from_slice(&chunk.data);
            progress.advance();
            if image.len() as u64 > most {
                break;
            }
        }
        Ok(())
    }

    /// Submits a whole group; returns the verdict and the reason of a rejection. The service continues the current tracing span.
    ///
    /// # Errors
    /// Returns [`ClientError::Service`] if the service stays unreachable or refuses the call.
    pub async fn submit(
        &self,
        mut request: v1::SubmitRequest,
    ) -> Result<WeightsChecked<(v1::submit_response::Verdict, String)>> {
        request.worker.clone_from(&self.worker);
        let answer = self.call("submit", |left| {
            let mut client = self.inner.clone();
            let request = self.request(request.clone(), left);
            async move { client.submit(inject(request?, &tracing::Span::current())).await }
        });
        Ok(check_weights(answer.await)?.map(|answer| (answer.verdict(), answer.why)))
    }

    /// Opens a stream of the weights newer than `holds`; the server waits up to `wait` for them. `broadcast_capability` describes how the
    /// worker can receive them by broadcast.
    pub(super) async fn weights(
        &self,
        holds: Option<v1::HeldWeights>,
        wait: Duration,
        broadcast_capability: Option<v1::BroadcastCapability>,
    ) -> Result<Streaming<v1::WeightsChunk>> {
        let request = v1::WeightsRequest {
            worker: self.worker.clone(),
            holds,
            wait_ms: wait.as_millis() as u32,
            broadcast_capability,
        };
        let answer = self.call("weights", |_| {
            let mut client = self.inner.clone();
            let request = self.request(request.clone(), wait + ANSWER_GRACE);
            async move { client.weights(request?).await }
        });
        Ok(answer.await?.into_inner())
    }

    /// Opens the call that registers this worker for broadcasts for as long as it is open.
    pub(super) async fn subscribe(&self) -> Result<Streaming<v1::SubscribeResponse>> {
        let request = v1::SubscribeRequest { worker: self.worker.clone() };
        let answer = self.call("subscribe", |_| {
            let mut client = self.inner.clone();
            let request = authorize(Request::new(request.clone()), self.token.as_deref());
            async move { client.subscribe(request?).await }
        });
        Ok(answer.await?.into_inner())
    }

    /// Releases leases, without retry: otherwise they expire.
    pub async fn release(&self, leases: Vec<String>) {
        self.release_because(leases, Cause::Unspecified, String::new()).await;
    }

    /// Releases leases as [`ExperienceConnection::release`], and reports the cause.
    pub async fn release_because(&self, leases: Vec<String>, cause: Cause, why: String) {
        let within = Duration::from_secs(1);
        let mut client = self.inner.clone();
        let worker = self.worker.clone();
        let request = self.request(v1::ReleaseRequest { worker, leases, cause: cause.into(), why }, within);
        let call = async move { client.release(request?).await };
        match tokio::time::timeout(within, call).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => tracing::warn!("leases not released, they will expire: {}", e.message()),
            Err(_) => tracing::warn!("leases not released in time, they will expire"),
        }
    }
}

/// Recognises an answer by which the service rejects the worker's weights: `FAILED_PRECONDITION` if they differ from the published ones,
/// `NOT_FOUND` if it never published them.
fn check_weights<T>(answer: Result<tonic::Response<T>>) -> Result<WeightsChecked<T>> {
    match answer {
        Ok(answer) => Ok(Ok(answer.into_inner())),
        Err(ClientError::Service { source, address }) => match *source {
            ServiceError::Call { status, .. } if status.code() == Code::FailedPrecondition => {
                Ok(Err(WeightRejection::Damaged(status.message().to_owned())))
            }
            ServiceError::Call { status, .. } if status.code() == Code::NotFound => {
                Ok(Err(WeightRejection::OtherLearner(status.message().to_owned())))
            }
            other => Err(ClientError::Service { source: Box::new(other), address }),
        },
        Err(other) => Err(other),
    }
}

/// Whether a status is permanent: the service answers and refuses the call, so that a retry cannot succeed.
pub(super) fn is_permanent(code: Code) -> bool {
    use Code::{InvalidArgument, OutOfRange, PermissionDenied, Unauthenticated, Unimplemented};
    matches!(code, InvalidArgument | OutOfRange | PermissionDenied | Unauthenticated | Unimplemented)
}

fn service_error(address: &str, source: ServiceError) -> ClientError {
    ClientError::Service { address: address.to_owned(), source: Box::new(source) }
}
