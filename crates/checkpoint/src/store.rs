//! A run's prefix in a directory or an object store: opening it, and whole-object reads and writes under it.

use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, WriteMultipart};
use url::Url;

use crate::error::{Error, Result, cause};
use crate::steady::Steady;

/// Objects above this go up in parts.
const SINGLE_PUT: usize = 64 << 20;
/// Size of a part.
const PART: usize = 16 << 20;
/// Parts in flight per object.
const PARTS: usize = 4;

/// What a store is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only reading: nothing is created.
    Read,
    /// Writing: a local directory is created, and one that cannot be written to is an error now, not at the first save.
    Write,
}

/// A run's prefix. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    prefix: Path,
    place: String,
}

impl Store {
    /// Opens a local path, `file://…`, `s3://bucket/prefix` or `memory:` (for tests).
    ///
    /// `options` are environment-like pairs, which the caller reads; only names that begin with `AWS_` (in any case)
    /// are used, by `object_store`'s names: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `AWS_ALLOW_HTTP`…
    ///
    /// # Errors
    /// [`Error::Open`] with the place and the cause.
    pub async fn open<I, K, V>(target: &str, options: I, access: Access) -> Result<Self>
    where
        I: IntoIterator<Item = (K, V)>,
        K: AsRef<str>,
        V: Into<String>,
    {
        let fault = |cause: String| Error::Open { place: target.to_string(), cause };
        if target.trim().is_empty() {
            return Err(fault("the path is empty".into()));
        }
        if target == "memory:" {
            return Self::from_object_store(Arc::new(InMemory::new()), "", target);
        }
        if !target.contains("://") {
            return Self::open_dir(FsPath::new(target), target, access).await;
        }
        let url = Url::parse(target).map_err(|e| fault(format!("not a URL: {e}")))?;
        if url.scheme() == "file" {
            let dir = url.to_file_path().map_err(|()| fault("not a path on this machine".into()))?;
            return Self::open_dir(&dir, target, access).await;
        }
        if !url.username().is_empty() || url.password().is_some() {
            let place = format!("{}://…", url.scheme());
            return Err(Error::Open { place, cause: "credentials do not belong into the URL".into() });
        }
        let options: Vec<(K, V)> = options
            .into_iter()
            .filter(|(k, _)| k.as_ref().get(..4).is_some_and(|p| p.eq_ignore_ascii_case("aws_")))
            .collect();
        let (inner, prefix) = object_store::parse_url_opts(&url, options).map_err(|e| fault(cause(&e)))?;
        Ok(Self { inner: Arc::new(Steady(Arc::from(inner))), prefix, place: target.to_string() })
    }

    async fn open_dir(dir: &FsPath, target: &str, access: Access) -> Result<Self> {
        let fault = |e: &(dyn std::error::Error + 'static)| Error::Open { place: target.to_string(), cause: cause(e) };
        if access == Access::Write {
            tokio::fs::create_dir_all(dir).await.map_err(|e| fault(&e))?;
            let probe: PathBuf = dir.join(format!(".probe-{}", nonce()));
            let written = tokio::fs::write(&probe, b"probe").await;
            let removed = tokio::fs::remove_file(&probe).await;
            written.and(removed).map_err(|e| fault(&e))?;
        }
        let local = LocalFileSystem::new_with_prefix(dir).map_err(|e| fault(&e))?;
        let local = local.with_fsync(true).with_automatic_cleanup(true);
        Self::from_object_store(Arc::new(local), "", target)
    }

    /// Wraps any object store; `place` is how errors name it.
    ///
    /// # Errors
    /// [`Error::Open`] when the prefix is not a valid object path.
    pub fn from_object_store(inner: Arc<dyn ObjectStore>, prefix: &str, place: &str) -> Result<Self> {
        let prefix = Path::parse(prefix).map_err(|e| Error::Open { place: place.to_string(), cause: cause(&e) })?;
        Ok(Self { inner, prefix, place: place.to_string() })
    }

    /// How the store is named in messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    fn path(&self, name: &str) -> Path {
        name.split('/').fold(self.prefix.clone(), |p, part| p.join(part))
    }

    /// Reads a whole object; `None` when it is not there.
    pub(crate) async fn read(&self, name: &str) -> Result<Option<Bytes>> {
        let fault = |e: object_store::Error| Error::Read {
            place: self.place.clone(),
            object: name.to_string(),
            cause: cause(&e),
        };
        let got = match self.inner.get(&self.path(name)).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            other => other.map_err(fault)?,
        };
        match got.bytes().await {
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            other => other.map(Some).map_err(fault),
        }
    }

    /// Writes a whole object, replacing what is there.
    pub(crate) async fn write(&self, name: &str, bytes: Bytes) -> Result<()> {
        self.put(name, bytes).await.map_err(|e| Error::Write {
            place: self.place.clone(),
            object: name.to_string(),
            cause: cause(&e),
        })
    }

    async fn put(&self, name: &str, bytes: Bytes) -> object_store::Result<()> {
        let path = self.path(name);
        if bytes.len() <= SINGLE_PUT {
            return self.inner.put(&path, PutPayload::from_bytes(bytes)).await.map(drop);
        }
        let mut upload = WriteMultipart::new_with_chunk_size(self.inner.put_multipart(&path).await?, PART);
        for start in (0..bytes.len()).step_by(PART) {
            // a failed part is an error here or at the end; both abort the upload
            if let Err(e) = upload.wait_for_capacity(PARTS).await {
                let _ = upload.abort().await;
                return Err(e);
            }
            upload.put(bytes.slice(start..bytes.len().min(start + PART)));
        }
        upload.finish().await.map(drop)
    }

    /// Writes an object only if there is none of that name.
    pub(crate) async fn write_new(&self, name: &str, bytes: Bytes) -> object_store::Result<()> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        self.inner.put_opts(&self.path(name), PutPayload::from_bytes(bytes), options).await.map(drop)
    }

    /// Names (relative to the prefix) of all objects below `folder`.
    pub(crate) async fn list(&self, folder: &str) -> Result<Vec<String>> {
        let root = self.path(folder);
        let found: Vec<_> = self.inner.list(Some(&root)).try_collect().await.map_err(|e| Error::Read {
            place: self.place.clone(),
            object: format!("{folder}/"),
            cause: cause(&e),
        })?;
        let skip = |p: &Path| Some(p.prefix_match(&self.prefix)?.map(|x| x.as_ref().to_string()).collect::<Vec<_>>());
        Ok(found.into_iter().filter_map(|m| skip(&m.location)).map(|parts| parts.join("/")).collect())
    }

    /// Deletes objects; those that are gone already are fine. The first other failure is reported after all were tried.
    pub(crate) async fn delete(&self, names: &[String]) -> Result<()> {
        let paths: Vec<_> = names.iter().map(|n| Ok(self.path(n))).collect();
        let mut results = self.inner.delete_stream(futures::stream::iter(paths).boxed());
        let mut first = Ok(());
        while let Some(r) = results.next().await {
            match r {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(e) if first.is_ok() => {
                    first = Err(Error::Write {
                        place: self.place.clone(),
                        object: names.first().cloned().unwrap_or_default(),
                        cause: format!("deleting: {}", cause(&e)),
                    });
                }
                Err(_) => {}
            }
        }
        first
    }
}

/// 128 random bits, hex.
pub(crate) fn nonce() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Seconds since 1970, for the reader only: nothing depends on it.
pub(crate) fn unix_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// BLAKE3, hex, off the async threads when it takes long.
pub(crate) async fn hash(bytes: &Bytes) -> String {
    if bytes.len() < 1 << 20 {
        return blake3::hash(bytes).to_hex().to_string();
    }
    let copy = bytes.clone();
    match tokio::task::spawn_blocking(move || blake3::hash(&copy).to_hex().to_string()).await {
        Ok(h) => h,
        Err(_) => blake3::hash(bytes).to_hex().to_string(),
    }
}
