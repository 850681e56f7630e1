//! The reward service: stateless, any number of replicas behind one address. Scoring runs on blocking threads, off the event loop.

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
use unveil_service::{CallPermit, CancellationToken, Guard, Health, Routes, ServeOptions, ServiceAccess, ServiceError};
use unveil_service::{announce, extract, limited, serve, serve_metrics, set_remote_parent, span};

use crate::meter::Meter;
use crate::scorers::Scorers;
use crate::{RewardError, group_from_request};

type Server = RewardServer<RewardService>;
type StreamServer = RewardStreamServer<RewardService>;

/// Version sent with every answer.
const SCORER_VERSION: &str = concat!("unveil-reward ", env!("CARGO_PKG_VERSION"));
/// Path of the streaming method, whose handler holds its slot among the concurrent calls for as long as the stream is open.
const STREAM_PATH: &str = "/unveil.v1.RewardStream/ScoreGroups";
/// Groups of one stream that are scored concurrently; beyond them, flow control holds the sender back.
const STREAM_CONCURRENCY: usize = 8;

#[derive(Clone)]
struct RewardService {
    scorers: Arc<Scorers>,
    meter: Arc<Meter>,
    /// One permit per core: further groups wait without occupying a thread.
    cores: Arc<Semaphore>,
    /// Longest wait for the next message of a stream.
    message_timeout: Duration,
}

impl RewardService {
    async fn answer(&self, request: v1::ScoreRequest) -> Result<v1::ScoreResponse, Status> {
        let timer = self.meter.start_group();
        let scored = if self.scorers.needs_external() {
            self.score_with_external(request).await
        } else {
            self.score_locally(request).await
        };
        let breakdowns = scored?;
        timer.finish();
        Ok(v1::ScoreResponse { breakdowns, scorer_version: SCORER_VERSION.to_owned() })
    }

    /// Reads and scores a request in one piece on one blocking thread.
    async fn score_locally(&self, request: v1::ScoreRequest) -> Result<Vec<v1::Breakdown>, Status> {
        let scorers = Arc::clone(&self.scorers);
        let meter = Arc::clone(&self.meter);
        self.compute(move || {
            let group = group_from_request(request)?;
            let scored = scorers.score_locally(&group);
            meter.record_scores(&scored);
            Ok::<_, RewardError>(scored.iter().map(breakdown_to_wire).collect())
        })
        .await?
        .map_err(|e| Status::invalid_argument(e.to_string()))
    }

    /// Reads a request on a blocking thread, then waits for the external scorers without occupying one.
    async fn score_with_external(&self, request: v1::ScoreRequest) -> Result<Vec<v1::Breakdown>, Status> {
        let group = self.compute(move || group_from_request(request)).await?;
        let group = Arc::new(group.map_err(|e| Status::invalid_argument(e.to_string()))?);
        let scored = Arc::clone(&self.scorers).score(group).await;
        self.meter.record_scores(&scored);
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
        set_remote_parent(&span, &extract(&request));
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
        let place = request.extensions().get::<CallPermit>().cloned();
        let service = self.clone();
        let requests = with_message_timeout(request.into_inner(), self.message_timeout);
        let answers = requests.map(move |request| {
            let service = service.clone();
            async move { service.answer(request?).await }
        });
        // Ends after the first failure; the slot is released when the stream is dropped.
        let until_failure = answers.buffered(STREAM_CONCURRENCY).scan((place, false), |(_, failed), answer| {
            let ended = std::mem::replace(failed, answer.is_err());
            std::future::ready((!ended).then_some(answer))
        });
        Ok(Response::new(until_failure.boxed()))
    }
}

/// Yields the messages of a stream; ends with `DEADLINE_EXCEEDED` if the next one does not arrive within `limit`.
fn with_message_timeout(
    messages: Streaming<v1::ScoreRequest>,
    limit: Duration,
) -> impl futures::Stream<Item = Result<v1::ScoreRequest, Status>> + Send {
    futures::stream::unfold(Some(messages), move |messages| async move {
        let mut messages = messages?;
        match tokio::time::timeout(limit, messages.message()).await {
            Ok(Ok(Some(request))) => Some((Ok(request), Some(messages))),
            Ok(Ok(None)) => None,
            Ok(Err(status)) => Some((Err(status), None)),
            Err(_) => {
                let what = format!("no message within {:.1} s", limit.as_secs_f64());
                Some((Err(Status::deadline_exceeded(what)), None))
            }
        }
    })
}

/// Serves on `reward.listen` until `shutdown`; `ready` is called with the bound address.
///
/// # Errors
/// Returns the errors of [`Scorers::load`], and [`RewardError::Service`] if access cannot be set up, the address cannot be listened on,
/// or the server failed.
pub async fn serve_with(
    config: &Config,
    shutdown: CancellationToken,
    ready: impl FnOnce(SocketAddr),
) -> Result<(), RewardError> {
    let s = &config.reward.service;
    let call = Duration::from_secs_f64(s.call_s);
    let access = ServiceAccess::of(config, Role::Reward)?;
    let guard = Guard::new(access.token.as_ref(), s.max_in_flight, Some(call), &[STREAM_PATH])
        .with_callers(access.callers.clone());
    // On a blocking thread, so that health checks are answered in the meantime.
    let owned_config = config.clone();
    let loading = tokio::task::spawn_blocking(move || Scorers::load(&owned_config));
    let scorers = tokio::select! {
        loaded = loading => loaded.map_err(|e| ServiceError::Setup(format!("loading the scorers: {e}")))??,
        () = shutdown.cancelled() => return Ok(()),
    };
    let (meter, registry) = Meter::new();
    let service = RewardService {
        scorers: Arc::new(scorers),
        meter: Arc::new(meter),
        cores: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from))),
        message_timeout: call,
    };
    if !s.metrics_listen.is_empty() {
        let meter = Arc::clone(&service.meter);
        let scorers = Arc::clone(&service.scorers);
        let guard = guard.clone();
        let refresh = move || meter.refresh(guard.counts(), scorers.judge().map(|j| j.spent()));
        let address = serve_metrics(&s.metrics_listen, Arc::new(registry), refresh, &access, shutdown.clone()).await?;
        tracing::info!(%address, "metrics at /metrics");
    }
    let limit = s.max_message_mib << 20;
    let mut routes = Routes::builder();
    routes.add_service(limited!(Server::new(service.clone()), limit));
    routes.add_service(limited!(StreamServer::new(service), limit));
    let options = ServeOptions {
        health_names: vec![Server::NAME, StreamServer::NAME],
        drain_timeout: Duration::from_secs_f64(s.drain_s),
        tls: access.tls,
        guard,
        insecure: access.insecure,
        // More than `max_in_flight`, so that excess calls are refused instead of queued.
        max_calls_per_connection: Some(u32::try_from(s.max_in_flight).unwrap_or(u32::MAX).saturating_add(64)),
        initially_serving: true,
    };
    serve(&config.reward.listen, routes.routes(), options, shutdown, ready).await?;
    Ok(())
}

/// Runs [`serve_with`] with the health service on `health.listen`, and writes the ready line to stdout.
///
/// # Errors
/// Returns the errors of [`serve_with`].
pub async fn run_serve(config: &Config, shutdown: CancellationToken) -> Result<(), RewardError> {
    let (health, _) = Health::start(&config.health.listen, shutdown.clone()).await?;
    serve_with(config, shutdown, |address| {
        tracing::info!(%address, "scoring");
        health.set_ready();
        if let Err(e) = announce("reward", address) {
            tracing::warn!("cannot write the ready line: {e}");
        }
    })
    .await
}
