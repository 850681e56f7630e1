//! Weights on their way to workers: how many streams there are at once, and what becomes of readers that are too slow. A stream that
//! is dropped lets go of the version it sends, so host memory holds two versions at most. Must not know: tensors, who asks.

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

/// Streams at once. More wait for a place, so that those under way come to their end.
const MAX_STREAMS: usize = 64;
/// Least rate of a reader in bytes per second, over the whole stream.
const MIN_RATE: u64 = 1 << 20;
/// Time that a stream may take besides.
const GRACE: Duration = Duration::from_secs(60);

type Chunks = Box<dyn Iterator<Item = WeightsChunk> + Send>;

/// The streams under way.
pub(super) struct Streams {
    places: Arc<Semaphore>,
    live: Mutex<Vec<Weak<Live>>>,
    dropped: AtomicU64,
}

/// A place among the streams.
pub(super) struct StreamPlace {
    _held: OwnedSemaphorePermit,
}

struct Live {
    version: WeightVersion,
    until: Instant,
    state: Mutex<State>,
}

enum State {
    Sending { chunks: Chunks, _place: StreamPlace },
    Dropped(String),
    Ended,
}

impl Default for Streams {
    fn default() -> Self {
        let (places, live) = (Arc::new(Semaphore::new(MAX_STREAMS)), Mutex::default());
        Self { places, live, dropped: AtomicU64::new(0) }
    }
}

impl Streams {
    /// Returns a place at once, if one is free.
    pub fn try_place(&self) -> Option<StreamPlace> {
        self.places.clone().try_acquire_owned().ok().map(|_held| StreamPlace { _held })
    }

    /// Waits for a place. Readers that are too slow lose theirs meanwhile.
    pub async fn place(&self) -> Option<StreamPlace> {
        loop {
            self.sweep(0);
            let place = self.places.clone().acquire_owned();
            if let Ok(place) = tokio::time::timeout(Duration::from_secs(1), place).await {
                return place.ok().map(|_held| StreamPlace { _held });
            }
        }
    }

    /// Begins a stream of `bytes` bytes in `chunks`, which hold weights of `version`.
    pub fn begin(
        &self,
        version: WeightVersion,
        bytes: u64,
        place: StreamPlace,
        chunks: impl Iterator<Item = WeightsChunk> + Send + 'static,
    ) -> WeightStream {
        let until = Instant::now() + GRACE + Duration::from_secs(bytes / MIN_RATE);
        let state = Mutex::new(State::Sending { chunks: Box::new(chunks), _place: place });
        let live = Arc::new(Live { version, until, state });
        let mut all = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|l| l.strong_count() > 0);
        all.push(Arc::downgrade(&live));
        WeightStream(live)
    }

    /// Drops the streams that send a version before the one that `next` replaces, and those that have taken too long.
    pub fn sweep(&self, next: WeightVersion) {
        let now = Instant::now();
        let mut all = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|weak| {
            let Some(live) = weak.upgrade() else { return false };
            let why = if live.version + 1 < next {
                format!("version {} is superseded: version {next} is about to be published. Ask again", live.version)
            } else if now >= live.until {
                format!("version {} was read too slowly, at less than {MIN_RATE} bytes/s. Ask again", live.version)
            } else {
                return true;
            };
            let mut state = live.lock();
            if matches!(*state, State::Sending { .. }) {
                self.dropped.fetch_add(1, Ordering::Relaxed);
                *state = State::Dropped(why);
            }
            false
        });
    }

    /// Returns the number of streams under way, and of those that were dropped since the start.
    pub fn counts(&self) -> (usize, u64) {
        (MAX_STREAMS - self.places.available_permits(), self.dropped.load(Ordering::Relaxed))
    }
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Weights of one version, chunk by chunk; an error in the middle where the stream was dropped.
pub(super) struct WeightStream(Arc<Live>);

impl Stream for WeightStream {
    type Item = Result<WeightsChunk, Status>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.0.lock();
        let next = match &mut *state {
            State::Sending { chunks, .. } => chunks.next().map(Ok),
            State::Dropped(why) => Some(Err(Status::aborted(std::mem::take(why)))),
            State::Ended => None,
        };
        if !matches!(next, Some(Ok(_))) {
            *state = State::Ended;
        }
        Poll::Ready(next)
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;
    use tonic::Code;

    use super::*;

    /// A version that is held until its chunks are gone.
    fn begin(streams: &Streams, version: WeightVersion, bytes: u64) -> (WeightStream, Weak<()>) {
        let held = Arc::new(());
        let weak = Arc::downgrade(&held);
        let chunks = (0..3u8).map(move |n| {
            let _held = &held;
            WeightsChunk { data: vec![n].into(), crc32c: 0 }
        });
        (streams.begin(version, bytes, streams.try_place().unwrap(), chunks), weak)
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_two_versions_behind_lets_go_of_its_version() {
        let streams = Streams::default();
        let (mut old, version) = begin(&streams, 3, 3);
        assert_eq!(old.next().await.unwrap().unwrap().data[..], [0]);
        streams.sweep(4);
        assert_eq!(old.next().await.unwrap().unwrap().data[..], [1], "one version behind goes on");
        streams.sweep(5);
        assert!(version.upgrade().is_none(), "the memory is free before the reader reads again");
        assert_eq!(streams.counts(), (0, 1), "so is the place");
        let status = old.next().await.unwrap().unwrap_err();
        assert!(status.code() == Code::Aborted && status.message().contains("version 3"), "{status:?}");
        assert!(old.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_stands_still_loses_its_place_to_one_that_waits() {
        let streams = Streams::default();
        let (slow, _version) = begin(&streams, 0, 10 * MIN_RATE);
        let held: Vec<_> = (1..MAX_STREAMS).map(|_| streams.try_place().unwrap()).collect();
        assert!(streams.try_place().is_none());
        let begun = Instant::now();
        let place = streams.place().await.unwrap();
        let waited = begun.elapsed().as_secs();
        assert!((70..=72).contains(&waited), "{waited} s");
        assert_eq!(streams.counts(), (MAX_STREAMS, 1));
        drop((slow, held, place));
        assert_eq!(streams.counts(), (0, 1));
    }

    #[tokio::test]
    async fn a_stream_that_is_read_to_its_end_or_left_gives_its_place_back() {
        let streams = Streams::default();
        let (mut whole, version) = begin(&streams, 0, 3);
        while let Some(chunk) = whole.next().await {
            chunk.unwrap();
        }
        assert!(version.upgrade().is_none());
        let (left, version) = begin(&streams, 0, 3);
        assert_eq!(streams.counts().0, 1);
        drop(left);
        assert!(version.upgrade().is_none());
        assert_eq!(streams.counts(), (0, 0));
    }
}
