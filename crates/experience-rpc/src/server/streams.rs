//! Streams of weights to workers: limits their number and drops readers that are too slow. A dropped stream releases
//! the version that it was sending, so that host memory holds at most two versions.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_stream::Stream;
use tonic::Status;
use unveil_core::WeightVersion;
use unveil_proto::v1::WeightsChunk;

/// Maximum number of concurrent streams. Further ones wait, so that those in progress can finish.
const MAX_STREAMS: usize = 64;
/// Minimum average rate of a reader in bytes per second.
const MIN_RATE: u64 = 1 << 20;
/// Additional time that a stream may take.
const GRACE: Duration = Duration::from_secs(60);

type Chunks = Box<dyn Iterator<Item = WeightsChunk> + Send>;

/// Streams in progress.
#[derive(Debug)]
pub(super) struct Streams {
    permits: Arc<Semaphore>,
    live: Mutex<Vec<Weak<LiveStream>>>,
    dropped: AtomicU64,
}

/// Permit for a stream.
pub(super) struct StreamPermit {
    _permit: OwnedSemaphorePermit,
}

struct LiveStream {
    version: WeightVersion,
    deadline: Instant,
    state: Mutex<StreamState>,
}

enum StreamState {
    Sending { chunks: Chunks, _permit: StreamPermit },
    Dropped(String),
    Ended,
}

impl Default for Streams {
    fn default() -> Self {
        Self { permits: Arc::new(Semaphore::new(MAX_STREAMS)), live: Mutex::default(), dropped: AtomicU64::new(0) }
    }
}

impl Streams {
    /// Returns a permit if one is available.
    pub(super) fn try_permit(&self) -> Option<StreamPermit> {
        self.permits.clone().try_acquire_owned().ok().map(|_permit| StreamPermit { _permit })
    }

    /// Waits for a permit; meanwhile, readers that are too slow lose theirs.
    pub(super) async fn permit(&self) -> Option<StreamPermit> {
        loop {
            self.sweep(0);
            let permit = self.permits.clone().acquire_owned();
            if let Ok(permit) = tokio::time::timeout(Duration::from_secs(1), permit).await {
                return permit.ok().map(|_permit| StreamPermit { _permit });
            }
        }
    }

    /// Starts a stream of `bytes` bytes in `chunks` with the weights of `version`.
    pub(super) fn start(
        &self,
        version: WeightVersion,
        bytes: u64,
        permit: StreamPermit,
        chunks: impl Iterator<Item = WeightsChunk> + Send + 'static,
    ) -> WeightStream {
        let deadline = Instant::now() + GRACE + Duration::from_secs(bytes / MIN_RATE);
        let state = Mutex::new(StreamState::Sending { chunks: Box::new(chunks), _permit: permit });
        let live = Arc::new(LiveStream { version, deadline, state });
        let mut all = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|l| l.strong_count() > 0);
        all.push(Arc::downgrade(&live));
        WeightStream(live)
    }

    /// Drops streams of versions older than the predecessor of `next`, and streams past their deadline.
    pub(super) fn sweep(&self, next: WeightVersion) {
        let now = Instant::now();
        let mut all = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|weak| {
            let Some(live) = weak.upgrade() else { return false };
            let why = if live.version + 1 < next {
                format!(
                    "version {} is superseded: version {next} is about to be published; request it again",
                    live.version
                )
            } else if now >= live.deadline {
                format!(
                    "version {} was read too slowly, at less than {MIN_RATE} bytes/s; request it again",
                    live.version
                )
            } else {
                return true;
            };
            let mut state = live.lock();
            if matches!(*state, StreamState::Sending { .. }) {
                self.dropped.fetch_add(1, Ordering::Relaxed);
                *state = StreamState::Dropped(why);
            }
            false
        });
    }

    /// Returns the number of streams in progress, and of streams dropped since the start.
    pub(super) fn counts(&self) -> (usize, u64) {
        (MAX_STREAMS - self.permits.available_permits(), self.dropped.load(Ordering::Relaxed))
    }
}

impl LiveStream {
    fn lock(&self) -> MutexGuard<'_, StreamState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream of the chunks of one version, which ends with an error if it is dropped.
pub(super) struct WeightStream(Arc<LiveStream>);

impl Stream for WeightStream {
    type Item = Result<WeightsChunk, Status>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.0.lock();
        let next = match &mut *state {
            StreamState::Sending { chunks, .. } => chunks.next().map(Ok),
            StreamState::Dropped(why) => Some(Err(Status::aborted(std::mem::take(why)))),
            StreamState::Ended => None,
        };
        if !matches!(next, Some(Ok(_))) {
            *state = StreamState::Ended;
        }
        Poll::Ready(next)
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;
    use tonic::Code;

    use super::*;

    /// Starts a stream; the weak pointer tells whether its version is still held.
    fn start(streams: &Streams, version: WeightVersion, bytes: u64) -> (WeightStream, Weak<()>) {
        let held = Arc::new(());
        let weak = Arc::downgrade(&held);
        let chunks = (0..3u8).map(move |n| {
            let _held = &held;
            WeightsChunk { data: vec![n].into(), crc32c: 0 }
        });
        (streams.start(version, bytes, streams.try_permit().unwrap(), chunks), weak)
    }

    #[tokio::test(start_paused = true)]
    async fn readers_two_versions_behind_are_dropped() {
        let streams = Streams::default();
        let (mut old, version) = start(&streams, 3, 3);
        assert_eq!(old.next().await.unwrap().unwrap().data[..], [0]);
        streams.sweep(4);
        assert_eq!(old.next().await.unwrap().unwrap().data[..], [1], "one version behind continues");
        streams.sweep(5);
        assert!(version.upgrade().is_none(), "the memory is freed before the reader reads again");
        assert_eq!(streams.counts(), (0, 1), "so is the permit");
        let status = old.next().await.unwrap().unwrap_err();
        assert!(status.code() == Code::Aborted && status.message().contains("version 3"), "{status:?}");
        assert!(old.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn stalled_readers_lose_their_permit() {
        let streams = Streams::default();
        let (slow, _version) = start(&streams, 0, 10 * MIN_RATE);
        let held: Vec<_> = (1..MAX_STREAMS).map(|_| streams.try_permit().unwrap()).collect();
        assert!(streams.try_permit().is_none());
        let start_time = Instant::now();
        let permit = streams.permit().await.unwrap();
        let waited = start_time.elapsed().as_secs();
        assert!((70..=72).contains(&waited), "{waited} s");
        assert_eq!(streams.counts(), (MAX_STREAMS, 1));
        drop((slow, held, permit));
        assert_eq!(streams.counts(), (0, 1));
    }

    #[tokio::test]
    async fn finished_or_abandoned_streams_release_their_permit() {
        let streams = Streams::default();
        let (mut whole, version) = start(&streams, 0, 3);
        while let Some(chunk) = whole.next().await {
            chunk.unwrap();
        }
        assert!(version.upgrade().is_none());
        let (left, version) = start(&streams, 0, 3);
        assert_eq!(streams.counts().0, 1);
        drop(left);
        assert!(version.upgrade().is_none());
        assert_eq!(streams.counts(), (0, 0));
    }
}
