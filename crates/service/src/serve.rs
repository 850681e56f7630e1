//! Serving: binding, health, reflection, keep-alive, and a graceful shutdown with a time limit.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::pb::FILE_DESCRIPTOR_SET as HEALTH_DESCRIPTORS;
use tonic_health::server::HealthReporter;

use crate::{Guard, ServerTls, ServiceError};

/// Maximum size of a received HTTP/2 frame in bytes.
const MAX_FRAME_BYTES: u32 = 1 << 20;

/// Why a listener without TLS is restricted to loopback.
const NO_TLS: &str = "without TLS it may listen only on loopback (127.0.0.1). Set tls.dir (`unveil tls init --out DIR` creates the \
                      certificates), or, if the network itself encrypts, tls.insecure = true and a token";
/// Why a listener without caller authentication is restricted to loopback.
const NO_AUTHENTICATION: &str = "anyone who reaches it could call it. Set auth.token_env or auth.token_file, or require client \
                                 certificates (tls.dir with tls.mutual = true)";

/// Options for serving.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Full names of the services that health reports (`NamedService::NAME`), in addition to the server as a whole.
    pub health_names: Vec<&'static str>,
    /// Time for running calls to finish after shutdown is requested.
    pub drain_timeout: Duration,
    /// TLS settings; `None`: plain HTTP/2.
    pub tls: Option<ServerTls>,
    /// Token, number of concurrent calls, and time per call.
    pub guard: Guard,
    /// Maximum number of concurrent calls per connection; further calls wait at the sender.
    pub max_calls_per_connection: Option<u32>,
    /// Whether health reports `health_names` as serving from the start or only after [`RunningServer::set_serving`].
    pub initially_serving: bool,
    /// Allows plaintext on non-loopback addresses (the network encrypts).
    pub insecure: bool,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            health_names: Vec::new(),
            drain_timeout: Duration::from_secs(5),
            tls: None,
            guard: Guard::default(),
            max_calls_per_connection: None,
            initially_serving: true,
            insecure: false,
        }
    }
}

impl ServeOptions {
    /// Checks that a service at a non-loopback `address` uses TLS and authenticates its callers.
    fn check(&self, address: SocketAddr) -> Result<(), ServiceError> {
        check_exposure(address, self.tls.is_some(), self.insecure)?;
        let authenticates = self.guard.requires_token() || self.tls.as_ref().is_some_and(|t| t.client_ca.is_some());
        match authenticates || address.ip().is_loopback() {
            true => Ok(()),
            false => Err(ServiceError::Exposed { address: address.to_string(), why: NO_AUTHENTICATION }),
        }
    }
}

/// Checks that a listener on a non-loopback address uses TLS or is explicitly allowed not to.
pub(crate) fn check_exposure(address: SocketAddr, tls: bool, insecure: bool) -> Result<(), ServiceError> {
    if tls || address.ip().is_loopback() {
        return Ok(());
    }
    if !insecure {
        return Err(ServiceError::Exposed { address: address.to_string(), why: NO_TLS });
    }
    tracing::warn!(
        %address,
        "INSECURE: listening without TLS (tls.insecure = true); token, data and weights are visible on the network"
    );
    Ok(())
}

/// A server running in the background. Dropping it does not stop it: cancel its token, then call [`RunningServer::wait`].
#[derive(Debug)]
pub struct RunningServer {
    /// The bound address.
    pub address: SocketAddr,
    reporter: HealthReporter,
    health_names: Vec<&'static str>,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), ServiceError>>,
}

impl RunningServer {
    /// Reports the services of this server as serving, unless it is shutting down.
    pub async fn set_serving(&self) {
        set_status(&self.reporter, &self.health_names, ServingStatus::Serving).await;
        if self.shutdown.is_cancelled() {
            set_status(&self.reporter, &self.health_names, ServingStatus::NotServing).await;
        }
    }

    /// Waits until the server has stopped.
    ///
    /// # Errors
    /// Returns [`ServiceError::Server`] if the transport failed and [`ServiceError::Setup`] if the server's task panicked.
    pub async fn wait(self) -> Result<(), ServiceError> {
        self.task.await.map_err(|e| ServiceError::Setup(format!("the server's task ended: {e}")))?
    }
}

/// Listens on `host:port`; port 0 selects any free port.
///
/// # Errors
/// Returns [`ServiceError::AddressInUse`] if the port is in use, [`ServiceError::Address`] for an invalid address, and
/// [`ServiceError::Listen`] for other failures.
pub async fn bind(listen: &str) -> Result<(TcpListener, SocketAddr), ServiceError> {
    let fail = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::AddrInUse => ServiceError::AddressInUse { address: listen.to_owned() },
        std::io::ErrorKind::InvalidInput => ServiceError::Address {
            address: listen.to_owned(),
            reason: source.to_string(),
            form: "host:port, with port 0 for any free port",
        },
        _ => ServiceError::Listen { address: listen.to_owned(), source },
    };
    let listener = TcpListener::bind(listen).await.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    Ok((listener, address))
}

/// Serves `routes` together with health and reflection in the background until `shutdown` is cancelled.
///
/// # Errors
/// See [`bind`]; also returns [`ServiceError::Exposed`] for an unprotected non-loopback listener and [`ServiceError::Setup`] if TLS or
/// reflection cannot be set up.
pub async fn start(
    listen: &str,
    routes: Routes,
    options: ServeOptions,
    shutdown: CancellationToken,
) -> Result<RunningServer, ServiceError> {
    let (listener, address) = bind(listen).await?;
    options.check(address)?;
    let (reporter, health) = tonic_health::server::health_reporter();
    let initial_status = if options.initially_serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    set_status(&reporter, &options.health_names, initial_status).await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(unveil_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(HEALTH_DESCRIPTORS)
    };
    let setup = |e: tonic_reflection::server::Error| ServiceError::Setup(format!("reflection: {e}"));
    let routes = routes
        .add_service(health)
        .add_service(reflection().build_v1().map_err(setup)?)
        .add_service(reflection().build_v1alpha().map_err(setup)?);
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(Duration::from_secs(30)));
    let stop_token = shutdown.clone();
    let stop_names = options.health_names.clone();
    let stop_reporter = reporter.clone();
    let stop = async move {
        stop_token.cancelled().await;
        set_status(&stop_reporter, &stop_names, ServingStatus::NotServing).await;
        set_status(&stop_reporter, &[""], ServingStatus::NotServing).await;
    };
    let server = with_tls(Server::builder(), options.tls.as_ref())?
        .initial_stream_window_size(crate::STREAM_WINDOW)
        .initial_connection_window_size(crate::CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME_BYTES)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(options.max_calls_per_connection)
        .layer(options.guard.clone())
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop);
    let health_names = options.health_names;
    let token = shutdown.clone();
    let task = tokio::spawn(async move {
        tokio::select! {
            result = server => result.map_err(|source| ServiceError::Server { address: address.to_string(), source }),
            () = async { shutdown.cancelled().await; tokio::time::sleep(options.drain_timeout).await } => {
                tracing::warn!(%address, drain_s = options.drain_timeout.as_secs_f64(), "dropping calls still running after shutdown");
                Ok(())
            }
        }
    });
    Ok(RunningServer { address, reporter, health_names, shutdown: token, task })
}

async fn set_status(reporter: &HealthReporter, names: &[&'static str], status: ServingStatus) {
    for name in names {
        reporter.set_service_status(*name, status).await;
    }
}

/// Configures TLS on a server, if any.
pub(crate) fn with_tls(server: Server, tls: Option<&ServerTls>) -> Result<Server, ServiceError> {
    let Some(tls) = tls else { return Ok(server) };
    let setup = |e| ServiceError::Setup(format!("TLS: {}", crate::client::error_chain(&e)));
    server.tls_config(tls.load()?).map_err(setup)
}

/// Starts a server as [`start`] does, calls `ready` with the bound address, and waits until the server has stopped.
///
/// # Errors
/// See [`start`] and [`RunningServer::wait`].
pub async fn serve(
    listen: &str,
    routes: Routes,
    options: ServeOptions,
    shutdown: CancellationToken,
    ready: impl FnOnce(SocketAddr),
) -> Result<(), ServiceError> {
    let running = start(listen, routes, options, shutdown).await?;
    ready(running.address);
    running.wait().await
}

/// Returns a token that is cancelled by the first interrupt (Ctrl-C), SIGTERM or SIGUSR1. Batch systems send SIGUSR1 before preemption.
///
/// # Errors
/// Returns an error if the signal handlers cannot be installed.
pub fn cancel_on_signal() -> std::io::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut preempt = signal(SignalKind::user_defined1())?;
    let token = CancellationToken::new();
    let cancel = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => tracing::info!("received SIGINT, stopping"),
            _ = terminate.recv() => tracing::info!("received SIGTERM, stopping"),
            _ = preempt.recv() => tracing::info!("received SIGUSR1 (preemption), stopping"),
        }
        cancel.cancel();
    });
    Ok(token)
}

#[cfg(test)]
mod tests {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus as Status;
    use tonic_health::pb::health_client::HealthClient;

    use super::*;

    #[tokio::test]
    async fn serves_health_and_stops() {
        let stop = CancellationToken::new();
        let options = ServeOptions { health_names: vec!["unveil.v1.Reward"], ..Default::default() };
        let running = start("127.0.0.1:0", Routes::default(), options, stop.clone()).await.unwrap();
        assert_ne!(running.address.port(), 0);
        let channel = crate::connect(&running.address.to_string(), Duration::from_secs(5)).await.unwrap();
        let mut health = HealthClient::new(channel);
        for service in ["", "unveil.v1.Reward"] {
            let r = health.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
            assert_eq!(r.status(), Status::Serving);
        }
        stop.cancel();
        tokio::time::timeout(Duration::from_secs(6), running.wait()).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn services_can_be_marked_serving_later() {
        let stop = CancellationToken::new();
        let options =
            ServeOptions { health_names: vec!["unveil.v1.Reward"], initially_serving: false, ..Default::default() };
        let running = start("127.0.0.1:0", Routes::default(), options, stop.clone()).await.unwrap();
        let address = running.address.to_string();
        let is_serving = async |name: &str| crate::check_health(&address, name, Duration::from_secs(5)).await.unwrap();
        assert!(is_serving("").await && !is_serving("unveil.v1.Reward").await);
        running.set_serving().await;
        assert!(is_serving("").await && is_serving("unveil.v1.Reward").await);
        // An open connection outlives the token, so the watch reports the last status set.
        let channel = crate::connect(&address, Duration::from_secs(5)).await.unwrap();
        let watch = HealthCheckRequest { service: "unveil.v1.Reward".into() };
        let mut statuses = HealthClient::new(channel).watch(watch).await.unwrap().into_inner();
        assert_eq!(statuses.message().await.unwrap().unwrap().status(), Status::Serving);
        stop.cancel();
        running.set_serving().await;
        assert_eq!(statuses.message().await.unwrap().unwrap().status(), Status::NotServing, "it stays not serving");
    }

    #[tokio::test]
    async fn port_in_use_and_invalid_address() {
        let (_held, address) = bind("127.0.0.1:0").await.unwrap();
        let e = start(&address.to_string(), Routes::default(), ServeOptions::default(), CancellationToken::new())
            .await
            .unwrap_err();
        assert!(e.is_permanent() && e.to_string().contains(&address.to_string()), "{e}");
        assert!(e.to_string().contains("in use") && e.to_string().contains("port 0"), "{e}");
        assert!(bind("nowhere").await.unwrap_err().to_string().contains("host:port"));
    }

    #[tokio::test]
    async fn connect_times_out_and_names_the_address() {
        let (held, address) = bind("127.0.0.1:0").await.unwrap();
        drop(held);
        let e = crate::connect(&format!("http://{address}"), Duration::from_millis(300)).await.unwrap_err();
        assert!(e.is_retryable() && e.to_string().contains(&address.to_string()), "{e}");
    }
}
