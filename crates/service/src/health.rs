//! Signs of life for whoever started the process: gRPC health on a listener of its own, so that probes work whatever the other
//! listeners speak, and the client that asks.
//!
//! Two services are known (grpc.health.v1): `""` serves for as long as the process runs, [`READY`] from the moment that the role can
//! do its work until it cannot, or is told to stop.

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
use tonic_health::pb::health_check_response::ServingStatus as Answered;
use tonic_health::pb::health_client::HealthClient;

use crate::{Backoff, ServiceError, bind, connect, retry, with_deadline};

/// The service name that readiness is asked for by.
pub const READY: &str = "ready";

/// A role's end of its health listener; the default has none and does nothing. The listener lives as long as the runtime.
#[derive(Debug, Clone, Default)]
pub struct Health(Option<Arc<watch::Sender<bool>>>);

impl Health {
    /// Listens on `listen` (nowhere where it is empty): alive at once, ready when [`Self::ready`] says so, not ready any more once
    /// `shutdown` is cancelled. The bound address comes back.
    ///
    /// # Errors
    /// As [`bind`].
    pub async fn start(listen: &str, shutdown: CancellationToken) -> Result<(Self, Option<SocketAddr>), ServiceError> {
        if listen.is_empty() {
            return Ok((Self::default(), None));
        }
        let (listener, address) = bind(listen).await?;
        let (reporter, service) = tonic_health::server::health_reporter();
        reporter.set_service_status(READY, ServingStatus::NotServing).await;
        let (tell, mut told) = watch::channel(false);
        tokio::spawn(async move {
            loop {
                let over = tokio::select! {
                    changed = told.changed() => changed.is_err(),
                    () = shutdown.cancelled() => true,
                };
                let ready = !over && *told.borrow_and_update();
                let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
                reporter.set_service_status(READY, status).await;
                if over {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            if let Err(e) = Server::builder().add_service(service).serve_with_incoming(incoming).await {
                tracing::warn!(%address, "the health listener ended: {e}");
            }
        });
        tracing::info!(%address, "health");
        Ok((Self(Some(Arc::new(tell))), Some(address)))
    }

    /// The role can do its work.
    pub fn ready(&self) {
        self.say(true);
    }

    /// The role waits for something that it needs.
    pub fn waiting(&self) {
        self.say(false);
    }

    fn say(&self, ready: bool) {
        if let Some(tell) = &self.0 {
            tell.send_if_modified(|said| std::mem::replace(said, ready) != ready);
        }
    }
}

/// Asks the health listener at `address` about `service` (`""` or [`READY`]); false where the process says no.
///
/// # Errors
/// Nobody answered within `deadline`, or it is no health service.
pub async fn check_health(address: &str, service: &str, deadline: Duration) -> Result<bool, ServiceError> {
    let channel = connect(address, deadline).await?;
    let ask = |left| {
        let mut client = HealthClient::new(channel.clone());
        async move {
            let request = with_deadline(HealthCheckRequest { service: service.to_owned() }, left);
            match client.check(request).await {
                Err(status) if status.code() == Code::NotFound => Ok(false),
                answer => answer.map(|a| a.into_inner().status() == Answered::Serving),
            }
        }
    };
    retry(&format!("health of {address}"), deadline, Backoff::default(), ask).await
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    /// Asks until the answer is `wanted`.
    async fn becomes(address: &str, wanted: bool) {
        let asked = async {
            while check_health(address, READY, SOON).await.unwrap() != wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(SOON, asked).await.expect("the answer changes soon");
    }

    #[tokio::test]
    async fn alive_all_the_time_and_ready_in_between() {
        let stop = CancellationToken::new();
        let (health, address) = Health::start("127.0.0.1:0", stop.clone()).await.unwrap();
        let address = address.unwrap().to_string();
        let alive = async || check_health(&address, "", SOON).await.unwrap();
        assert!(alive().await && !check_health(&address, READY, SOON).await.unwrap(), "a role that waits");
        health.ready();
        becomes(&address, true).await;
        health.waiting();
        becomes(&address, false).await;
        health.ready();
        becomes(&address, true).await;
        stop.cancel();
        becomes(&address, false).await;
        health.ready();
        assert!(alive().await, "a role that drains is alive");
        assert!(!check_health(&address, READY, SOON).await.unwrap(), "and does not become ready again");
        assert!(!check_health(&address, "nobody", SOON).await.unwrap());
    }

    #[tokio::test]
    async fn a_role_that_ended_is_not_ready() {
        let (health, address) = Health::start("127.0.0.1:0", CancellationToken::new()).await.unwrap();
        let address = address.unwrap().to_string();
        health.ready();
        becomes(&address, true).await;
        drop(health);
        becomes(&address, false).await;
    }

    #[tokio::test]
    async fn no_listener_and_nobody_there() {
        let (health, address) = Health::start("", CancellationToken::new()).await.unwrap();
        health.ready();
        assert_eq!(address, None);
        let (held, free) = bind("127.0.0.1:0").await.unwrap();
        drop(held);
        let e = check_health(&free.to_string(), READY, Duration::from_millis(200)).await.unwrap_err();
        assert!(e.to_string().contains(&free.to_string()), "{e}");
        let (_held, taken) = bind("127.0.0.1:0").await.unwrap();
        assert!(Health::start(&taken.to_string(), CancellationToken::new()).await.is_err());
    }
}
