//! What stands before every service: the bearer token, the caller's certificate, the number of calls at once, and the time that one may take.
//!
//! A call is admitted before its message is read, so that calls that are too many cost no memory.

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

/// Paths that need no token and no place: whoever watches a service has neither.
const HEALTH: &str = "/grpc.health.v1.Health/";
/// Reflection needs the token, but no place among the calls.
const REFLECTION: &str = "/grpc.reflection.";

/// Rules for the calls of a server. Clones share the counts.
#[derive(Debug, Clone)]
pub struct Guard {
    shared: Arc<Shared>,
    callers: Option<Arc<Callers>>,
}

#[derive(Debug)]
struct Shared {
    token: Option<blake3::Hash>,
    slots: Arc<Semaphore>,
    most: usize,
    call: Option<Duration>,
    streams: BTreeSet<&'static str>,
    refused: AtomicU64,
    unauthenticated: AtomicU64,
    late: AtomicU64,
}

/// A place among the calls at once; a handler of a stream takes it from the request's extensions and keeps it while the stream
/// lives.
#[derive(Debug, Clone)]
pub struct Place {
    _permit: Arc<OwnedSemaphorePermit>,
}

/// What a guard has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuardCounts {
    /// Calls under way.
    pub in_flight: usize,
    /// Calls that were refused because too many were under way.
    pub refused: u64,
    /// Calls without the right token, or with a certificate of another role.
    pub unauthenticated: u64,
    /// Calls that took too long.
    pub late: u64,
}

impl Default for Guard {
    /// Lets everything through.
    fn default() -> Self {
        Self::new(None, Semaphore::MAX_PERMITS, None, &[])
    }
}

impl Guard {
    /// Calls need `token` where there is one, at most `most` are under way at once, and each may take `call`. `streams` are paths
    /// (`/package.Service/Method`) of streaming calls, whose handlers keep the [`Place`] and bound their own waits.
    pub fn new(token: Option<&Secret>, most: usize, call: Option<Duration>, streams: &[&'static str]) -> Self {
        let most = most.min(Semaphore::MAX_PERMITS);
        Self {
            callers: None,
            shared: Arc::new(Shared {
                token: token.map(|t| blake3::hash(format!("Bearer {}", t.reveal()).as_bytes())),
                slots: Arc::new(Semaphore::new(most)),
                most,
                call,
                streams: streams.iter().copied().collect(),
                refused: AtomicU64::new(0),
                unauthenticated: AtomicU64::new(0),
                late: AtomicU64::new(0),
            }),
        }
    }

    /// Lets in only the roles that `callers` names, where there are any.
    pub fn admitting(mut self, callers: Option<Callers>) -> Self {
        self.callers = callers.map(Arc::new);
        self
    }

    /// Whether calls need a token.
    pub fn wants_token(&self) -> bool {
        self.shared.token.is_some()
    }

    /// What was counted so far.
    pub fn counts(&self) -> GuardCounts {
        let s = &self.shared;
        GuardCounts {
            in_flight: s.most - s.slots.available_permits(),
            refused: s.refused.load(Ordering::Relaxed),
            unauthenticated: s.unauthenticated.load(Ordering::Relaxed),
            late: s.late.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    /// Hashes are compared in constant time.
    fn knows<B>(&self, request: &Request<B>) -> bool {
        let Some(token) = &self.token else { return true };
        let said = request.headers().get("authorization").map(|v| blake3::hash(v.as_bytes()));
        let right = said.is_some_and(|s| s == *token);
        if !right {
            self.unauthenticated.fetch_add(1, Ordering::Relaxed);
        }
        right
    }

    fn place(&self) -> Option<Place> {
        let slot = Arc::clone(&self.slots).try_acquire_owned().ok();
        if slot.is_none() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        slot.map(|s| Place { _permit: Arc::new(s) })
    }
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, shared: Arc::clone(&self.shared), callers: self.callers.clone() }
    }
}

/// A service behind a [`Guard`].
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
        if !self.shared.knows(&request) {
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
        let Some(place) = self.shared.place() else {
            let most = self.shared.most;
            return refuse(Status::resource_exhausted(format!("{most} calls are under way already: try again later")));
        };
        request.extensions_mut().insert(place.clone());
        let answer = self.inner.call(request);
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let _place = place;
            let Some(call) = shared.call.filter(|_| !is_stream) else { return answer.await };
            tokio::time::timeout(call, answer).await.unwrap_or_else(|_| {
                shared.late.fetch_add(1, Ordering::Relaxed);
                let what = format!("the call took longer than {:.1} s", call.as_secs_f64());
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
    async fn tokens_places_and_times() {
        let guard = Guard::new(Some(&Secret::new("abc")), 2, Some(Duration::from_secs(1)), &["/p.S/Stream"]);
        let service = guard.layer(tower::service_fn(slow));
        let call = |path: &str, token: &str, ms: u64| {
            let (mut service, request) = (service.clone(), request(path, token, ms));
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
            assert_eq!(code(&h.await.unwrap()), None, "a stream is not timed here");
        }
        let late = call("/p.S/M", "Bearer abc", 5000).await.unwrap();
        assert_eq!(code(&late), Some("4"), "DEADLINE_EXCEEDED");
        let counts = guard.counts();
        assert_eq!(counts, GuardCounts { in_flight: 0, refused: 1, unauthenticated: 4, late: 1 });
    }
}
