//! A run's prefix in a directory or an object store, and reads and writes of objects under it.

use std::ops::Range;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use crate::error::{Error, Result, cause};

/// Access mode of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read only: nothing is created.
    Read,
    /// Read and write: creates a local directory, and fails at once if it is not writable.
    Write,
}

/// A store under a run's prefix. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    multipart: Option<Arc<dyn MultipartStore>>,
    root: Option<PathBuf>,
    prefix: Path,
    location: String,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.location).finish()
    }
}

impl Store {
    pub(crate) fn new(inner: Arc<dyn ObjectStore>, prefix: Path, location: &str) -> Self {
        Self { inner, multipart: None, root: None, prefix, location: location.to_string() }
    }

    /// Uploads large objects in parts through `multipart`, an interface of the same store.
    #[must_use]
    pub fn with_multipart(mut self, multipart: Arc<dyn MultipartStore>) -> Self {
        self.multipart = Some(multipart);
        self
    }

    /// Sets the local directory of the prefix.
    pub(crate) fn with_root(mut self, dir: &FsPath) -> Self {
        self.root = Some(dir.to_owned());
        self
    }

    /// Returns the interface for multipart uploads, if the store has one.
    pub(crate) fn multipart(&self) -> Option<&Arc<dyn MultipartStore>> {
        self.multipart.as_ref()
    }

    /// Returns the local directory of the prefix; `None` in an object store.
    pub(crate) fn root(&self) -> Option<&FsPath> {
        self.root.as_deref()
    }

    /// Returns the directory or URL, as messages show it.
    pub fn location(&self) -> &str {
        &self.location
    }

    pub(crate) fn path(&self, name: &str) -> Path {
        name.split('/').fold(self.prefix.clone(), |path, segment| path.join(segment))
    }

    /// Reads a whole object; `None` if it does not exist.
    pub(crate) async fn read(&self, name: &str) -> Result<Option<Bytes>> {
        let response = match self.inner.get(&self.path(name)).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            other => other.map_err(|e| self.read_error(name, &e))?,
        };
        match response.bytes().await {
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            other => other.map(Some).map_err(|e| self.read_error(name, &e)),
        }
    }

    /// Reads a range that lies within an object; `None` if the object does not exist.
    pub(crate) async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Option<Bytes>> {
        match self.inner.get_range(&self.path(name), range).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.read_error(name, &e)),
        }
    }

    /// Returns the size of an object in bytes; `None` if it does not exist.
    pub(crate) async fn size(&self, name: &str) -> Result<Option<u64>> {
        match self.inner.head(&self.path(name)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.read_error(name, &e)),
        }
    }

    /// Writes a whole object, replacing an existing one.
    pub(crate) async fn write(&self, name: &str, bytes: Bytes) -> Result<()> {
        let put = self.inner.put(&self.path(name), PutPayload::from_bytes(bytes)).await;
        put.map(drop).map_err(|e| self.write_error(name, cause(&e)))
    }

    /// Writes an object unless one of that name exists.
    pub(crate) async fn write_new(&self, name: &str, bytes: Bytes) -> object_store::Result<()> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        self.inner.put_opts(&self.path(name), PutPayload::from_bytes(bytes), options).await.map(drop)
    }

    /// Checks that the store supports conditional writes, which the run log relies on: a store without them may ignore the condition
    /// and overwrite.
    ///
    /// # Errors
    /// Returns [`Error::NoConditionalWrites`] if it does not support them, and [`Error::Write`] if it is not writable.
    pub(crate) async fn require_put_if_absent(&self) -> Result<()> {
        let name = format!("probe/{}", nonce());
        let write = || self.write_new(&name, Bytes::from_static(b"probe"));
        let unsupported = |how| Err(Error::NoConditionalWrites { location: self.location.clone(), how });
        let mut result = Ok(());
        for first in [true, false] {
            result = match write().await {
                Ok(()) if first => continue,
                Ok(()) => unsupported("ignores the condition of conditional writes"),
                // The first write may have succeeded although it was reported as failed and retried.
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(()),
                Err(object_store::Error::NotImplemented { .. }) => unsupported("does not support conditional writes"),
                Err(e) if ["501", "NotImplemented"].iter().any(|text| e.to_string().contains(text)) => {
                    unsupported("does not support conditional writes")
                }
                Err(e) => Err(self.write_error(&name, cause(&e))),
            };
            break;
        }
        if let Err(error) = self.delete(std::slice::from_ref(&name)).await {
            tracing::warn!(%error, "cannot delete probe object");
        }
        result
    }

    /// Returns the names (relative to the prefix) of all objects below `folder`.
    pub(crate) async fn list(&self, folder: &str) -> Result<Vec<String>> {
        Ok(self.sizes(folder).await?.into_iter().map(|(name, _)| name).collect())
    }

    /// Returns the names (relative to the prefix) and sizes in bytes of all objects below `folder`.
    pub(crate) async fn sizes(&self, folder: &str) -> Result<Vec<(String, u64)>> {
        let root = self.path(folder);
        let objects: Vec<ObjectMeta> =
            self.inner.list(Some(&root)).try_collect().await.map_err(|e| self.read_error(&format!("{folder}/"), &e))?;
        let segments =
            |path: &Path| Some(path.prefix_match(&self.prefix)?.map(|s| s.as_ref().to_string()).collect::<Vec<_>>());
        Ok(objects.into_iter().filter_map(|m| Some((segments(&m.location)?.join("/"), m.size))).collect())
    }

    /// Deletes objects and ignores missing ones. Attempts all, then returns the first failure.
    pub(crate) async fn delete(&self, names: &[String]) -> Result<()> {
        let paths: Vec<_> = names.iter().map(|n| Ok(self.path(n))).collect();
        let mut results = self.inner.delete_stream(futures::stream::iter(paths).boxed());
        let mut result = Ok(());
        while let Some(r) = results.next().await {
            match r {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(e) if result.is_ok() => {
                    result = Err(Error::Write {
                        location: self.location.clone(),
                        object: names.first().cloned().unwrap_or_default(),
                        cause: format!("deleting: {}", cause(&e)),
                    });
                }
                Err(_) => {}
            }
        }
        result
    }

    fn read_error(&self, name: &str, error: &object_store::Error) -> Error {
        Error::Read { location: self.location.clone(), object: name.to_string(), cause: cause(error) }
    }
}

/// Returns 128 random bits in hex.
pub(crate) fn nonce() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Returns the Unix time in seconds. Informational: nothing depends on it.
pub(crate) fn unix_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
