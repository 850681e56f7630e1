//! A run's prefix in a directory or an object store: reads and writes of objects under it.

use std::ops::Range;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use crate::error::{Error, Result, cause};

/// What a store is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only reading: nothing is created.
    Read,
    /// Writing: a local directory is created, and one that cannot be written to is an error now, not at the first save.
    Write,
}

/// A run's prefix. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    multipart: Option<Arc<dyn MultipartStore>>,
    root: Option<PathBuf>,
    prefix: Path,
    place: String,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.place).finish()
    }
}

impl Store {
    pub(crate) fn new(inner: Arc<dyn ObjectStore>, prefix: Path, place: &str) -> Self {
        Self { inner, multipart: None, root: None, prefix, place: place.to_string() }
    }

    /// Has large objects go up in parts through `parts`, the same store.
    #[must_use]
    pub fn with_multipart(mut self, parts: Arc<dyn MultipartStore>) -> Self {
        self.multipart = Some(parts);
        self
    }

    /// The directory that the prefix is.
    pub(crate) fn with_root(mut self, dir: &FsPath) -> Self {
        self.root = Some(dir.to_owned());
        self
    }

    /// Where parts of an object go, in stores that keep unfinished uploads.
    pub(crate) fn multipart(&self) -> Option<&Arc<dyn MultipartStore>> {
        self.multipart.as_ref()
    }

    /// The directory that the prefix is, where it is one.
    pub(crate) fn root(&self) -> Option<&FsPath> {
        self.root.as_deref()
    }

    /// How the store is named in messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    pub(crate) fn path(&self, name: &str) -> Path {
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

    /// Reads a range of an object, which it must have; `None` when the object is not there.
    pub(crate) async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Option<Bytes>> {
        match self.inner.get_range(&self.path(name), range).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(Error::Read { place: self.place.clone(), object: name.to_string(), cause: cause(&e) }),
        }
    }

    /// Bytes of an object; `None` when it is not there.
    pub(crate) async fn size(&self, name: &str) -> Result<Option<u64>> {
        match self.inner.head(&self.path(name)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(Error::Read { place: self.place.clone(), object: name.to_string(), cause: cause(&e) }),
        }
    }

    /// Writes a whole object, replacing what is there.
    pub(crate) async fn write(&self, name: &str, bytes: Bytes) -> Result<()> {
        let put = self.inner.put(&self.path(name), PutPayload::from_bytes(bytes)).await;
        put.map(drop).map_err(|e| self.write_fault(name, cause(&e)))
    }

    /// Writes an object only if there is none of that name.
    pub(crate) async fn write_new(&self, name: &str, bytes: Bytes) -> object_store::Result<()> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        self.inner.put_opts(&self.path(name), PutPayload::from_bytes(bytes), options).await.map(drop)
    }

    /// Checks that the store keeps an object that is there from being written again where that is asked of it: the run log stands on
    /// that, and a store that knows no such condition writes all the same.
    ///
    /// # Errors
    /// [`Error::NoCondition`] where it does not; [`Error::Write`] where it cannot be written to.
    pub(crate) async fn require_put_if_absent(&self) -> Result<()> {
        let name = format!("probe/{}", nonce());
        let write = || self.write_new(&name, Bytes::from_static(b"probe"));
        let mut verdict = Ok(());
        for first in [true, false] {
            verdict = match write().await {
                Ok(()) if first => continue,
                Ok(()) => Err(Error::NoCondition { place: self.place.clone(), how: "writes over it" }),
                // The first write can come to be known by its repetition alone.
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(()),
                Err(object_store::Error::NotImplemented { .. }) => {
                    Err(Error::NoCondition { place: self.place.clone(), how: "does not know the condition" })
                }
                Err(e) if ["501", "NotImplemented"].iter().any(|text| e.to_string().contains(text)) => {
                    Err(Error::NoCondition { place: self.place.clone(), how: "does not know the condition" })
                }
                Err(e) => Err(self.write_fault(&name, cause(&e))),
            };
            break;
        }
        if let Err(error) = self.delete(std::slice::from_ref(&name)).await {
            tracing::warn!(%error, "the object that the store was tried with stays");
        }
        verdict
    }

    /// Names (relative to the prefix) of all objects below `folder`.
    pub(crate) async fn list(&self, folder: &str) -> Result<Vec<String>> {
        Ok(self.sizes(folder).await?.into_iter().map(|(name, _)| name).collect())
    }

    /// Names (relative to the prefix) and bytes of all objects below `folder`.
    pub(crate) async fn sizes(&self, folder: &str) -> Result<Vec<(String, u64)>> {
        let root = self.path(folder);
        let found: Vec<ObjectMeta> = self.inner.list(Some(&root)).try_collect().await.map_err(|e| Error::Read {
            place: self.place.clone(),
            object: format!("{folder}/"),
            cause: cause(&e),
        })?;
        let skip = |p: &Path| Some(p.prefix_match(&self.prefix)?.map(|x| x.as_ref().to_string()).collect::<Vec<_>>());
        Ok(found.into_iter().filter_map(|m| Some((skip(&m.location)?.join("/"), m.size))).collect())
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
