//! A real process is killed before every operation of a save, that is after every one before it: whatever the phase, the newest
//! checkpoint verifies and the one before is intact, and the next learner cleans up. The child wraps a directory that keeps unfinished
//! uploads as S3 does.

use std::fmt;
use std::path::{Path as FsPath, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartId, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use serde::{Deserialize, Serialize};
use unveil_checkpoint::{Access, Checkpoints, Object, Report, Resume, Snapshot, Store, Task, list, verify, write};

use crate::world::{COUNT, load, objects, pieces, retention, save, shards, snapshot, take, value};

/// What a child is told.
const SPEC: &str = "UNVEIL_TEST_KILL";

#[derive(Serialize, Deserialize)]
struct Spec {
    dir: PathBuf,
    /// The operation before which it dies.
    at: usize,
    /// Rank 1 alone writes, under the term that is held; else ranks 0 and 1 write and it is committed.
    alone: bool,
}

/// A directory with uploads in parts, under `parts/` beside it.
#[derive(Debug, Clone)]
struct Killer {
    inner: Arc<LocalFileSystem>,
    parts: PathBuf,
    done: Arc<AtomicUsize>,
    /// Before which operation it dies.
    at: usize,
}

impl Killer {
    fn new(dir: &FsPath, at: usize) -> Self {
        let (run, parts) = (dir.join("run"), dir.join("parts"));
        std::fs::create_dir_all(&run).unwrap();
        std::fs::create_dir_all(&parts).unwrap();
        let inner = LocalFileSystem::new_with_prefix(&run).unwrap().with_automatic_cleanup(true);
        Self { inner: inner.into(), parts, done: Arc::default(), at }
    }

    fn store(&self) -> Store {
        let store = Store::from_object_store(Arc::new(self.clone()), "", "a directory").unwrap();
        store.with_multipart(Arc::new(self.clone()))
    }

    async fn act<T>(&self, what: &str, path: &Path, work: impl Future<Output = Result<T>>) -> Result<T> {
        let now = self.done.fetch_add(1, Ordering::SeqCst);
        println!("moment {now}: {what} {path}");
        if now == self.at {
            std::process::abort();
        }
        let done = work.await;
        println!("after {what} {path}");
        done
    }
}

impl fmt::Display for Killer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Killer({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Killer {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.act("put", location, self.inner.put_opts(location, payload, opts)).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let own = self.clone();
        let delete = move |path: Result<Path>| {
            let own = own.clone();
            async move {
                let path = path?;
                own.act("delete", &path, own.inner.delete(&path)).await?;
                Ok(path)
            }
        };
        locations.then(delete).boxed()
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

#[async_trait]
impl MultipartStore for Killer {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        let id = path.as_ref().replace('/', "-");
        let make = async {
            std::fs::create_dir_all(self.parts.join(&id)).unwrap();
            Ok(())
        };
        self.act("begin", path, make).await?;
        Ok(id)
    }

    async fn put_part(&self, path: &Path, id: &MultipartId, part: usize, data: PutPayload) -> Result<PartId> {
        let to = self.parts.join(id).join(part.to_string());
        let put = async {
            let bytes: Vec<u8> = data.iter().flatten().copied().collect();
            std::fs::write(to, bytes).unwrap();
            Ok(())
        };
        self.act("part", path, put).await?;
        Ok(PartId { content_id: part.to_string() })
    }

    async fn complete_multipart(&self, path: &Path, id: &MultipartId, parts: Vec<PartId>) -> Result<PutResult> {
        let from = self.parts.join(id);
        let read = |p: &PartId| std::fs::read(from.join(&p.content_id)).unwrap();
        let whole: Vec<u8> = parts.iter().flat_map(read).collect();
        let work = async {
            let put = self.inner.put(path, whole.into()).await;
            std::fs::remove_dir_all(&from).unwrap();
            put
        };
        self.act("complete", path, work).await
    }

    async fn abort_multipart(&self, _: &Path, id: &MultipartId) -> Result<()> {
        let _ = std::fs::remove_dir_all(self.parts.join(id));
        Ok(())
    }
}

/// What a rank of two writes: half of both kinds, rank 0 files besides, rank 1 one of two parts.
fn share(step: u64, rank: u64) -> Vec<Object> {
    let (begin, count) = (rank * COUNT / 2, COUNT / 2);
    let numbers =
        |p: &unveil_checkpoint::Piece| (p.begin..p.begin + p.count).map(|i| value(step, &p.kind, i)).collect();
    let mut all = shards(rank as usize, pieces(&[("weight", begin, count), ("exp_avg", begin, count)]), 2000, numbers);
    if rank == 0 {
        all.extend(objects(step).into_iter().filter(|o| o.layout.is_none()));
    } else {
        let bytes = vec![step as u8; (16 << 20) + 9];
        all.push(Object { name: "model/large.bin".into(), bytes: bytes.into(), layout: None });
    }
    all
}

async fn write_share(store: &Store, step: u64, term: u64, rank: u64) -> Report {
    write(store, Task { step, term, rank: rank as usize, objects: share(step, rank) }).await.unwrap()
}

/// The child: the save of step 2.
#[test]
#[ignore = "started by other tests"]
fn child() {
    let spec: Spec = serde_json::from_str(&std::env::var(SPEC).expect("started by another test")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Killer::new(&spec.dir, spec.at).store();
        if spec.alone {
            write_share(&store, 2, 1, 1).await;
            return;
        }
        let mut c = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
        let term = c.term();
        c.begin(2).await.unwrap();
        let reports = futures::future::join_all((0..2).map(|rank| write_share(&store, 2, term, rank))).await;
        c.commit(Snapshot { best: true, ..snapshot(2) }, reports).await.unwrap();
    });
}

fn run(dir: &FsPath, at: usize, alone: bool) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["killed::child", "--exact", "--ignored", "--nocapture"]);
    let spec = Spec { dir: dir.to_owned(), at, alone };
    command.env(SPEC, serde_json::to_string(&spec).unwrap()).stderr(Stdio::null());
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(out.status.success(), text.contains("test result: ok. 1 passed"), "{text}");
    text
}

/// Kills a child at every moment of its save, until one survives; returns what it did.
async fn every_moment(alone: bool) -> String {
    let term = if alone { 1 } else { 2 };
    for at in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("run");
        let parts = Killer::new(dir.path(), usize::MAX);
        let none: [(&str, &str); 0] = [];
        let store = Store::open(place.to_str().unwrap(), none, Access::Write).await.unwrap();
        let store = store.with_multipart(Arc::new(parts));
        let mut first = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
        save(&mut first, 1).await.unwrap();
        let text = run(dir.path(), at, alone);
        let last = text.lines().rfind(|l| l.starts_with("moment")).unwrap_or_default().to_owned();
        // Whatever exists is whole, and what is loaded is one of the two.
        let checks = verify(&store, None).await.unwrap();
        assert!(checks.iter().all(|c| c.ok), "{last}: {checks:?}");
        let infos = list(&store).await.unwrap();
        let loaded = load(&store, Resume::Auto).await.unwrap().unwrap();
        let step = loaded.info.step;
        assert!(loaded.warnings.is_empty() && infos.iter().any(|c| c.step == step), "{last}");
        assert!(step == 1 || (!alone && step == 2), "{last}");
        for kind in ["weight", "exp_avg"] {
            let wanted: Vec<f32> = (0..COUNT).map(|i| value(step, kind, i)).collect();
            assert_eq!(loaded.tensors[kind], wanted, "{last}");
        }
        let told = text.contains("after put log/00000004.json");
        assert_eq!(step == 2, told, "{last}: it exists when the log says so, and only then");
        // The next learner goes on, ends the uploads, and leaves nothing of the save that was cut off.
        let mut next = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
        let from = take(&store, next.choice(Resume::Auto).unwrap()).await.unwrap().unwrap();
        next.resumed(Some(&from.info)).await.unwrap();
        // An upload whose id was not written yet is the store's own to end; all others are ended.
        let begun = text.contains(&format!("after begin checkpoints/step-2/term-{term}/model/large.bin"));
        let told = text.contains(&format!("after put uploads/step-2-term-{term}-rank-1.json"));
        let open = std::fs::read_dir(dir.path().join("parts")).unwrap().count();
        assert!(open <= usize::from(begun && !told), "{last}: {open} uploads stay open");
        save(&mut next, 3).await.unwrap();
        assert!(verify(&store, None).await.unwrap().iter().all(|c| c.ok), "{last}");
        let left = dir.path().join("run/checkpoints/step-2");
        let kept = list(&store).await.unwrap().iter().any(|c| c.step == 2);
        assert_eq!(left.exists(), kept, "{last}: what is left of the save");
        if text.contains("test result: ok") {
            return text;
        }
    }
    unreachable!()
}

#[tokio::test]
async fn no_phase_of_a_save_loses_a_checkpoint() {
    let text = every_moment(false).await;
    // The phases by name, each with the moment before and after it.
    for phase in [
        "put log/00000004.json",
        "begin checkpoints/step-2/term-2/model/large.bin",
        "put uploads/step-2-term-2-rank-1.json",
        "put checkpoints/step-2/term-2/shards/0-0.safetensors",
        "put checkpoints/step-2/term-2/shards/1-1.safetensors",
        "part checkpoints/step-2/term-2/model/large.bin",
        "complete checkpoints/step-2/term-2/model/large.bin",
        "delete uploads/step-2-term-2-rank-1.json",
        "put checkpoints/step-2/term-2/manifest.json",
        "put log/00000005.json",
        "put log/00000006.json",
        "delete checkpoints/step-1/term-1/manifest.json",
        "delete checkpoints/step-1/term-1/shards/0-0.safetensors",
    ] {
        assert!(text.contains(&format!(": {phase}")) && text.contains(&format!("after {phase}")), "{phase}: {text}");
    }
}

#[tokio::test]
async fn a_rank_that_dies_while_it_writes_costs_nothing_but_that_save() {
    let text = every_moment(true).await;
    assert!(text.contains("complete checkpoints/step-2/term-1/model/large.bin"), "{text}");
}
