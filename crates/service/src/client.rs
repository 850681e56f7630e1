//! Channels to other roles: connecting with retry and back-off, calls with a deadline.

use std::future::Future;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use unveil_core::Secret;

use crate::error::{ServiceError, retryable};
use crate::tls::ClientTls;

/// Waits between tries with full jitter: each is drawn evenly from nothing up to a bound, which is `first`, doubled each time, up to
/// `most`. Callers that failed together do not come back together.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// Bound of the first wait.
    pub first: Duration,
    /// Bound of the longest wait.
    pub most: Duration,
}

impl Backoff {
    /// Draws the wait before the next try, and doubles the bound for the one after it.
    pub fn draw(&mut self) -> Duration {
        let wait = self.first.mul_f64(rand::random());
        self.first = (self.first * 2).min(self.most);
        wait
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first: Duration::from_millis(50), most: Duration::from_secs(2) }
    }
}

/// How to reach a service besides its address.
#[derive(Debug, Clone, Default)]
pub struct ClientOptions {
    /// How TLS is spoken; none = `https://` addresses are checked with the system's authorities. An address without a scheme is an
    /// `https://` one where this is given.
    pub tls: Option<ClientTls>,
    /// Bearer token; see [`authorised`].
    pub token: Option<Secret>,
    /// The token may leave this machine without TLS.
    pub insecure: bool,
}

/// Connects to `http://host:port` (or `host:port`), trying again with back-off until `deadline` has passed. The channel reconnects by itself afterwards.
///
/// # Errors
/// [`ServiceError::Address`] at once when the address cannot be read, [`ServiceError::Deadline`] when nobody answered.
pub async fn connect(address: &str, deadline: Duration) -> Result<Channel, ServiceError> {
    connect_with(address, &ClientOptions::default(), deadline).await
}

/// [`connect`], as `options` say. The name in the address is looked up again for every connection, so a service may come back
/// elsewhere.
///
/// # Errors
/// As [`connect`]; [`ServiceError::Setup`] when a file of the options cannot be used; [`ServiceError::Plain`] when a token would
/// leave the machine without TLS.
pub async fn connect_with(address: &str, options: &ClientOptions, deadline: Duration) -> Result<Channel, ServiceError> {
    let endpoint = endpoint(address, options)?;
    let start = Instant::now();
    let mut backoff = Backoff::default();
    loop {
        let left = deadline.saturating_sub(start.elapsed());
        let last = match tokio::time::timeout(left, endpoint.connect()).await {
            Ok(Ok(channel)) => return Ok(channel),
            Ok(Err(e)) => chain(&e),
            Err(_) => "no answer".to_owned(),
        };
        let wait = backoff.draw();
        if start.elapsed() + wait >= deadline {
            return Err(ServiceError::Deadline {
                what: format!("connecting to {address}"),
                waited: start.elapsed(),
                last,
            });
        }
        tokio::time::sleep(wait).await;
    }
}

/// A channel that connects when it is first used; `ca` = PEM file of the authority that `https://` addresses are checked with. Needs a
/// runtime.
///
/// # Errors
/// The address or the file cannot be used.
pub fn lazy_channel(address: &str, ca: Option<&Path>) -> Result<Channel, ServiceError> {
    let tls = ca.map(|ca| ClientTls { ca: Some(ca.into()), identity: None });
    Ok(endpoint(address, &ClientOptions { tls, ..ClientOptions::default() })?.connect_lazy())
}

/// Puts a bearer token into a request.
///
/// # Errors
/// [`Status::invalid_argument`] when the token holds characters that no header can carry.
pub fn authorised<T>(mut request: Request<T>, token: Option<&Secret>) -> Result<Request<T>, Status> {
    if let Some(token) = token {
        let value = format!("Bearer {}", token.reveal()).parse();
        let bad = |_| Status::invalid_argument("the bearer token holds characters that no header can carry");
        request.metadata_mut().insert("authorization", value.map_err(bad)?);
    }
    Ok(request)
}

fn endpoint(address: &str, options: &ClientOptions) -> Result<Endpoint, ServiceError> {
    let bad = |reason: String| ServiceError::Address { address: address.to_owned(), reason, form: "http://host:port" };
    let scheme = if options.tls.is_some() { "https" } else { "http" };
    let url = if address.contains("://") { address.to_owned() } else { format!("{scheme}://{address}") };
    let mut endpoint = Endpoint::from_shared(url).map_err(|e| bad(chain(&e)))?;
    if endpoint.uri().port_u16().is_none() || endpoint.uri().host().is_none_or(str::is_empty) {
        return Err(bad("host or port is missing".to_owned()));
    }
    if endpoint.uri().scheme_str() == Some("https") {
        let setup = |e| ServiceError::Setup(format!("TLS to {address}: {}", chain(&e)));
        let tls = options.tls.clone().unwrap_or_default();
        endpoint = endpoint.tls_config(tls.load()?).map_err(setup)?;
    } else if options.token.is_some() && !options.insecure && !endpoint.uri().host().is_some_and(stays_here) {
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

/// Whether a host of an address is this machine whatever a name service says.
fn stays_here(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The request with a deadline that the server learns of, too.
pub fn with_deadline<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// Makes an idempotent call until it succeeds, fails for good, or `deadline` has passed. `call` gets the time that is left.
///
/// # Errors
/// [`ServiceError::Call`] for an answer that a repetition cannot change, [`ServiceError::Deadline`] when time is up.
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
            Ok(Err(status)) if !retryable(&status) => {
                return Err(ServiceError::Call { what: what.to_owned(), status: Box::new(status) });
            }
            Ok(Err(status)) => last = format!("{:?}: {}", status.code(), status.message()),
            Err(_) => {}
        }
        let wait = backoff.draw();
        if start.elapsed() + wait >= deadline {
            return Err(ServiceError::Deadline { what: what.to_owned(), waited: start.elapsed(), last });
        }
        tokio::time::sleep(wait).await;
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
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
    fn a_token_does_not_leave_the_machine_in_the_clear() {
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
    async fn retry_stops_for_good_on_a_permanent_answer() {
        let calls = Cell::new(0);
        let r: Result<(), _> = retry("x", Duration::from_secs(10), Backoff::default(), |_| {
            calls.set(calls.get() + 1);
            let n = calls.get();
            async move { Err(if n < 3 { Status::unavailable("down") } else { Status::not_found("gone") }) }
        })
        .await;
        assert!(calls.get() == 3 && r.unwrap_err().is_permanent());
    }

    /// Two hundred callers that a service refuses at once: their tries spread over the whole of each wait, and no bound is passed.
    #[tokio::test(start_paused = true)]
    async fn callers_that_failed_together_do_not_come_back_together() {
        let begun = Instant::now();
        let mut tries: [Vec<u128>; 3] = Default::default();
        for _ in 0..200 {
            let (mut backoff, mut at) = (Backoff::default(), Duration::ZERO);
            for (n, tries) in tries.iter_mut().enumerate() {
                let wait = backoff.draw();
                assert!(wait <= Duration::from_millis(50) * (1 << n));
                at += wait;
                tries.push(at.as_micros());
            }
        }
        for (n, mut tries) in tries.into_iter().enumerate() {
            tries.sort_unstable();
            let spread = tries[190] - tries[10];
            assert!(spread > 25_000 << n, "try {n}: {spread} us");
        }
        let mut longest = Backoff::default();
        assert!((0..100).all(|_| longest.draw() <= longest.most) && longest.first == longest.most);
        // The loop waits for what was drawn.
        let times = std::cell::RefCell::new(Vec::new());
        let down = |_| {
            times.borrow_mut().push(begun.elapsed());
            std::future::ready(Err::<(), _>(Status::unavailable("down")))
        };
        retry("x", Duration::from_secs(20), Backoff::default(), down).await.unwrap_err();
        let times = times.into_inner();
        let waits: Vec<Duration> = times.windows(2).map(|t| t[1] - t[0]).collect();
        assert!(waits.len() > 8 && waits.iter().all(|w| *w <= Duration::from_millis(2001)), "{waits:?}");
        assert!(waits.windows(2).any(|w| w[1] < w[0]), "no wait is drawn: {waits:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn retry_keeps_its_deadline() {
        let r: Result<(), _> =
            retry("x", Duration::from_secs(3), Backoff::default(), |_| std::future::pending::<Result<(), Status>>())
                .await;
        let e = r.unwrap_err();
        assert!(e.is_retryable() && e.to_string().contains("within 3.0 s"), "{e}");
    }
}
