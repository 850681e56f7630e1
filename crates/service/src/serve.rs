//! Serving: bind, health, reflection, keep-alive, and an end that lets calls finish, but not for ever.

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

/// Largest HTTP/2 frame that is taken, in bytes.
const FRAME: u32 = 1 << 20;

/// Why a plain listener stays on this machine.
const NO_TLS: &str = "without TLS it may listen on loopback (127.0.0.1) only. Set tls.dir (`unveil tls init --out DIR` makes the \
                      certificates), or, where the network itself encrypts, tls.insecure = true and a token";
/// Why a listener that knows no caller stays on this machine.
const NO_CALLER: &str = "whoever reaches it could call. Set auth.token_env or auth.token_file, or want client certificates (tls.dir \
                         with tls.mutual = true)";

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Full names of the services that health answers for (`NamedService::NAME`), besides the server as a whole.
    pub names: Vec<&'static str>,
    /// How long running calls may take to finish after shutdown was asked for.
    pub drain: Duration,
    /// TLS; none = plain HTTP/2.
    pub tls: Option<ServerTls>,
    /// Token, calls at once, time per call.
    pub guard: Guard,
    /// Calls at once per connection; more wait at the sender.
    pub per_connection: Option<u32>,
    /// Health says so of `names` from the start; false = only once [`Running::serving`] was called.
    pub serving: bool,
    /// Beyond loopback, too, it may listen without TLS: the network encrypts.
    pub insecure: bool,
}

impl Default for ServeOptions {
    fn default() -> Self {
        let (tls, guard, per_connection) = (None, Guard::default(), None);
        let (names, drain, serving, insecure) = (Vec::new(), Duration::from_secs(5), true, false);
        Self { names, drain, tls, guard, per_connection, serving, insecure }
    }
}

impl ServeOptions {
    /// What others could do to a service at `address`: beyond loopback it must be TLS, and callers must say who they are.
    fn check(&self, address: SocketAddr) -> Result<(), ServiceError> {
        exposed(address, self.tls.is_some(), self.insecure)?;
        let known = self.guard.wants_token() || self.tls.as_ref().is_some_and(|t| t.client_ca.is_some());
        match known || address.ip().is_loopback() {
            true => Ok(()),
            false => Err(ServiceError::Exposed { address: address.to_string(), why: NO_CALLER }),
        }
    }
}

/// Whether a listener may be where it is: beyond loopback it must be TLS, or the network must encrypt.
pub(crate) fn exposed(address: SocketAddr, tls: bool, insecure: bool) -> Result<(), ServiceError> {
    if tls || address.ip().is_loopback() {
        return Ok(());
    }
    if !insecure {
        return Err(ServiceError::Exposed { address: address.to_string(), why: NO_TLS });
    }
    tracing::warn!(
        %address,
        "INSECURE: listening without TLS (tls.insecure = true). Whoever sees the network sees the token, the data and the weights"
    );
    Ok(())
}

/// A server that runs in the background. Dropping it does not stop it: cancel its token, then [`Running::wait`].
#[derive(Debug)]
pub struct Running {
    /// The bound address, with the real port.
    pub address: SocketAddr,
    reporter: HealthReporter,
    names: Vec<&'static str>,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), ServiceError>>,
}

impl Running {
    /// From here on health says that the services of this server do their work, unless it is told to stop.
    pub async fn serving(&self) {
        tell(&self.reporter, &self.names, ServingStatus::Serving).await;
        if self.shutdown.is_cancelled() {
            tell(&self.reporter, &self.names, ServingStatus::NotServing).await;
        }
    }

    /// Waits for the server's end.
    ///
    /// # Errors
    /// The transport failed, or the server's task died.
    pub async fn wait(self) -> Result<(), ServiceError> {
        self.task.await.map_err(|e| ServiceError::Setup(format!("the server's task ended: {e}")))?
    }
}

/// Listens on `host:port`; port 0 takes any free one.
///
/// # Errors
/// [`ServiceError::AddressInUse`] names the address and what to do.
pub async fn bind(listen: &str) -> Result<(TcpListener, SocketAddr), ServiceError> {
    let fail = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::AddrInUse => ServiceError::AddressInUse { address: listen.to_owned() },
        std::io::ErrorKind::InvalidInput => ServiceError::Address {
            address: listen.to_owned(),
            reason: source.to_string(),
            form: "host:port, with port 0 for any free one",
        },
        _ => ServiceError::Listen { address: listen.to_owned(), source },
    };
    let listener = TcpListener::bind(listen).await.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    Ok((listener, address))
}

/// Serves `routes` with health and reflection beside them, in the background, until `shutdown` is cancelled.
///
/// # Errors
/// See [`bind`].
pub async fn start(
    listen: &str,
    routes: Routes,
    options: ServeOptions,
    shutdown: CancellationToken,
) -> Result<Running, ServiceError> {
    let (listener, address) = bind(listen).await?;
    options.check(address)?;
    let (reporter, health) = tonic_health::server::health_reporter();
    let begin = if options.serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    tell(&reporter, &options.names, begin).await;
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
    let (token, names, ending) = (shutdown.clone(), options.names.clone(), reporter.clone());
    let stop = async move {
        token.cancelled().await;
        tell(&ending, &names, ServingStatus::NotServing).await;
        tell(&ending, &[""], ServingStatus::NotServing).await;
    };
    let server = with_tls(Server::builder(), options.tls.as_ref())?
        .initial_stream_window_size(crate::STREAM_WINDOW)
        .initial_connection_window_size(crate::CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(options.per_connection)
        .layer(options.guard.clone())
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop);
    let (names, token) = (options.names, shutdown.clone());
    let task = tokio::spawn(async move {
        tokio::select! {
            ended = server => ended.map_err(|source| ServiceError::Server { address: address.to_string(), source }),
            () = async { shutdown.cancelled().await; tokio::time::sleep(options.drain).await } => {
                tracing::warn!(%address, "calls were still running {:.1} s after shutdown: dropped", options.drain.as_secs_f64());
                Ok(())
            }
        }
    });
    Ok(Running { address, reporter, names, shutdown: token, task })
}

async fn tell(reporter: &HealthReporter, names: &[&'static str], status: ServingStatus) {
    for name in names {
        reporter.set_service_status(*name, status).await;
    }
}

/// A server that speaks TLS where that is wanted.
pub(crate) fn with_tls(server: Server, tls: Option<&ServerTls>) -> Result<Server, ServiceError> {
    let Some(tls) = tls else { return Ok(server) };
    let setup = |e| ServiceError::Setup(format!("TLS: {}", crate::client::chain(&e)));
    server.tls_config(tls.load()?).map_err(setup)
}

/// [`start`], then `ready` with the bound address, then waits for the end.
///
/// # Errors
/// See [`bind`] and [`Running::wait`].
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

/// A token that the first interrupt (Ctrl-C), SIGTERM or SIGUSR1 cancels; by the last a batch system says that time is short.
///
/// # Errors
/// The signals cannot be listened for.
pub fn cancel_on_signal() -> std::io::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut preempt = signal(SignalKind::user_defined1())?;
    let token = CancellationToken::new();
    let cancel = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => tracing::info!("interrupted: stopping"),
            _ = terminate.recv() => tracing::info!("told to stop: stopping"),
            _ = preempt.recv() => tracing::info!("told that time is short: stopping"),
        }
        cancel.cancel();
    });
    Ok(token)
}

#[cfg(test)]
mod tests {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus as Answered;
    use tonic_health::pb::health_client::HealthClient;

    use super::*;

    #[tokio::test]
    async fn serves_health_and_stops() {
        let stop = CancellationToken::new();
        let options = ServeOptions { names: vec!["unveil.v1.Reward"], ..Default::default() };
        let running = start("127.0.0.1:0", Routes::default(), options, stop.clone()).await.unwrap();
        assert_ne!(running.address.port(), 0);
        let channel = crate::connect(&running.address.to_string(), Duration::from_secs(5)).await.unwrap();
        let mut health = HealthClient::new(channel);
        for service in ["", "unveil.v1.Reward"] {
            let r = health.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
            assert_eq!(r.status(), Answered::Serving);
        }
        stop.cancel();
        tokio::time::timeout(Duration::from_secs(6), running.wait()).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_service_that_is_not_ready_yet_says_so_and_the_process_lives() {
        let stop = CancellationToken::new();
        let options = ServeOptions { names: vec!["unveil.v1.Reward"], serving: false, ..Default::default() };
        let running = start("127.0.0.1:0", Routes::default(), options, stop.clone()).await.unwrap();
        let address = running.address.to_string();
        let asked = async |name: &str| crate::check_health(&address, name, Duration::from_secs(5)).await.unwrap();
        assert!(asked("").await && !asked("unveil.v1.Reward").await);
        running.serving().await;
        assert!(asked("").await && asked("unveil.v1.Reward").await);
        // Kept open, the connection outlives the token: what health says on it is what it was told.
        let channel = crate::connect(&address, Duration::from_secs(5)).await.unwrap();
        let watch = HealthCheckRequest { service: "unveil.v1.Reward".into() };
        let mut told = HealthClient::new(channel).watch(watch).await.unwrap().into_inner();
        assert_eq!(told.message().await.unwrap().unwrap().status(), Answered::Serving);
        stop.cancel();
        running.serving().await;
        assert_eq!(told.message().await.unwrap().unwrap().status(), Answered::NotServing, "it does not come back");
    }

    #[tokio::test]
    async fn port_in_use_and_bad_address() {
        let (_held, address) = bind("127.0.0.1:0").await.unwrap();
        let e = start(&address.to_string(), Routes::default(), ServeOptions::default(), CancellationToken::new())
            .await
            .unwrap_err();
        assert!(e.is_permanent() && e.to_string().contains(&address.to_string()), "{e}");
        assert!(e.to_string().contains("in use") && e.to_string().contains("port 0"), "{e}");
        assert!(bind("nowhere").await.unwrap_err().to_string().contains("host:port"));
    }

    #[tokio::test]
    async fn connect_gives_up_and_says_where() {
        let (held, address) = bind("127.0.0.1:0").await.unwrap();
        drop(held);
        let e = crate::connect(&format!("http://{address}"), Duration::from_millis(300)).await.unwrap_err();
        assert!(e.is_retryable() && e.to_string().contains(&address.to_string()), "{e}");
    }
}
