//! The reward service: stateless, any number of replicas behind one address. Scoring runs beside the event loop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::Semaphore;
use tonic::server::NamedService;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;
use unveil_config::{Config, Role};
use unveil_proto::v1::reward_server::{Reward, RewardServer};
use unveil_proto::v1::reward_stream_server::{RewardStream, RewardStreamServer};
use unveil_proto::{breakdown_to_wire, v1};
use unveil_service::{Access, CancellationToken, Guard, Health, Place, Routes, ServeOptions, ServiceError};
use unveil_service::{announce, carried, continues, limited, metrics_page, serve, span};

use crate::meter::Meter;
use crate::scorers::Scorers;
use crate::{RewardError, group_from_request};

type Server = RewardServer<RewardService>;
type StreamServer = RewardStreamServer<RewardService>;

/// Version that goes with every answer.
const SCORER_VERSION: &str = concat!("unveil-reward ", env!("CARGO_PKG_VERSION"));
/// The streaming method, whose handler keeps its place among the calls at once.
const STREAM_PATH: &str = "/unveil.v1.RewardStream/ScoreGroups";
/// Groups of one stream that are scored at the same time; the sender waits for more.
const AHEAD: usize = 8;

#[derive(Clone)]
struct RewardService {
    scorers: Arc<Scorers>,
    meter: Arc<Meter>,
    /// As many groups are computed at once as there are cores; the others wait without a thread.
    cores: Arc<Semaphore>,
    /// Longest wait for a stream's next message.
    patience: Duration,
}

impl RewardService {
    async fn answer(&self, request: v1::ScoreRequest) -> Result<v1::ScoreResponse, Status> {
        let timer = self.meter.begin();
        let scored =
            if self.scorers.asks_others() { self.with_others(request).await } else { self.alone(request).await };
        let breakdowns = scored?;
        timer.done();
        Ok(v1::ScoreResponse { breakdowns, scorer_version: SCORER_VERSION.to_owned() })
    }

    /// Everything in one go on one thread of the pool.
    async fn alone(&self, request: v1::ScoreRequest) -> Result<Vec<v1::Breakdown>, Status> {
        let (scorers, meter) = (Arc::clone(&self.scorers), Arc::clone(&self.meter));
        self.compute(move || {
            let group = group_from_request(request)?;
            let scored = scorers.score_here(&group);
            meter.scored(&scored);
            Ok::<_, RewardError>(scored.iter().map(breakdown_to_wire).collect())
        })
        .await?
        .map_err(|e| Status::invalid_argument(e.to_string()))
    }

    /// Reads on the pool, then waits for the others without a thread.
    async fn with_others(&self, request: v1::ScoreRequest) -> Result<Vec<v1::Breakdown>, Status> {
        let group = self.compute(move || group_from_request(request)).await?;
        let group = Arc::new(group.map_err(|e| Status::invalid_argument(e.to_string()))?);
        let scored = Arc::clone(&self.scorers).score(group).await;
        self.meter.scored(&scored);
        Ok(scored.iter().map(breakdown_to_wire).collect())
    }

    async fn compute<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
        let core = Arc::clone(&self.cores).acquire_owned().await.map_err(|_| Status::unavailable("stopping"))?;
        let work = move || {
            let _core = core;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|e| Status::internal(format!("scoring failed: {e}")))
    }
}

#[tonic::async_trait]
impl Reward for RewardService {
    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let span = span!(parent: None, "rewards", responses = request.get_ref().responses.len());
        continues(&span, &carried(&request));
        Ok(Response::new(self.answer(request.into_inner()).instrument(span).await?))
    }
}

#[tonic::async_trait]
impl RewardStream for RewardService {
    type ScoreGroupsStream = BoxStream<'static, Result<v1::ScoreResponse, Status>>;

    async fn score_groups(
        &self,
        request: Request<Streaming<v1::ScoreRequest>>,
    ) -> Result<Response<Self::ScoreGroupsStream>, Status> {
        let place = request.extensions().get::<Place>().cloned();
        let service = self.clone();
        let requests = bounded(request.into_inner(), self.patience);
        let answers = requests.map(move |request| {
            let service = service.clone();
            async move { service.answer(request?).await }
        });
        // Ends with the first failure; the place is given back when the stream is dropped.
        let ended = answers.buffered(AHEAD).scan((place, false), |(_, failed), answer| {
            let over = std::mem::replace(failed, answer.is_err());
            std::future::ready((!over).then_some(answer))
        });
        Ok(Response::new(ended.boxed()))
    }
}

/// The messages of a stream, each waited for no longer than `patience`.
fn bounded(
    messages: Streaming<v1::ScoreRequest>,
    patience: Duration,
) -> impl futures::Stream<Item = Result<v1::ScoreRequest, Status>> + Send {
    futures::stream::unfold(Some(messages), move |messages| async move {
        let mut messages = messages?;
        match tokio::time::timeout(patience, messages.message()).await {
            Ok(Ok(Some(request))) => Some((Ok(request), Some(messages))),
            Ok(Ok(None)) => None,
            Ok(Err(status)) => Some((Err(status), None)),
            Err(_) => {
                let what = format!("no message within {:.1} s", patience.as_secs_f64());
                Some((Err(Status::deadline_exceeded(what)), None))
            }
        }
    })
}

/// Serves on `reward.listen` until `shutdown`; `ready` learns the bound address.
///
/// # Errors
/// Something that the configuration names cannot be used, the address cannot be listened on, or the server failed.
pub async fn serve_with(
    config: &Config,
    shutdown: CancellationToken,
    ready: impl FnOnce(SocketAddr),
) -> Result<(), RewardError> {
    let s = &config.reward.service;
    let call = Duration::from_secs_f64(s.call_s);
    let access = Access::of(config, Role::Reward)?;
    let guard = Guard::new(access.token.as_ref(), s.max_in_flight, Some(call), &[STREAM_PATH])
        .admitting(access.callers.clone());
    // Beside the runtime's threads: whoever asks how the service is gets an answer meanwhile.
    let named = config.clone();
    let loading = tokio::task::spawn_blocking(move || Scorers::load(&named));
    let scorers = tokio::select! {
        loaded = loading => loaded.map_err(|e| ServiceError::Setup(format!("loading the scorers: {e}")))??,
        () = shutdown.cancelled() => return Ok(()),
    };
    let (meter, registry) = Meter::new();
    let service = RewardService {
        scorers: Arc::new(scorers),
        meter: Arc::new(meter),
        cores: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from))),
        patience: call,
    };
    if !s.metrics_listen.is_empty() {
        let (meter, scorers, guard) = (Arc::clone(&service.meter), Arc::clone(&service.scorers), guard.clone());
        let refresh = move || meter.refresh(guard.counts(), scorers.judge().map(|j| j.spent()));
        let address = metrics_page(&s.metrics_listen, Arc::new(registry), refresh, &access, shutdown.clone()).await?;
        tracing::info!(%address, "metrics at /metrics");
    }
    let limit = s.max_message_mib << 20;
    let mut routes = Routes::builder();
    routes.add_service(limited!(Server::new(service.clone()), limit));
    routes.add_service(limited!(StreamServer::new(service), limit));
    let options = ServeOptions {
        names: vec![Server::NAME, StreamServer::NAME],
        drain: Duration::from_secs_f64(s.drain_s),
        tls: access.tls,
        guard,
        insecure: access.insecure,
        // One more than is taken, so that what is too much is refused and not left to wait.
        per_connection: Some(u32::try_from(s.max_in_flight).unwrap_or(u32::MAX).saturating_add(64)),
        serving: true,
    };
    serve(&config.reward.listen, routes.routes(), options, shutdown, ready).await?;
    Ok(())
}

/// [`serve_with`] that writes the ready line to stdout, with `health.listen` beside it.
///
/// # Errors
/// As [`serve_with`].
pub async fn run_serve(config: &Config, shutdown: CancellationToken) -> Result<(), RewardError> {
    let (health, _) = Health::start(&config.health.listen, shutdown.clone()).await?;
    serve_with(config, shutdown, |address| {
        tracing::info!(%address, "scoring");
        health.ready();
        if let Err(e) = announce("reward", address) {
            tracing::warn!("the ready line could not be written: {e}");
        }
    })
    .await
}
