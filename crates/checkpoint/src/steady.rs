//! Reads that go on where an answer broke off. `object_store` repeats requests that were refused or not answered, and bodies of objects
//! that broke off; an error's or a listing's answer that breaks off it reports at once. Must not know: what objects mean.

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

/// Tries of one read.
const TRIES: u32 = 4;
/// A read that has taken so long was repeated enough below.
const ENOUGH: Duration = Duration::from_secs(20);
/// Wait before the second try, doubled with each one.
const WAIT: Duration = Duration::from_millis(100);

/// A store whose reads are repeated when they fail for no reason that the store has named.
#[derive(Debug)]
pub(crate) struct Steady(pub Arc<dyn ObjectStore>);

impl fmt::Display for Steady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Calls `read` until it works, is refused, or has failed too often or for too long.
async fn repeat<T, F: Future<Output = Result<T>>>(read: impl Fn() -> F) -> Result<T> {
    let (begun, mut tries) = (Instant::now(), 0);
    loop {
        let error = match read().await {
            Err(e @ Error::Generic { .. }) => e,
            other => return other,
        };
        tries += 1;
        if tries >= TRIES || begun.elapsed() >= ENOUGH {
            return Err(error);
        }
        tracing::warn!(%error, "a read failed; trying again");
        tokio::time::sleep(WAIT * 2u32.pow(tries - 1)).await;
    }
}

#[async_trait]
impl ObjectStore for Steady {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.0.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        repeat(|| self.0.get_opts(location, options.clone())).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.0.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (inner, prefix) = (self.0.clone(), prefix.cloned());
        let all = async move {
            repeat(|| inner.list(prefix.as_ref()).try_collect::<Vec<_>>())
                .await
                .map(|found| futures::stream::iter(found).map(Ok))
        };
        futures::stream::once(all).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        repeat(|| self.0.list_with_delimiter(prefix)).await
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

    /// Fails the next so many reads as a broken answer does.
    #[derive(Debug)]
    struct Flaky(InMemory, AtomicU32);

    impl Flaky {
        fn look(&self) -> Result<()> {
            match self.1.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) {
                Ok(_) => Err(Error::Generic { store: "S3", source: "request or response body error".into() }),
                Err(_) => Ok(()),
            }
        }
    }

    impl fmt::Display for Flaky {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Flaky")
        }
    }

    #[async_trait]
    impl ObjectStore for Flaky {
        async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
            self.0.put_opts(location, payload, opts).await
        }

        async fn put_multipart_opts(&self, at: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
            self.0.put_multipart_opts(at, opts).await
        }

        async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
            self.look()?;
            self.0.get_opts(location, options).await
        }

        fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
            self.0.delete_stream(locations)
        }

        fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
            match self.look() {
                // It breaks off after the first entry.
                Err(e) => self.0.list(prefix).take(1).chain(futures::stream::iter([Err(e)])).boxed(),
                Ok(()) => self.0.list(prefix),
            }
        }

        async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
            self.look()?;
            self.0.list_with_delimiter(prefix).await
        }

        async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
            self.0.copy_opts(from, to, options).await
        }
    }

    #[tokio::test]
    async fn broken_answers_are_asked_for_again_and_named_in_the_end() {
        let flaky = Arc::new(Flaky(InMemory::new(), AtomicU32::new(0)));
        let store = Steady(flaky.clone());
        let (one, two) = (Path::from("a/one"), Path::from("a/two"));
        for path in [&one, &two] {
            store.put(path, "x".into()).await.unwrap();
        }
        let fail = |times| flaky.1.store(times, Ordering::Relaxed);
        fail(3);
        assert_eq!(store.get(&one).await.unwrap().bytes().await.unwrap(), "x");
        fail(2);
        let names: Vec<Path> = store.list(None).map_ok(|m| m.location).try_collect().await.unwrap();
        assert_eq!(names, [one.clone(), two], "no entry of the listing that broke off comes twice");
        fail(2);
        assert_eq!(store.list_with_delimiter(None).await.unwrap().common_prefixes, [Path::from("a")]);
        fail(4);
        assert!(store.get(&one).await.unwrap_err().to_string().contains("body error"));
        let missing = store.get(&Path::from("a/none")).await;
        assert!(matches!(missing, Err(Error::NotFound { .. })), "what the store has named is not asked for again");
    }
}
