//! The worker's side of the experience service: calls with retry.

use std::sync::Arc;
use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};
use unveil_core::Secret;
use unveil_proto::v1;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_service::{
    Backoff, ClientOptions, Health, ServiceError, authorised, carry, connect_with, limited, retry, with_deadline,
};

use crate::{Result, RolloutError};

/// How long an answer may come late, beyond the time that the service may wait.
const LATE: Duration = Duration::from_secs(10);

/// An answer, or why the service does not trust the weights that this worker holds.
pub(crate) type Trusted<T> = Result<T, String>;

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

    /// Groups to generate; waits up to `wait` on the server. `health` hears whether the service answers: who holds weights and is
    /// answered can do its work.
    pub async fn lease(
        &self,
        max_groups: usize,
        wait: Duration,
        weights: Option<v1::HeldWeights>,
        health: &Health,
    ) -> Result<Trusted<v1::LeaseResponse>> {
        let request = v1::LeaseRequest {
            worker: self.worker.clone(),
            max_groups: max_groups as u32,
            wait_ms: wait.as_millis() as u32,
            weights,
        };
        let answer = self.call("lease", |_| {
            // A peer that vanished without a word must not be waited for.
            let (mut client, request) = (self.inner.clone(), self.request(request.clone(), wait + LATE));
            async move {
                let answer = client.lease(request?).await;
                match (&answer, weights) {
                    (Ok(_), Some(_)) => health.ready(),
                    (Ok(_), None) => {}
                    (Err(_), _) => health.waiting(),
                }
                answer
            }
        });
        trusted(answer.await)
    }

    /// Gives a sign of life, once: the next one follows soon.
    pub async fn live(&self, within: Duration) {
        let request = v1::LeaseRequest { worker: self.worker.clone(), ..Default::default() };
        let mut client = self.inner.clone();
        let call = async { client.lease(self.request(request, within)?).await };
        let told = tokio::time::timeout(within, call).await;
        if !matches!(told, Ok(Ok(_))) {
            tracing::debug!("a sign of life did not arrive at {}", self.address);
        }
    }

    /// Hands a whole group in. The current span goes on in the service.
    pub async fn submit(&self, mut request: v1::SubmitRequest) -> Result<Trusted<v1::submit_response::Verdict>> {
        request.worker.clone_from(&self.worker);
        let answer = self.call("submit", |left| {
            let (mut client, request) = (self.inner.clone(), self.request(request.clone(), left));
            async move { client.submit(carry(request?, &tracing::Span::current())).await }
        });
        Ok(trusted(answer.await)?.map(|answer| answer.verdict()))
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
        let within = Duration::from_secs(1);
        let mut client = self.inner.clone();
        let request = self.request(v1::ReleaseRequest { worker: self.worker.clone(), leases }, within);
        let call = async move { client.release(request?).await };
        match tokio::time::timeout(within, call).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => tracing::warn!("leases were not handed back, they will run out: {}", e.message()),
            Err(_) => tracing::warn!("leases were not handed back in time, they will run out"),
        }
    }
}

/// The service refuses a worker whose weights are not what it published with `FAILED_PRECONDITION`.
fn trusted<T>(answer: Result<tonic::Response<T>>) -> Result<Trusted<T>> {
    match answer {
        Ok(answer) => Ok(Ok(answer.into_inner())),
        Err(RolloutError::Service { source, role, address }) => match *source {
            ServiceError::Call { status, .. } if status.code() == Code::FailedPrecondition => {
                Ok(Err(status.message().to_owned()))
            }
            other => Err(RolloutError::Service { source: Box::new(other), role, address }),
        },
        Err(other) => Err(other),
    }
}

fn failed(address: &str, source: ServiceError) -> RolloutError {
    RolloutError::Service { role: "experience", address: address.to_owned(), source: Box::new(source) }
}
