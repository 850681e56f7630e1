//! Admission of calls: bearer token, caller's certificate, number of concurrent calls, and time per call.
//!
//! A call is admitted before its message is read, so that excess calls cost no memory.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};
use unveil_core::Secret;

use crate::Callers;

/// Prefix of the health service, which needs neither token nor permit because probes have none.
const HEALTH: &str = "/grpc.health.v1.Health/";
/// Prefix of the reflection services, which need the token but no permit.
const REFLECTION: &str = "/grpc.reflection.";

/// Admission rules for the calls of a server. Clones share the counters.
#[derive(Debug, Clone)]
pub struct Guard {
    shared: Arc<Shared>,
    callers: Option<Arc<Callers>>,
}

#[derive(Debug)]
struct Shared {
    token: Option<blake3::Hash>,
    permits: Arc<Semaphore>,
    max_calls: usize,
    call_timeout: Option<Duration>,
    streams: BTreeSet<&'static str>,
    refused: AtomicU64,
    unauthenticated: AtomicU64,
    timed_out: AtomicU64,
}

/// Permit for one of the concurrent calls. The handler of a stream takes it from the request's extensions and keeps it while the stream
/// lives.
#[derive(Debug, Clone)]
pub struct CallPermit {
    _permit: Arc<OwnedSemaphorePermit>,
}

/// Counters of a guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuardCounts {
    /// Calls in progress.
    pub in_flight: usize,
    /// Calls refused because too many were in progress.
    pub refused: u64,
    /// Calls with a missing or wrong token or with the certificate of a role that may not call.
    pub unauthenticated: u64,
    /// Calls that exceeded the time per call.
    pub timed_out: u64,
}

impl Default for Guard {
    /// Returns a guard that admits every call.
    fn default() -> Self {
        Self::new(None, Semaphore::MAX_PERMITS, None, &[])
    }
}

impl Guard {
    /// Creates a guard that requires `token` (if any) and limits the number of concurrent calls and the time per call. `streams` are paths
    /// (`/package.Service/Method`) of streaming calls, whose handlers keep the [`CallPermit`] and limit their own waits.
    pub fn new(
        token: Option<&Secret>,
        max_calls: usize,
        call_timeout: Option<Duration>,
        streams: &[&'static str],
    ) -> Self {
        let max_calls = max_calls.min(Semaphore::MAX_PERMITS);
        Self {
            callers: None,
            shared: Arc::new(Shared {
                token: token.map(|t| blake3::hash(format!("Bearer {}", t.reveal()).as_bytes())),
                permits: Arc::new(Semaphore::new(max_calls)),
                max_calls,
                call_timeout,
                streams: streams.iter().copied().collect(),
                refused: AtomicU64::new(0),
                unauthenticated: AtomicU64::new(0),
                timed_out: AtomicU64::new(0),
            }),
        }
    }

    /// Restricts callers to the roles in `callers`; `None` admits any role.
    pub fn with_callers(mut self, callers: Option<Callers>) -> Self {
        self.callers = callers.map(Arc::new);
        self
    }

    /// Returns whether calls need a token.
    pub fn requires_token(&self) -> bool {
        self.shared.token.is_some()
    }

    /// Returns the current counters.
    pub fn counts(&self) -> GuardCounts {
        let s = &self.shared;
        GuardCounts {
            in_flight: s.max_calls - s.permits.available_permits(),
            refused: s.refused.load(Ordering::Relaxed),
            unauthenticated: s.unauthenticated.load(Ordering::Relaxed),
            timed_out: s.timed_out.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    /// Returns whether the request has the right token; hashes are compared in constant time.
    fn has_token<B>(&self, request: &Request<B>) -> bool {
        let Some(token) = &self.token else { return true };
        let presented = request.headers().get("authorization").map(|v| blake3::hash(v.as_bytes()));
        let matches = presented.is_some_and(|hash| hash == *token);
        if !matches {
            self.unauthenticated.fetch_add(1, Ordering::Relaxed);
        }
        matches
    }

    fn try_acquire(&self) -> Option<CallPermit> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok();
        if permit.is_none() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        permit.map(|permit| CallPermit { _permit: Arc::new(permit) })
    }
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, shared: Arc::clone(&self.shared), callers: self.callers.clone() }
    }
}

/// A service protected by a [`Guard`].
#[derive(Debug, Clone)]
pub struct Guarded<S> {
    inner: S,
    shared: Arc<Shared>,
    callers: Option<Arc<Callers>>,
}

impl<S, B, R> Service<Request<B>> for Guarded<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: Default + Send + 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let path = request.uri().path();
        if path.starts_with(HEALTH) {
            return Box::pin(self.inner.call(request));
        }
        if !self.shared.has_token(&request) {
            return refuse(Status::unauthenticated("the bearer token is missing or wrong"));
        }
        if path.starts_with(REFLECTION) {
            return Box::pin(self.inner.call(request));
        }
        if let Some(Err(why)) = self.callers.as_ref().map(|c| c.admit(&request)) {
            self.shared.unauthenticated.fetch_add(1, Ordering::Relaxed);
            return refuse(Status::permission_denied(why));
        }
        let is_stream = self.shared.streams.contains(path);
        let Some(permit) = self.shared.try_acquire() else {
            let max_calls = self.shared.max_calls;
            return refuse(Status::resource_exhausted(format!(
                "{max_calls} calls are already in progress: retry later"
            )));
        };
        request.extensions_mut().insert(permit.clone());
        let answer = self.inner.call(request);
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let _permit = permit;
            let Some(timeout) = shared.call_timeout.filter(|_| !is_stream) else { return answer.await };
            tokio::time::timeout(timeout, answer).await.unwrap_or_else(|_| {
                shared.timed_out.fetch_add(1, Ordering::Relaxed);
                let what = format!("the call took longer than {:.1} s", timeout.as_secs_f64());
                Ok(Status::deadline_exceeded(what).into_http())
            })
        })
    }
}

fn refuse<R, E>(status: Status) -> Pin<Box<dyn Future<Output = Result<Response<R>, E>> + Send>>
where
    R: Default + Send + 'static,
    E: Send + 'static,
{
    Box::pin(std::future::ready(Ok(status.into_http())))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Answer = Response<String>;

    async fn slow(request: Request<u64>) -> Result<Answer, std::convert::Infallible> {
        tokio::time::sleep(Duration::from_millis(*request.body())).await;
        Ok(Response::new("done".to_owned()))
    }

    fn request(path: &str, token: &str, ms: u64) -> Request<u64> {
        Request::builder().uri(path).header("authorization", token).body(ms).unwrap()
    }

    fn code(answer: &Answer) -> Option<&str> {
        answer.headers().get("grpc-status").map(|v| v.to_str().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn token_concurrency_and_timeout() {
        let guard = Guard::new(Some(&Secret::new("abc")), 2, Some(Duration::from_secs(1)), &["/p.S/Stream"]);
        let service = guard.layer(tower::service_fn(slow));
        let call = |path: &str, token: &str, ms: u64| {
            let mut service = service.clone();
            let request = request(path, token, ms);
            tokio::spawn(async move { service.call(request).await.unwrap() })
        };
        for wrong in ["", "abc", "Bearer abd", "bearer abc"] {
            let answer = call("/p.S/M", wrong, 0).await.unwrap();
            assert_eq!((code(&answer), answer.body().as_str()), (Some("16"), ""), "{wrong}");
        }
        assert_eq!(call("/grpc.health.v1.Health/Check", "", 0).await.unwrap().body(), "done");
        let held = [call("/p.S/M", "Bearer abc", 500), call("/p.S/Stream", "Bearer abc", 5000)];
        tokio::task::yield_now().await;
        let refused = call("/p.S/M", "Bearer abc", 0).await.unwrap();
        assert_eq!(code(&refused), Some("8"), "RESOURCE_EXHAUSTED");
        for h in held {
            assert_eq!(code(&h.await.unwrap()), None, "streams have no time limit");
        }
        let late = call("/p.S/M", "Bearer abc", 5000).await.unwrap();
        assert_eq!(code(&late), Some("4"), "DEADLINE_EXCEEDED");
        let counts = guard.counts();
        assert_eq!(counts, GuardCounts { in_flight: 0, refused: 1, unauthenticated: 4, timed_out: 1 });
    }
}
