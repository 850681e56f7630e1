//! An object store that fails on demand, over a real one.

use std::fmt;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use unveil_checkpoint::{Checkpoints, Retention, Snapshot, Store};

/// What happens to requests on paths that contain a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The write fails as on a full disk.
    Full,
    /// The write is done, and then reported as failed.
    DoneButFailed,
    /// The write fails with a server error, and nothing is done.
    ServerError,
    /// The write never returns.
    Hang,
    /// The read fails.
    Unreadable,
}

/// A fault on a path for the next `times` matching requests.
pub type Plan = Arc<Mutex<Vec<(Fault, &'static str, usize)>>>;

#[derive(Debug)]
pub struct Faulty {
    pub inner: Arc<dyn ObjectStore>,
    pub plan: Plan,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({})", self.inner)
    }
}

fn generic(e: std::io::Error) -> Error {
    Error::Generic { store: "Faulty", source: Box::new(e) }
}

impl Faulty {
    fn hit(&self, location: &Path, reads: bool) -> Option<Fault> {
        let mut plan = self.plan.lock().unwrap();
        let hit = plan.iter_mut().find(|(fault, text, left)| {
            *left > 0 && (*fault == Fault::Unreadable) == reads && location.as_ref().contains(text)
        })?;
        hit.2 -= 1;
        Some(hit.0)
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        match self.hit(location, false) {
            Some(Fault::Full) => Err(generic(std::io::Error::from_raw_os_error(28))),
            Some(Fault::ServerError) => Err(generic(std::io::Error::other("503 Slow Down"))),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::DoneButFailed) => {
                self.inner.put_opts(location, payload, opts).await?;
                Err(generic(std::io::Error::other("the connection was closed")))
            }
            Some(Fault::Unreadable) | None => self.inner.put_opts(location, payload, opts).await,
        }
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.hit(location, true) {
            Some(_) => Err(generic(std::io::Error::other("500 Internal Error"))),
            None => self.inner.get_opts(location, options).await,
        }
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// Two stores of the same run: one that can fail, and the plain one beneath it.
pub struct World {
    pub raw: Arc<dyn ObjectStore>,
    pub plan: Plan,
    pub store: Store,
}

impl World {
    pub fn over(raw: Arc<dyn ObjectStore>) -> Self {
        let plan = Plan::default();
        let faulty = Arc::new(Faulty { inner: raw.clone(), plan: plan.clone() });
        let store = Store::from_object_store(faulty, "runs/a", "mem://runs/a").unwrap();
        Self { raw, plan, store }
    }

    pub fn memory() -> Self {
        Self::over(Arc::new(object_store::memory::InMemory::new()))
    }

    pub fn fault(&self, fault: Fault, path: &'static str, times: usize) {
        self.plan.lock().unwrap().push((fault, path, times));
    }

    pub async fn claim(&self, keep: usize) -> Checkpoints {
        Checkpoints::claim(self.store.clone(), Retention { keep, keep_best: true }).await.unwrap()
    }

    /// Names below a folder of the run.
    pub async fn names(&self, folder: &str) -> Vec<String> {
        use futures::TryStreamExt;
        let root = Path::from(format!("runs/a/{folder}"));
        let all: Vec<ObjectMeta> = self.raw.list(Some(&root)).try_collect().await.unwrap();
        let mut names: Vec<String> =
            all.into_iter().map(|m| m.location.as_ref().trim_start_matches("runs/a/").to_string()).collect();
        names.sort();
        names
    }
}

/// A checkpoint whose contents tell its step.
pub fn snapshot(step: u64) -> Snapshot {
    let model = Bytes::from(vec![step as u8; 5000]);
    Snapshot {
        step,
        objects: vec![
            ("model/model.safetensors".into(), model),
            ("model/config.json".into(), Bytes::from(format!("{{\"step\":{step}}}"))),
            ("optimizer.safetensors".into(), Bytes::from(vec![1, 2, 3, step as u8])),
        ],
        meta: serde_json::json!({"step": step, "pass": 0}),
        best: false,
    }
}
