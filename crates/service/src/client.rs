//! Channels to other roles: connections with retry and back-off, and calls with a deadline.

use std::future::Future;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use unveil_core::Secret;

use crate::error::{ServiceError, is_retryable};
use crate::tls::ClientTls;

/// Exponential back-off with full jitter: each delay is uniform between zero and a bound that starts at `initial` and doubles up to `max`.
/// Callers that failed together therefore do not retry together.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// Bound of the next delay.
    pub initial: Duration,
    /// Maximum of the bound.
    pub max: Duration,
}

impl Backoff {
    /// Draws the delay before the next attempt and doubles the bound for the one after it.
    pub fn next_delay(&mut self) -> Duration {
        let delay = self.initial.mul_f64(rand::random());
        self.initial = (self.initial * 2).min(self.max);
        delay
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self { initial: Duration::from_millis(50), max: Duration::from_secs(2) }
    }
}

/// Options for calls to a service.
#[derive(Debug, Clone, Default)]
pub struct ClientOptions {
    /// TLS settings. `None`: `https://` addresses are verified with the system's authorities. With TLS settings, an address without a scheme
    /// means `https://`.
    pub tls: Option<ClientTls>,
    /// Bearer token, see [`authorize`].
    pub token: Option<Secret>,
    /// Allows sending the token to other machines without TLS.
    pub insecure: bool,
}

/// Connects to `http://host:port` (or `host:port`), retrying with back-off until `deadline` has passed. The channel reconnects automatically
/// afterwards.
///
/// # Errors
/// Returns [`ServiceError::Address`] immediately for an invalid address and [`ServiceError::Deadline`] if no connection succeeds in time.
pub async fn connect(address: &str, deadline: Duration) -> Result<Channel, ServiceError> {
    connect_with(address, &ClientOptions::default(), deadline).await
}

/// Connects as [`connect`] does, with `options`. The host name is resolved again for every connection, so a service may move to another
/// address.
///
/// # Errors
/// See [`connect`]; also returns [`ServiceError::Setup`] if a file named in the options cannot be used and [`ServiceError::Plain`] if a token
/// would be sent to another machine without TLS.
pub async fn connect_with(address: &str, options: &ClientOptions, deadline: Duration) -> Result<Channel, ServiceError> {
    let endpoint = endpoint(address, options)?;
    let start = Instant::now();
    let mut backoff = Backoff::default();
    loop {
        let left = deadline.saturating_sub(start.elapsed());
        let last = match tokio::time::timeout(left, endpoint.connect()).await {
            Ok(Ok(channel)) => return Ok(channel),
            Ok(Err(e)) => error_chain(&e),
            Err(_) => "no answer".to_owned(),
        };
        let delay = backoff.next_delay();
        if start.elapsed() + delay >= deadline {
            return Err(ServiceError::Deadline {
                what: format!("connecting to {address}"),
                waited: start.elapsed(),
                last,
            });
        }
        tokio::time::sleep(delay).await;
    }
}

/// Returns a channel that connects on first use; `ca` is a PEM file with the authority for `https://` addresses. Must be called within a
/// Tokio runtime.
///
/// # Errors
/// Returns [`ServiceError::Address`] for an invalid address and [`ServiceError::Setup`] if the file cannot be used.
pub fn lazy_channel(address: &str, ca: Option<&Path>) -> Result<Channel, ServiceError> {
    let tls = ca.map(|ca| ClientTls { ca: Some(ca.into()), identity: None });
    Ok(endpoint(address, &ClientOptions { tls, ..ClientOptions::default() })?.connect_lazy())
}

/// Adds a bearer token to a request.
///
/// # Errors
/// Returns [`Status::invalid_argument`] if the token contains characters that are invalid in a header.
pub fn authorize<T>(mut request: Request<T>, token: Option<&Secret>) -> Result<Request<T>, Status> {
    if let Some(token) = token {
        let value = format!("Bearer {}", token.reveal()).parse();
        let invalid = |_| Status::invalid_argument("the bearer token contains characters that are invalid in a header");
        request.metadata_mut().insert("authorization", value.map_err(invalid)?);
    }
    Ok(request)
}

fn endpoint(address: &str, options: &ClientOptions) -> Result<Endpoint, ServiceError> {
    let invalid =
        |reason: String| ServiceError::Address { address: address.to_owned(), reason, form: "http://host:port" };
    let scheme = if options.tls.is_some() { "https" } else { "http" };
    let url = if address.contains("://") { address.to_owned() } else { format!("{scheme}://{address}") };
    let mut endpoint = Endpoint::from_shared(url).map_err(|e| invalid(error_chain(&e)))?;
    if endpoint.uri().port_u16().is_none() || endpoint.uri().host().is_none_or(str::is_empty) {
        return Err(invalid("host or port is missing".to_owned()));
    }
    if endpoint.uri().scheme_str() == Some("https") {
        let setup = |e| ServiceError::Setup(format!("TLS to {address}: {}", error_chain(&e)));
        let tls = options.tls.clone().unwrap_or_default();
        endpoint = endpoint.tls_config(tls.load()?).map_err(setup)?;
    } else if options.token.is_some() && !options.insecure && !endpoint.uri().host().is_some_and(is_local) {
        return Err(ServiceError::Plain { address: address.to_owned() });
    }
    Ok(endpoint
        .connect_timeout(Duration::from_secs(5))
        .tcp_nodelay(true)
        .tcp_keepalive(Some(Duration::from_secs(30)))
        .initial_stream_window_size(crate::STREAM_WINDOW)
        .initial_connection_window_size(crate::CONNECTION_WINDOW)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true))
}

/// Returns whether a host is this machine regardless of name resolution.
fn is_local(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Returns a request with a deadline that is also sent to the server.
pub fn with_deadline<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// Retries an idempotent call until it succeeds, fails permanently, or `deadline` has passed. `call` is given the remaining time.
///
/// # Errors
/// Returns [`ServiceError::Call`] for a permanent error and [`ServiceError::Deadline`] when time is up.
pub async fn retry<T, F, Fut>(
    what: &str,
    deadline: Duration,
    mut backoff: Backoff,
    mut call: F,
) -> Result<T, ServiceError>
where
    F: FnMut(Duration) -> Fut,
    Fut: Future<Output = Result<T, Status>>,
{
    let start = Instant::now();
    let mut last = "no answer".to_owned();
    loop {
        let left = deadline.saturating_sub(start.elapsed());
        match tokio::time::timeout(left, call(left)).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(status)) if !is_retryable(&status) => {
                return Err(ServiceError::Call { what: what.to_owned(), status: Box::new(status) });
            }
            Ok(Err(status)) => last = format!("{:?}: {}", status.code(), status.message()),
            Err(_) => {}
        }
        let delay = backoff.next_delay();
        if start.elapsed() + delay >= deadline {
            return Err(ServiceError::Deadline { what: what.to_owned(), waited: start.elapsed(), last });
        }
        tokio::time::sleep(delay).await;
    }
}

/// Formats an error with its causes on one line.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        let next = e.to_string();
        if !out.contains(&next) {
            out = format!("{out}: {next}");
        }
        source = e.source();
    }
    out
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn addresses() {
        assert!(endpoint("127.0.0.1:80", &ClientOptions::default()).is_ok());
        for bad in ["", "http://", "nowhere", "http://a b:1"] {
            let e = endpoint(bad, &ClientOptions::default()).unwrap_err();
            assert!(e.is_permanent() && e.to_string().contains("http://host:port"), "{e}");
        }
    }

    #[test]
    fn tokens_are_not_sent_unencrypted() {
        let token = Some(Secret::new("0123456789abcdef"));
        let options = ClientOptions { token: token.clone(), ..ClientOptions::default() };
        for here in ["127.0.0.1:80", "http://[::1]:80", "localhost:80", "https://learner:80"] {
            endpoint(here, &options).unwrap();
        }
        for there in ["learner:80", "http://10.0.0.1:80", "http://[fe80::1]:80", "http://localhost.example:80"] {
            let e = endpoint(there, &options).unwrap_err();
            assert!(e.is_permanent() && e.to_string().contains(there) && e.to_string().contains("tls.dir"), "{e}");
            endpoint(there, &ClientOptions { insecure: true, ..options.clone() }).unwrap();
            endpoint(there, &ClientOptions { token: None, ..options.clone() }).unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn retry_stops_on_a_permanent_error() {
        let calls = Cell::new(0);
        let r: Result<(), _> = retry("x", Duration::from_secs(10), Backoff::default(), |_| {
            calls.set(calls.get() + 1);
            let n = calls.get();
            async move { Err(if n < 3 { Status::unavailable("down") } else { Status::not_found("gone") }) }
        })
        .await;
        assert!(calls.get() == 3 && r.unwrap_err().is_permanent());
    }

    /// Two hundred callers refused simultaneously: their attempts spread over the whole range of each delay, and no bound is exceeded.
    #[tokio::test(start_paused = true)]
    async fn backoff_spreads_simultaneous_retries() {
        let start = Instant::now();
        let mut attempts: [Vec<u128>; 3] = Default::default();
        for _ in 0..200 {
            let mut backoff = Backoff::default();
            let mut elapsed = Duration::ZERO;
            for (n, attempts) in attempts.iter_mut().enumerate() {
                let delay = backoff.next_delay();
                assert!(delay <= Duration::from_millis(50) * (1 << n));
                elapsed += delay;
                attempts.push(elapsed.as_micros());
            }
        }
        for (n, mut attempts) in attempts.into_iter().enumerate() {
            attempts.sort_unstable();
            let spread = attempts[190] - attempts[10];
            assert!(spread > 25_000 << n, "try {n}: {spread} us");
        }
        let mut longest = Backoff::default();
        assert!((0..100).all(|_| longest.next_delay() <= longest.max) && longest.initial == longest.max);
        // The retry loop waits for the drawn delays.
        let times = std::cell::RefCell::new(Vec::new());
        let down = |_| {
            times.borrow_mut().push(start.elapsed());
            std::future::ready(Err::<(), _>(Status::unavailable("down")))
        };
        retry("x", Duration::from_secs(20), Backoff::default(), down).await.unwrap_err();
        let times = times.into_inner();
        let waits: Vec<Duration> = times.windows(2).map(|t| t[1] - t[0]).collect();
        assert!(waits.len() > 8 && waits.iter().all(|w| *w <= Duration::from_millis(2001)), "{waits:?}");
        assert!(waits.windows(2).any(|w| w[1] < w[0]), "delays are not random: {waits:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn retry_respects_the_deadline() {
        let r: Result<(), _> =
            retry("x", Duration::from_secs(3), Backoff::default(), |_| std::future::pending::<Result<(), Status>>())
                .await;
        let e = r.unwrap_err();
        assert!(e.is_retryable() && e.to_string().contains("within 3.0 s"), "{e}");
    }
}
