//! Liveness and readiness probes: gRPC health on a separate listener, so that probes do not depend on TLS or tokens of other listeners, and
//! a client for it.
//!
//! There are two services (grpc.health.v1): `""` is serving as long as the process runs, [`READY`] while the role can do its work and has
//! not been asked to stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus as Status;
use tonic_health::pb::health_client::HealthClient;

use crate::{Backoff, ServiceError, bind, connect, retry, with_deadline};

/// Service name of the readiness probe.
pub const READY: &str = "ready";

/// Handle of a role's health listener; the default has no listener and does nothing. The listener lives as long as the runtime.
#[derive(Debug, Clone, Default)]
pub struct Health(Option<Arc<watch::Sender<bool>>>);

impl Health {
    /// Listens on `listen` (not at all if empty) and returns the bound address. The role is alive immediately, ready after
    /// [`Self::set_ready`], and no longer ready once `shutdown` is cancelled.
    ///
    /// # Errors
    /// See [`bind`].
    pub async fn start(listen: &str, shutdown: CancellationToken) -> Result<(Self, Option<SocketAddr>), ServiceError> {
        if listen.is_empty() {
            return Ok((Self::default(), None));
        }
        let (listener, address) = bind(listen).await?;
        let (reporter, service) = tonic_health::server::health_reporter();
        reporter.set_service_status(READY, ServingStatus::NotServing).await;
        let (sender, mut receiver) = watch::channel(false);
        tokio::spawn(async move {
            loop {
                let ended = tokio::select! {
                    changed = receiver.changed() => changed.is_err(),
                    () = shutdown.cancelled() => true,
                };
                let ready = !ended && *receiver.borrow_and_update();
                let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
                reporter.set_service_status(READY, status).await;
                if ended {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            if let Err(e) = Server::builder().add_service(service).serve_with_incoming(incoming).await {
                tracing::warn!(%address, "health listener failed: {e}");
            }
        });
        tracing::info!(%address, "health listener started");
        Ok((Self(Some(Arc::new(sender))), Some(address)))
    }

    /// Marks the role as able to do its work.
    pub fn set_ready(&self) {
        self.set(true);
    }

    /// Marks the role as waiting for something that it needs.
    pub fn set_not_ready(&self) {
        self.set(false);
    }

    fn set(&self, ready: bool) {
        if let Some(sender) = &self.0 {
            sender.send_if_modified(|current| std::mem::replace(current, ready) != ready);
        }
    }
}

/// Queries the health listener at `address` for `service` (`""` or [`READY`]) and returns whether it is serving.
///
/// # Errors
/// Returns [`ServiceError::Deadline`] if there is no response within `deadline` and [`ServiceError::Call`] if it is not a health service.
pub async fn check_health(address: &str, service: &str, deadline: Duration) -> Result<bool, ServiceError> {
    let channel = connect(address, deadline).await?;
    let check = |left| {
        let mut client = HealthClient::new(channel.clone());
        async move {
            let request = with_deadline(HealthCheckRequest { service: service.to_owned() }, left);
            match client.check(request).await {
                Err(status) if status.code() == Code::NotFound => Ok(false),
                answer => answer.map(|a| a.into_inner().status() == Status::Serving),
            }
        }
    };
    retry(&format!("health of {address}"), deadline, Backoff::default(), check).await
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(5);

    /// Polls until readiness is `expected`.
    async fn becomes(address: &str, expected: bool) {
        let polled = async {
            while check_health(address, READY, TIMEOUT).await.unwrap() != expected {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(TIMEOUT, polled).await.expect("readiness changes in time");
    }

    #[tokio::test]
    async fn alive_throughout_and_ready_in_between() {
        let stop = CancellationToken::new();
        let (health, address) = Health::start("127.0.0.1:0", stop.clone()).await.unwrap();
        let address = address.unwrap().to_string();
        let alive = async || check_health(&address, "", TIMEOUT).await.unwrap();
        assert!(alive().await && !check_health(&address, READY, TIMEOUT).await.unwrap(), "a waiting role");
        health.set_ready();
        becomes(&address, true).await;
        health.set_not_ready();
        becomes(&address, false).await;
        health.set_ready();
        becomes(&address, true).await;
        stop.cancel();
        becomes(&address, false).await;
        health.set_ready();
        assert!(alive().await, "a draining role is alive");
        assert!(!check_health(&address, READY, TIMEOUT).await.unwrap(), "and does not become ready again");
        assert!(!check_health(&address, "unknown", TIMEOUT).await.unwrap());
    }

    #[tokio::test]
    async fn dropped_handle_is_not_ready() {
        let (health, address) = Health::start("127.0.0.1:0", CancellationToken::new()).await.unwrap();
        let address = address.unwrap().to_string();
        health.set_ready();
        becomes(&address, true).await;
        drop(health);
        becomes(&address, false).await;
    }

    #[tokio::test]
    async fn missing_listener_and_port_in_use() {
        let (health, address) = Health::start("", CancellationToken::new()).await.unwrap();
        health.set_ready();
        assert_eq!(address, None);
        let (held, free) = bind("127.0.0.1:0").await.unwrap();
        drop(held);
        let e = check_health(&free.to_string(), READY, Duration::from_millis(200)).await.unwrap_err();
        assert!(e.to_string().contains(&free.to_string()), "{e}");
        let (_held, taken) = bind("127.0.0.1:0").await.unwrap();
        assert!(Health::start(&taken.to_string(), CancellationToken::new()).await.is_err());
    }
}
