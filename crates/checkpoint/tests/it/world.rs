//! An object store that fails on demand, over a real one.

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
    CheckpointInfo, Checkpoints, Choice, Dtype, Layout, OBJECT, Object, Piece, Reader, Resume, Retention, Snapshot,
    Store, Want, choice,
};

/// What happens to requests on paths that contain a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The write fails as on a full disk.
    Full,
    /// The write is done, and then reported as failed.
    DoneButFailed,
    /// The write fails with a server error, and nothing is done.
    ServerError,
    /// The write is done whatever its condition says.
    Unconditional,
    /// The write is refused for its condition.
    NoConditions,
    /// The client itself knows no conditional write to this store.
    NoneBuilt,
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
            Some(Fault::Unconditional) => self.inner.put_opts(location, payload, PutOptions::default()).await,
            Some(Fault::NoConditions) => {
                let what = "501 Not Implemented: <Code>NotImplemented</Code> A header you provided implies functionality that is not implemented";
                Err(generic(std::io::Error::other(what)))
            }
            Some(Fault::NoneBuilt) => {
                let (operation, implementer) = ("put_opts with a condition".to_owned(), "Faulty".to_owned());
                Err(object_store::Error::NotImplemented { operation, implementer })
            }
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

/// The newest `keep`, and the best.
pub fn retention(keep: usize) -> Retention {
    Retention { keep, keep_best: true, keep_every: 0 }
}

/// Parts of uploads that fail on demand, over real ones; counts what is asked for.
#[derive(Debug)]
pub struct FaultyParts {
    pub inner: Arc<InMemory>,
    /// Which parts fail, and how often still.
    pub failing: Mutex<BTreeMap<usize, usize>>,
    /// How often each part was sent, by object and part.
    pub sent: Mutex<BTreeMap<(String, usize), usize>>,
    /// Uploads that are neither whole nor ended.
    pub open: Mutex<Vec<String>>,
}

#[async_trait]
impl MultipartStore for FaultyParts {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        let id = self.inner.create_multipart(path).await?;
        self.open.lock().unwrap().push(id.clone());
        Ok(id)
    }

    async fn put_part(&self, path: &Path, id: &MultipartId, part: usize, data: PutPayload) -> Result<PartId> {
        *self.sent.lock().unwrap().entry((path.to_string(), part)).or_default() += 1;
        let hit = self.failing.lock().unwrap().get_mut(&part).filter(|n| **n > 0).map(|n| *n -= 1);
        match hit {
            Some(()) => Err(generic(std::io::Error::other("the connection was closed"))),
            None => self.inner.put_part(path, id, part, data).await,
        }
    }

    async fn complete_multipart(&self, path: &Path, id: &MultipartId, parts: Vec<PartId>) -> Result<PutResult> {
        let done = self.inner.complete_multipart(path, id, parts).await;
        self.open.lock().unwrap().retain(|o| o != id);
        done
    }

    async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
        self.open.lock().unwrap().retain(|o| o != id);
        self.inner.abort_multipart(path, id).await
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
        Checkpoints::claim(self.store.clone(), retention(keep)).await.unwrap()
    }

    /// Claims the run and takes up what there is.
    pub async fn resume(&self, keep: usize, resume: Resume) -> (Checkpoints, Option<Loaded>) {
        let mut c = self.claim(keep).await;
        let loaded = take(&self.store, c.choice(resume).unwrap()).await.unwrap();
        c.resumed(loaded.as_ref().map(|l| &l.info)).await.unwrap();
        (c, loaded)
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

/// Objects of a checkpoint whose contents tell its step: two files, and a shard of weights and moments.
pub fn objects(step: u64) -> Vec<Object> {
    let file = |name: &str, bytes: Vec<u8>| Object { name: name.into(), bytes: bytes.into(), layout: None };
    let mut out = vec![
        file("model/config.json", format!("{{\"step\":{step}}}").into_bytes()),
        file("model/tokenizer.json", vec![step as u8; 5000]),
    ];
    let numbers = |p: &Piece| (p.begin..p.begin + p.count).map(|i| value(step, &p.kind, i)).collect();
    out.extend(shards(0, pieces(&[("weight", 0, COUNT), ("exp_avg", 0, COUNT)]), OBJECT, numbers));
    out
}

/// Numbers of the one parameter there is.
pub const COUNT: u64 = 1200;

/// A number of that parameter.
pub fn value(step: u64, kind: &str, i: u64) -> f32 {
    (step * 10_000 + i) as f32 + kind.len() as f32 / 100.0
}

/// Stretches of that parameter: kind, first number, how many.
pub fn pieces(of: &[(&str, u64, u64)]) -> Vec<Piece> {
    let piece = |(kind, begin, count): &(&str, u64, u64)| Piece {
        kind: (*kind).into(),
        name: "w".into(),
        part: if *kind == "weight" { "model".into() } else { String::new() },
        dtype: Dtype::F32,
        shape: vec![COUNT / 40, 40],
        begin: *begin,
        count: *count,
    };
    of.iter().map(piece).collect()
}

/// What a writer writes of some pieces.
pub fn shards(rank: usize, pieces: Vec<Piece>, limit: u64, numbers: impl Fn(&Piece) -> Vec<f32>) -> Vec<Object> {
    let object = |(at, layout): (usize, Layout)| {
        let mut bytes = layout.header().to_vec();
        layout.pieces().for_each(|(p, _)| bytes.extend(numbers(p).into_iter().flat_map(f32::to_le_bytes)));
        Object { name: format!("shards/{rank}-{at}.safetensors"), bytes: bytes.into(), layout: Some(layout) }
    };
    Layout::divide(pieces, limit).into_iter().enumerate().map(object).collect()
}

/// What it says beside them.
pub fn snapshot(step: u64) -> Snapshot {
    Snapshot { step, meta: serde_json::json!({"step": step, "pass": 0}), best: false }
}

/// Saves a step as the only writer.
pub async fn save(c: &mut Checkpoints, step: u64) -> unveil_checkpoint::Result<CheckpointInfo> {
    c.save(snapshot(step), objects(step)).await
}

/// A checkpoint in memory, read as a learner reads it.
#[derive(Debug)]
pub struct Loaded {
    pub info: CheckpointInfo,
    pub meta: serde_json::Value,
    pub files: BTreeMap<String, Bytes>,
    /// Numbers of the parameter by kind.
    pub tensors: BTreeMap<String, Vec<f32>>,
    pub warnings: Vec<String>,
}

/// Reads what a learner would go on from.
pub async fn load(store: &Store, resume: Resume) -> unveil_checkpoint::Result<Option<Loaded>> {
    take(store, choice(store, resume).await?).await
}

/// Reads the first of the candidates that is whole.
pub async fn take(store: &Store, mut choice: Choice) -> unveil_checkpoint::Result<Option<Loaded>> {
    while let Some(info) = choice.take()? {
        match read(store, &info).await {
            Ok(loaded) => return Ok(Some(Loaded { warnings: choice.warnings().to_vec(), ..loaded })),
            Err(e) => choice.pass(&info, e)?,
        }
    }
    Ok(None)
}

async fn read(store: &Store, info: &CheckpointInfo) -> unveil_checkpoint::Result<Loaded> {
    let reader = Reader::open(store, info).await?;
    reader.check_files().await?;
    let (mut files, mut tensors) = (BTreeMap::new(), BTreeMap::new());
    for o in reader.manifest().objects.iter().filter(|o| !o.name.starts_with("shards/")) {
        files.insert(o.name.clone(), reader.file(&o.name).await?);
    }
    for t in &reader.manifest().tensors {
        let mut bytes = vec![0; (t.count() * 4) as usize];
        let (kind, name) = (t.kind.clone(), t.name.clone());
        reader.read(&[Want { kind, name, begin: 0, count: t.count(), to: 0 }], &mut bytes).await?;
        let numbers = bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        tensors.insert(t.kind.clone(), numbers.collect());
    }
    let (info, meta) = (info.clone(), reader.manifest().meta.clone());
    Ok(Loaded { info, meta, files, tensors, warnings: Vec::new() })
}
