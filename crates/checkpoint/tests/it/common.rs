//! Fixtures: object stores that fail on demand, and checkpoints with known contents.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartId, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use unveil_checkpoint::{
    CheckpointHeader, CheckpointInfo, Checkpoints, Dtype, MAX_OBJECT_BYTES, Object, ObjectLayout, ReadRequest, Reader,
    Resume, ResumeCandidates, Retention, Store, TensorSlice, resume_candidates,
};

/// An injected fault, for requests on paths that contain a given text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// The write fails as on a full disk.
    DiskFull,
    /// The write succeeds, but is reported as failed.
    DoneButFailed,
    /// The write fails with a server error and has no effect.
    ServerError,
    /// The write ignores its condition.
    ConditionIgnored,
    /// The store rejects the condition.
    ConditionRejected,
    /// The client does not implement conditional writes for the store.
    ConditionUnimplemented,
    /// The write never returns.
    Hang,
    /// The read fails.
    Unreadable,
}

/// Faults, each with a text of the path and the number of matching requests that still fail.
pub(crate) type FaultPlan = Arc<Mutex<Vec<(Fault, &'static str, usize)>>>;

#[derive(Debug)]
pub(crate) struct FaultyStore {
    pub inner: Arc<dyn ObjectStore>,
    pub plan: FaultPlan,
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultyStore({})", self.inner)
    }
}

fn generic(e: std::io::Error) -> Error {
    Error::Generic { store: "FaultyStore", source: Box::new(e) }
}

impl FaultyStore {
    fn next_fault(&self, location: &Path, is_read: bool) -> Option<Fault> {
        let mut plan = self.plan.lock().unwrap();
        let entry = plan.iter_mut().find(|(fault, text, remaining)| {
            *remaining > 0 && (*fault == Fault::Unreadable) == is_read && location.as_ref().contains(text)
        })?;
        entry.2 -= 1;
        Some(entry.0)
    }
}

/// Implements [`ObjectStore`] for a wrapper with the given methods; the requests of all others go to its `inner`.
macro_rules! wrapped_store {
    ($store:ty, $($methods:tt)*) => {
        #[async_trait]
        impl ObjectStore for $store {
            $($methods)*

            async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
                self.inner.put_multipart_opts(location, opts).await
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
    };
}
pub(crate) use wrapped_store;

wrapped_store! {
    FaultyStore,

    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        match self.next_fault(location, false) {
            Some(Fault::DiskFull) => Err(generic(std::io::Error::from_raw_os_error(28))),
            Some(Fault::ServerError) => Err(generic(std::io::Error::other("503 Slow Down"))),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::ConditionIgnored) => self.inner.put_opts(location, payload, PutOptions::default()).await,
            Some(Fault::ConditionRejected) => {
                let response = "501 Not Implemented: <Code>NotImplemented</Code> A header you provided implies functionality that is not implemented";
                Err(generic(std::io::Error::other(response)))
            }
            Some(Fault::ConditionUnimplemented) => Err(object_store::Error::NotImplemented {
                operation: "put_opts with a condition".to_owned(),
                implementer: "FaultyStore".to_owned(),
            }),
            Some(Fault::DoneButFailed) => {
                self.inner.put_opts(location, payload, opts).await?;
                Err(generic(std::io::Error::other("the connection was closed")))
            }
            Some(Fault::Unreadable) | None => self.inner.put_opts(location, payload, opts).await,
        }
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.next_fault(location, true) {
            Some(_) => Err(generic(std::io::Error::other("500 Internal Error"))),
            None => self.inner.get_opts(location, options).await,
        }
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }
}

/// Keeps the newest `keep` checkpoints and the best one.
pub(crate) fn retention(keep: usize) -> Retention {
    Retention { keep, keep_best: true, keep_every: 0 }
}

/// A multipart store whose parts fail on demand, and which records the requests.
#[derive(Debug)]
pub(crate) struct FaultyMultipart {
    pub inner: Arc<InMemory>,
    /// Number of further failures by part index.
    pub failing: Mutex<BTreeMap<usize, usize>>,
    /// Number of requests by object and part index.
    pub sent: Mutex<BTreeMap<(String, usize), usize>>,
    /// Uploads that are neither completed nor aborted.
    pub open: Mutex<Vec<String>>,
}

#[async_trait]
impl MultipartStore for FaultyMultipart {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        let id = self.inner.create_multipart(path).await?;
        self.open.lock().unwrap().push(id.clone());
        Ok(id)
    }

    async fn put_part(&self, path: &Path, id: &MultipartId, part: usize, data: PutPayload) -> Result<PartId> {
        *self.sent.lock().unwrap().entry((path.to_string(), part)).or_default() += 1;
        let fault = self.failing.lock().unwrap().get_mut(&part).filter(|n| **n > 0).map(|n| *n -= 1);
        match fault {
            Some(()) => Err(generic(std::io::Error::other("the connection was closed"))),
            None => self.inner.put_part(path, id, part, data).await,
        }
    }

    async fn complete_multipart(&self, path: &Path, id: &MultipartId, parts: Vec<PartId>) -> Result<PutResult> {
        let completed = self.inner.complete_multipart(path, id, parts).await;
        self.open.lock().unwrap().retain(|o| o != id);
        completed
    }

    async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
        self.open.lock().unwrap().retain(|o| o != id);
        self.inner.abort_multipart(path, id).await
    }
}

/// A run in a store that can fail, and the raw store beneath it.
pub(crate) struct FaultyRun {
    pub raw: Arc<dyn ObjectStore>,
    pub plan: FaultPlan,
    pub store: Store,
}

impl FaultyRun {
    pub(crate) fn in_memory() -> Self {
        let raw: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let plan = FaultPlan::default();
        let faulty = Arc::new(FaultyStore { inner: raw.clone(), plan: plan.clone() });
        let store = Store::from_object_store(faulty, "runs/a", "mem://runs/a").unwrap();
        Self { raw, plan, store }
    }

    pub(crate) fn inject(&self, fault: Fault, path: &'static str, times: usize) {
        self.plan.lock().unwrap().push((fault, path, times));
    }

    pub(crate) async fn claim(&self, keep: usize) -> Checkpoints {
        Checkpoints::claim(self.store.clone(), retention(keep)).await.unwrap()
    }

    /// Claims the run and resumes it.
    pub(crate) async fn resume(&self, keep: usize, resume: Resume) -> (Checkpoints, Option<Loaded>) {
        let mut checkpoints = self.claim(keep).await;
        let candidates = checkpoints.resume_candidates(resume).unwrap();
        let loaded = load_first_valid(&self.store, candidates).await.unwrap();
        checkpoints.record_resume(loaded.as_ref().map(|l| &l.info)).await.unwrap();
        (checkpoints, loaded)
    }

    /// Lists the names below a folder of the run.
    pub(crate) async fn names(&self, folder: &str) -> Vec<String> {
        use futures::TryStreamExt;
        let root = Path::from(format!("runs/a/{folder}"));
        let objects: Vec<ObjectMeta> = self.raw.list(Some(&root)).try_collect().await.unwrap();
        let mut names: Vec<String> =
            objects.into_iter().map(|m| m.location.as_ref().trim_start_matches("runs/a/").to_string()).collect();
        names.sort();
        names
    }
}

/// Builds objects whose contents depend on the step: two files, and shards of weights and moments.
pub(crate) fn objects(step: u64) -> Vec<Object> {
    let file = |name: &str, bytes: Vec<u8>| Object { name: name.into(), bytes: bytes.into(), layout: None };
    let mut objects = vec![
        file("model/config.json", format!("{{\"step\":{step}}}").into_bytes()),
        file("model/tokenizer.json", vec![step as u8; 5000]),
    ];
    let values = |s: &TensorSlice| (s.begin..s.begin + s.count).map(|i| value(step, &s.kind, i)).collect();
    let slices = tensor_slices(&[("weight", 0, COUNT), ("exp_avg", 0, COUNT)]);
    objects.extend(shards(0, slices, MAX_OBJECT_BYTES, values));
    objects
}

/// Number of elements of the only parameter, `w`.
pub(crate) const COUNT: u64 = 1200;

/// Returns element `i` of the parameter (or its moment).
pub(crate) fn value(step: u64, kind: &str, i: u64) -> f32 {
    (step * 10_000 + i) as f32 + kind.len() as f32 / 100.0
}

/// Builds slices of the parameter from kind, first element and number of elements.
pub(crate) fn tensor_slices(ranges: &[(&str, u64, u64)]) -> Vec<TensorSlice> {
    let slice = |(kind, begin, count): &(&str, u64, u64)| TensorSlice {
        kind: (*kind).into(),
        name: "w".into(),
        artifact: if *kind == "weight" { "model".into() } else { String::new() },
        dtype: Dtype::F32,
        shape: vec![COUNT / 40, 40],
        begin: *begin,
        count: *count,
    };
    ranges.iter().map(slice).collect()
}

/// Builds the objects of one writer from its slices.
pub(crate) fn shards(
    rank: usize,
    slices: Vec<TensorSlice>,
    limit: u64,
    values: impl Fn(&TensorSlice) -> Vec<f32>,
) -> Vec<Object> {
    let object = |(index, layout): (usize, ObjectLayout)| {
        let mut bytes = layout.header().to_vec();
        layout.slices().for_each(|(slice, _)| bytes.extend(values(slice).into_iter().flat_map(f32::to_le_bytes)));
        Object { name: format!("shards/{rank}-{index}.safetensors"), bytes: bytes.into(), layout: Some(layout) }
    };
    ObjectLayout::split_into_objects(slices, limit).into_iter().enumerate().map(object).collect()
}

pub(crate) fn header(step: u64) -> CheckpointHeader {
    CheckpointHeader { step, meta: serde_json::json!({"step": step, "pass": 0}), best: false }
}

/// Saves a step as the only writer.
pub(crate) async fn save(checkpoints: &mut Checkpoints, step: u64) -> unveil_checkpoint::Result<CheckpointInfo> {
    checkpoints.save(header(step), objects(step)).await
}

/// A loaded checkpoint.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub info: CheckpointInfo,
    pub meta: serde_json::Value,
    pub files: BTreeMap<String, Bytes>,
    /// Elements of the parameter by kind.
    pub tensors: BTreeMap<String, Vec<f32>>,
    pub warnings: Vec<String>,
}

/// Loads the checkpoint that a learner would resume from.
pub(crate) async fn load(store: &Store, resume: Resume) -> unveil_checkpoint::Result<Option<Loaded>> {
    load_first_valid(store, resume_candidates(store, resume).await?).await
}

/// Loads the first candidate that is valid.
pub(crate) async fn load_first_valid(
    store: &Store,
    mut candidates: ResumeCandidates,
) -> unveil_checkpoint::Result<Option<Loaded>> {
    while let Some(info) = candidates.next_candidate()? {
        match read(store, &info).await {
            Ok(loaded) => return Ok(Some(Loaded { warnings: candidates.warnings().to_vec(), ..loaded })),
            Err(e) => candidates.reject(&info, e)?,
        }
    }
    Ok(None)
}

async fn read(store: &Store, info: &CheckpointInfo) -> unveil_checkpoint::Result<Loaded> {
    let reader = Reader::open(store, info).await?;
    reader.verify_files().await?;
    let mut files = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    for o in reader.manifest().objects.iter().filter(|o| !o.name.starts_with("shards/")) {
        files.insert(o.name.clone(), reader.read_file(&o.name).await?);
    }
    for t in &reader.manifest().tensors {
        let mut bytes = vec![0; (t.count() * 4) as usize];
        let request =
            ReadRequest { kind: t.kind.clone(), name: t.name.clone(), begin: 0, count: t.count(), destination: 0 };
        reader.read(&[request], &mut bytes).await?;
        let values = bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        tensors.insert(t.kind.clone(), values.collect());
    }
    let meta = reader.manifest().meta.clone();
    Ok(Loaded { info: info.clone(), meta, files, tensors, warnings: Vec::new() })
}
