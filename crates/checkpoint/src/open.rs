//! Opens a run's prefix by path or URL: local directories, S3, Google Cloud Storage, Azure.

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
use crate::retrying_store::RetryingStore;
use crate::store::{Access, Store, nonce};

/// Prefixes of object store variables, in lower case.
const OPTION_PREFIXES: [&str; 3] = ["aws_", "google_", "azure_"];

/// Builds a store from a URL and the options that its builder supports.
macro_rules! build_store {
    ($builder:ty, $url:expr, $options:expr) => {{
        let mut builder = <$builder>::new().with_url($url.as_str());
        for (key, value) in $options {
            if let Ok(key) = key.parse() {
                builder = builder.with_config(key, value);
            }
        }
        store_pair(builder.build())
    }};
}

/// One store by its two interfaces.
type StorePair = (Arc<dyn ObjectStore>, Arc<dyn MultipartStore>);

fn store_pair<T: ObjectStore + MultipartStore>(built: object_store::Result<T>) -> object_store::Result<StorePair> {
    let store = Arc::new(built?);
    Ok((Arc::new(RetryingStore(store.clone())), store))
}

impl Store {
    /// Opens a local path, `file://…`, `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, the `https://` address of
    /// one of these, or `memory:` (for tests).
    ///
    /// `options` are environment-like pairs supplied by the caller; only names that begin with `AWS_`, `GOOGLE_` or `AZURE_` (in any
    /// case) are used, as `object_store` defines them: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_SERVICE_ACCOUNT`,
    /// `AZURE_STORAGE_ACCOUNT_NAME`… Without credentials among them, S3 uses those of a profile in AWS's files (found by `HOME`,
    /// `AWS_PROFILE` and similar variables), else those of the instance.
    ///
    /// # Errors
    /// Returns [`Error::Open`] with the location and the cause.
    pub async fn open<I, K, V>(target: &str, options: I, access: Access) -> Result<Self>
    where
        I: IntoIterator<Item = (K, V)>,
        K: AsRef<str>,
        V: Into<String>,
    {
        let error = |cause: String| Error::Open { location: target.to_string(), cause };
        if target.trim().is_empty() {
            return Err(error("the path is empty".into()));
        }
        if target == "memory:" {
            let (store, multipart) = store_pair(Ok(InMemory::new())).map_err(|e| error(cause(&e)))?;
            return Ok(Self::from_object_store(store, "", target)?.with_multipart(multipart));
        }
        if !target.contains("://") {
            return Self::open_dir(FsPath::new(target), target, access).await;
        }
        let url = Url::parse(target).map_err(|e| error(format!("not a URL: {e}")))?;
        if url.scheme() == "file" {
            let dir = url.to_file_path().map_err(|()| error("not a path on this machine".into()))?;
            return Self::open_dir(&dir, target, access).await;
        }
        // In `abfss://container@account.dfs.core.windows.net` the user name is a container.
        let has_user = !url.username().is_empty() && !url.scheme().starts_with("abfs") && url.scheme() != "az";
        if has_user || url.password().is_some() {
            let location = format!("{}://…", url.scheme());
            return Err(Error::Open {
                location,
                cause: "the URL must not contain credentials; use environment variables".into(),
            });
        }
        let mut options: Vec<(String, String)> =
            options.into_iter().map(|(k, v)| (k.as_ref().to_ascii_lowercase(), v.into())).collect();
        let (scheme, prefix) = ObjectStoreScheme::parse(&url).map_err(|e| error(cause(&e)))?;
        if scheme == ObjectStoreScheme::AmazonS3 {
            profile::add_credentials(&mut options).await.map_err(error)?;
        }
        options.retain(|(k, _)| OPTION_PREFIXES.iter().any(|prefix| k.starts_with(prefix)));
        let pair = match scheme {
            ObjectStoreScheme::AmazonS3 => build_store!(AmazonS3Builder, url, options),
            ObjectStoreScheme::GoogleCloudStorage => build_store!(GoogleCloudStorageBuilder, url, options),
            ObjectStoreScheme::MicrosoftAzure => build_store!(MicrosoftAzureBuilder, url, options),
            _ => return Err(error("use a path, or a URL with s3://, gs://, az:// or file://".into())),
        };
        let (store, multipart) = pair.map_err(|e| error(cause(&e)))?;
        Ok(Self::from_object_store(store, prefix.as_ref(), target)?.with_multipart(multipart))
    }

    async fn open_dir(dir: &FsPath, target: &str, access: Access) -> Result<Self> {
        let error =
            |e: &(dyn std::error::Error + 'static)| Error::Open { location: target.to_string(), cause: cause(e) };
        if access == Access::Write {
            tokio::fs::create_dir_all(dir).await.map_err(|e| error(&e))?;
            let probe: PathBuf = dir.join(format!(".probe-{}", nonce()));
            let written = tokio::fs::write(&probe, b"probe").await;
            let removed = tokio::fs::remove_file(&probe).await;
            written.and(removed).map_err(|e| error(&e))?;
        }
        let local = LocalFileSystem::new_with_prefix(dir).map_err(|e| error(&e))?;
        let local = local.with_fsync(true).with_automatic_cleanup(true);
        Ok(Self::from_object_store(Arc::new(local), "", target)?.with_root(dir))
    }

    /// Wraps any object store; errors name it by `location`.
    ///
    /// # Errors
    /// Returns [`Error::Open`] if the prefix is not a valid object path.
    pub fn from_object_store(inner: Arc<dyn ObjectStore>, prefix: &str, location: &str) -> Result<Self> {
        let prefix =
            Path::parse(prefix).map_err(|e| Error::Open { location: location.to_string(), cause: cause(&e) })?;
        Ok(Self::new(inner, prefix, location))
    }
}
