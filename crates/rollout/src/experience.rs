//! The worker's side of the experience service: calls with retry, and weights that are checked before they are believed.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Code, Status};
use unveil_proto::v1;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_service::{Backoff, ServiceError, connect, limited, retry, with_deadline};

use crate::weights::Assembly;
use crate::{Result, RolloutError};

/// How often damaged weights are asked for again.
const WEIGHT_TRIES: usize = 3;

/// A client; cheap to clone, clones share the connection.
#[derive(Clone)]
pub(crate) struct Experience {
    inner: ExperienceClient<Channel>,
    pub address: String,
    worker: String,
    patience: Duration,
}

impl Experience {
    /// Connects, trying until `patience` is over.
    pub async fn connect(address: &str, worker: &str, patience: Duration) -> Result<Self> {
        let channel = connect(address, patience).await.map_err(|e| failed(address, e))?;
        let inner = limited!(ExperienceClient::new(channel));
        Ok(Self { inner, address: address.to_owned(), worker: worker.to_owned(), patience })
    }

    async fn call<T, F, Fut>(&self, what: &str, call: F) -> Result<T>
    where
        F: FnMut(Duration) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        retry(what, self.patience, Backoff::default(), call).await.map_err(|e| failed(&self.address, e))
    }

    /// Groups to generate; waits up to `wait` on the server. The flag says that the service had been away, so that what
    /// this worker knows of its weights may be out of date.
    pub async fn lease(&self, max_groups: usize, wait: Duration) -> Result<(v1::LeaseResponse, bool)> {
        let request = v1::LeaseRequest {
            worker: self.worker.clone(),
            max_groups: max_groups as u32,
            wait_ms: wait.as_millis() as u32,
        };
        let tries = AtomicU32::new(0);
        let answer = self
            .call("lease", |_| {
                tries.fetch_add(1, Ordering::Relaxed);
                // A peer that vanished without a word must not be waited for.
                let (mut client, request) =
                    (self.inner.clone(), with_deadline(request.clone(), wait + Duration::from_secs(10)));
                async move { client.lease(request).await }
            })
            .await?;
        Ok((answer.into_inner(), tries.into_inner() > 1))
    }

    /// Hands a whole group in.
    pub async fn submit(&self, mut request: v1::SubmitRequest) -> Result<v1::submit_response::Verdict> {
        request.worker.clone_from(&self.worker);
        let answer = self
            .call("submit", |left| {
                let (mut client, request) = (self.inner.clone(), with_deadline(request.clone(), left));
                async move { client.submit(request).await }
            })
            .await?;
        Ok(answer.into_inner().verdict())
    }

    /// Hands leases back, once and for a short time: they run out by themselves otherwise.
    pub async fn release(&self, leases: Vec<String>) {
        let within = Duration::from_secs(1);
        let mut client = self.inner.clone();
        let call = client.release(with_deadline(v1::ReleaseRequest { worker: self.worker.clone(), leases }, within));
        match tokio::time::timeout(within, call).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => tracing::warn!("leases were not handed back, they will run out: {}", e.message()),
            Err(_) => tracing::warn!("leases were not handed back in time, they will run out"),
        }
    }

    /// Version and bytes of the newest weights, or none when `have` is the newest. Damaged ones are asked for again, a
    /// few times.
    pub async fn weights(&self, have: Option<u64>) -> Result<Option<(u64, Vec<u8>)>> {
        for left in (0..WEIGHT_TRIES).rev() {
            let fetched = self.call("weights", |_| fetch(self.inner.clone(), self.worker.clone(), have)).await;
            let Err(RolloutError::Service { source, .. }) = &fetched else { return fetched };
            let ServiceError::Call { status, .. } = &**source else { return fetched };
            if status.code() != Code::DataLoss {
                return fetched;
            }
            let what = status.message().to_owned();
            if left == 0 {
                return Err(RolloutError::Weights { address: self.address.clone(), what });
            }
            tracing::warn!("weights from {} are refused and asked for again: {what}", self.address);
        }
        Ok(None)
    }
}

async fn fetch(
    mut client: ExperienceClient<Channel>,
    worker: String,
    have_version: Option<u64>,
) -> Result<Option<(u64, Vec<u8>)>, Status> {
    let mut stream = client.weights(v1::WeightsRequest { worker, have_version }).await?.into_inner();
    let mut assembly = Assembly::default();
    while let Some(chunk) = stream.message().await? {
        assembly.push(&chunk).map_err(Status::data_loss)?;
    }
    assembly.finish().map_err(Status::data_loss)
}

fn failed(address: &str, source: ServiceError) -> RolloutError {
    RolloutError::Service { role: "experience", address: address.to_owned(), source: Box::new(source) }
}
