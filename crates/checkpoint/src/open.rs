//! A run's prefix by its path or URL: local directories, S3, Google Cloud Storage, Azure.

use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreScheme};
use url::Url;

use crate::error::{Error, Result, cause};
use crate::profile;
use crate::steady::Steady;
use crate::store::{Access, Store, nonce};

/// What variables of an object store begin with, in any case.
const NAMES: [&str; 3] = ["aws_", "google_", "azure_"];

/// The builder of a store with the URL and all options that it knows by their names.
macro_rules! built {
    ($builder:ty, $url:expr, $options:expr) => {{
        let mut builder = <$builder>::new().with_url($url.as_str());
        for (key, value) in $options {
            if let Ok(key) = key.parse() {
                builder = builder.with_config(key, value);
            }
        }
        both(builder.build())
    }};
}

type Both = (Arc<dyn ObjectStore>, Arc<dyn MultipartStore>);

fn both<T: ObjectStore + MultipartStore>(built: object_store::Result<T>) -> object_store::Result<Both> {
    let store = Arc::new(built?);
    Ok((Arc::new(Steady(store.clone())), store))
}

impl Store {
    /// Opens a local path, `file://…`, `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, the `https://` address of
    /// one of these, or `memory:` (for tests).
    ///
    /// `options` are environment-like pairs, which the caller reads; only names that begin with `AWS_`, `GOOGLE_` or `AZURE_` (in any
    /// case) are used, by `object_store`'s names: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_SERVICE_ACCOUNT`,
    /// `AZURE_STORAGE_ACCOUNT_NAME`… Without credentials there, S3 takes those of a profile in AWS's files, which `HOME`, `AWS_PROFILE` and the
    /// like name, else those of the instance.
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
            let (store, parts) = both(Ok(InMemory::new())).map_err(|e| fault(cause(&e)))?;
            return Ok(Self::from_object_store(store, "", target)?.with_multipart(parts));
        }
        if !target.contains("://") {
            return Self::open_dir(FsPath::new(target), target, access).await;
        }
        let url = Url::parse(target).map_err(|e| fault(format!("not a URL: {e}")))?;
        if url.scheme() == "file" {
            let dir = url.to_file_path().map_err(|()| fault("not a path on this machine".into()))?;
            return Self::open_dir(&dir, target, access).await;
        }
        // `abfss://container@account.dfs.core.windows.net` names no person.
        let person = !url.username().is_empty() && !url.scheme().starts_with("abfs") && url.scheme() != "az";
        if person || url.password().is_some() {
            let place = format!("{}://…", url.scheme());
            return Err(Error::Open { place, cause: "credentials do not belong into the URL".into() });
        }
        let mut options: Vec<(String, String)> =
            options.into_iter().map(|(k, v)| (k.as_ref().to_ascii_lowercase(), v.into())).collect();
        let (scheme, prefix) = ObjectStoreScheme::parse(&url).map_err(|e| fault(cause(&e)))?;
        if scheme == ObjectStoreScheme::AmazonS3 {
            profile::complete(&mut options).await.map_err(fault)?;
        }
        options.retain(|(k, _)| NAMES.iter().any(|n| k.starts_with(n)));
        let made = match scheme {
            ObjectStoreScheme::AmazonS3 => built!(AmazonS3Builder, url, options),
            ObjectStoreScheme::GoogleCloudStorage => built!(GoogleCloudStorageBuilder, url, options),
            ObjectStoreScheme::MicrosoftAzure => built!(MicrosoftAzureBuilder, url, options),
            _ => return Err(fault("use a path, or a URL with s3://, gs://, az:// or file://".into())),
        };
        let (store, parts) = made.map_err(|e| fault(cause(&e)))?;
        Ok(Self::from_object_store(store, prefix.as_ref(), target)?.with_multipart(parts))
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
        Ok(Self::from_object_store(Arc::new(local), "", target)?.with_root(dir))
    }

    /// Wraps any object store; `place` is how errors name it.
    ///
    /// # Errors
    /// [`Error::Open`] when the prefix is not a valid object path.
    pub fn from_object_store(inner: Arc<dyn ObjectStore>, prefix: &str, place: &str) -> Result<Self> {
        let prefix = Path::parse(prefix).map_err(|e| Error::Open { place: place.to_string(), cause: cause(&e) })?;
        Ok(Self::new(inner, prefix, place))
    }
}
