//! A store that retries reads whose response was interrupted.
//!
//! `object_store` itself retries requests that were refused or unanswered, and object bodies that were interrupted; but it reports an
//! interrupted error response or listing immediately.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// Attempts of one read.
const MAX_ATTEMPTS: u32 = 4;
/// A read that has taken this long is not retried: `object_store` has retried it enough.
const RETRY_BUDGET: Duration = Duration::from_secs(20);
/// Delay before the second attempt, doubled for each further one.
const INITIAL_BACKOFF: Duration = Duration::from_millis(100);

/// A store that retries reads that fail with an unspecific error.
#[derive(Debug)]
pub(crate) struct RetryingStore(pub Arc<dyn ObjectStore>);

impl fmt::Display for RetryingStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Calls `read` until it succeeds, fails with a specific error, or has failed too often or for too long.
async fn retry<T, F: Future<Output = Result<T>>>(read: impl Fn() -> F) -> Result<T> {
    let begin = Instant::now();
    let mut attempts = 0;
    loop {
        let error = match read().await {
            Err(e @ Error::Generic { .. }) => e,
            other => return other,
        };
        attempts += 1;
        if attempts >= MAX_ATTEMPTS || begin.elapsed() >= RETRY_BUDGET {
            return Err(error);
        }
        tracing::warn!(%error, "read failed, retrying");
        tokio::time::sleep(INITIAL_BACKOFF * 2u32.pow(attempts - 1)).await;
    }
}

#[async_trait]
impl ObjectStore for RetryingStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.0.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        retry(|| self.0.get_opts(location, options.clone())).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.0.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let inner = self.0.clone();
        let prefix = prefix.cloned();
        let listing = async move {
            retry(|| inner.list(prefix.as_ref()).try_collect::<Vec<_>>())
                .await
                .map(|entries| futures::stream::iter(entries).map(Ok))
        };
        futures::stream::once(listing).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        retry(|| self.0.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    use super::*;

    /// Fails the given number of reads as an interrupted response does.
    #[derive(Debug)]
    struct FlakyStore(InMemory, AtomicU32);

    impl FlakyStore {
        fn fail_if_due(&self) -> Result<()> {
            match self.1.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) {
                Ok(_) => Err(Error::Generic { store: "S3", source: "request or response body error".into() }),
                Err(_) => Ok(()),
            }
        }
    }

    impl fmt::Display for FlakyStore {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("FlakyStore")
        }
    }

    #[async_trait]
    impl ObjectStore for FlakyStore {
        async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
            self.0.put_opts(location, payload, opts).await
        }

        async fn put_multipart_opts(&self, path: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
            self.0.put_multipart_opts(path, opts).await
        }

        async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
            self.fail_if_due()?;
            self.0.get_opts(location, options).await
        }

        fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
            self.0.delete_stream(locations)
        }

        fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
            match self.fail_if_due() {
                // The listing is interrupted after the first entry.
                Err(e) => self.0.list(prefix).take(1).chain(futures::stream::iter([Err(e)])).boxed(),
                Ok(()) => self.0.list(prefix),
            }
        }

        async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
            self.fail_if_due()?;
            self.0.list_with_delimiter(prefix).await
        }

        async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
            self.0.copy_opts(from, to, options).await
        }
    }

    #[tokio::test]
    async fn interrupted_reads_are_retried_up_to_a_limit() {
        let flaky = Arc::new(FlakyStore(InMemory::new(), AtomicU32::new(0)));
        let store = RetryingStore(flaky.clone());
        let first = Path::from("a/one");
        let second = Path::from("a/two");
        for path in [&first, &second] {
            store.put(path, "x".into()).await.unwrap();
        }
        let fail = |times| flaky.1.store(times, Ordering::Relaxed);
        fail(3);
        assert_eq!(store.get(&first).await.unwrap().bytes().await.unwrap(), "x");
        fail(2);
        let names: Vec<Path> = store.list(None).map_ok(|m| m.location).try_collect().await.unwrap();
        assert_eq!(names, [first.clone(), second], "entries of the interrupted listing are not repeated");
        fail(2);
        assert_eq!(store.list_with_delimiter(None).await.unwrap().common_prefixes, [Path::from("a")]);
        fail(4);
        assert!(store.get(&first).await.unwrap_err().to_string().contains("body error"));
        let missing = store.get(&Path::from("a/none")).await;
        assert!(matches!(missing, Err(Error::NotFound { .. })), "a specific error is not retried");
    }
}
