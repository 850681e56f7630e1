//! The reward service: stateless, any number of replicas behind one address. Scoring runs beside the event loop.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tonic::server::NamedService;
use tonic::{Request, Response, Status};
use unveil_config::Config;
use unveil_proto::v1::reward_server::{Reward, RewardServer};
use unveil_proto::{breakdown_to_wire, v1};
use unveil_service::{CancellationToken, Routes, ServeOptions, announce, limited, serve};

use crate::score::{Scoring, score_group};
use crate::{RewardError, group_from_request};

type Server = RewardServer<RewardService>;

/// Version that goes with every answer.
const SCORER_VERSION: &str = concat!("unveil-reward ", env!("CARGO_PKG_VERSION"));

struct RewardService {
    scoring: Arc<Scoring>,
    /// As many groups at once as there are cores; the others wait without a thread.
    slots: Arc<Semaphore>,
}

#[tonic::async_trait]
impl Reward for RewardService {
    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let slot = Arc::clone(&self.slots).acquire_owned().await.map_err(|_| Status::unavailable("stopping"))?;
        let scoring = Arc::clone(&self.scoring);
        let work = move || {
            let _slot = slot;
            let group = group_from_request(request.into_inner())?;
            Ok::<_, RewardError>(score_group(&scoring, &group).iter().map(breakdown_to_wire).collect())
        };
        let breakdowns = tokio::task::spawn_blocking(work)
            .await
            .map_err(|e| Status::internal(format!("scoring failed: {e}")))?
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok(Response::new(v1::ScoreResponse { breakdowns, scorer_version: SCORER_VERSION.to_owned() }))
    }
}

/// The service's routes, to be served alone or beside others.
pub fn reward_routes(scoring: Scoring) -> Routes {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let service = RewardService { scoring: Arc::new(scoring), slots: Arc::new(Semaphore::new(cores)) };
    Routes::new(limited!(Server::new(service)))
}

/// Serves on `reward.listen` until `shutdown`; `ready` learns the bound address.
///
/// # Errors
/// The address cannot be listened on, or the server failed.
pub async fn serve_with(
    config: &Config,
    shutdown: CancellationToken,
    ready: impl FnOnce(SocketAddr),
) -> Result<(), RewardError> {
    let options = ServeOptions { names: vec![Server::NAME], ..Default::default() };
    serve(&config.reward.listen, reward_routes(Scoring::new(config)), options, shutdown, ready).await?;
    Ok(())
}

/// [`serve_with`] that writes the ready line to stdout.
///
/// # Errors
/// As [`serve_with`].
pub async fn run_serve(config: &Config, shutdown: CancellationToken) -> Result<(), RewardError> {
    serve_with(config, shutdown, |address| {
        tracing::info!(%address, "scoring");
        if let Err(e) = announce("reward", address) {
            tracing::warn!("the ready line could not be written: {e}");
        }
    })
    .await
}
