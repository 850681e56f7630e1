//! Kills a real process before every single operation of a save: whatever the phase, the newest checkpoint is valid, the previous one
//! is intact, and the next learner cleans up. The child wraps a directory that keeps unfinished uploads as S3 does.

use std::fmt;
use std::path::{Path as FsPath, PathBuf};
use std::process::Stdio;
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
use unveil_checkpoint::{
    Access, CheckpointHeader, Checkpoints, Object, Resume, Store, TensorSlice, WriteReport, WriteTask, list, verify,
    write,
};
use unveil_testkit::ignored_test;

use crate::common::{
    COUNT, header, load, load_first_valid, objects, retention, save, shards, tensor_slices, value, wrapped_store,
};

/// Environment variable with the JSON of a child's [`ChildSpec`].
const SPEC_VARIABLE: &str = "UNVEIL_TEST_KILL";

#[derive(Serialize, Deserialize)]
struct ChildSpec {
    dir: PathBuf,
    /// Number of the operation before which the child dies.
    kill_at: usize,
    /// Whether only rank 1 writes, in the current term; otherwise ranks 0 and 1 write in a new term, and the child commits.
    single_rank: bool,
}

/// A directory with multipart uploads, in `parts/` next to it, which aborts the process before a given operation.
#[derive(Debug, Clone)]
struct KillingStore {
    inner: Arc<LocalFileSystem>,
    parts: PathBuf,
    operations: Arc<AtomicUsize>,
    /// Number of the operation before which the process dies.
    kill_at: usize,
}

impl KillingStore {
    fn new(dir: &FsPath, kill_at: usize) -> Self {
        let run = dir.join("run");
        let parts = dir.join("parts");
        std::fs::create_dir_all(&run).unwrap();
        std::fs::create_dir_all(&parts).unwrap();
        let inner = LocalFileSystem::new_with_prefix(&run).unwrap().with_automatic_cleanup(true);
        Self { inner: inner.into(), parts, operations: Arc::default(), kill_at }
    }

    fn store(&self) -> Store {
        let store = Store::from_object_store(Arc::new(self.clone()), "", "a directory").unwrap();
        store.with_multipart(Arc::new(self.clone()))
    }

    async fn perform<T>(&self, name: &str, path: &Path, operation: impl Future<Output = Result<T>>) -> Result<T> {
        let number = self.operations.fetch_add(1, Ordering::SeqCst);
        println!("operation {number}: {name} {path}");
        if number == self.kill_at {
            std::process::abort();
        }
        let result = operation.await;
        println!("after {name} {path}");
        result
    }
}

impl fmt::Display for KillingStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KillingStore({})", self.inner)
    }
}

wrapped_store! {
    KillingStore,

    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.perform("put", location, self.inner.put_opts(location, payload, opts)).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        let delete = move |path: Result<Path>| {
            let store = store.clone();
            async move {
                let path = path?;
                store.perform("delete", &path, store.inner.delete(&path)).await?;
                Ok(path)
            }
        };
        locations.then(delete).boxed()
    }
}

#[async_trait]
impl MultipartStore for KillingStore {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        let id = path.as_ref().replace('/', "-");
        let create = async {
            std::fs::create_dir_all(self.parts.join(&id)).unwrap();
            Ok(())
        };
        self.perform("begin", path, create).await?;
        Ok(id)
    }

    async fn put_part(&self, path: &Path, id: &MultipartId, part: usize, data: PutPayload) -> Result<PartId> {
        let file = self.parts.join(id).join(part.to_string());
        let put = async {
            let bytes: Vec<u8> = data.iter().flatten().copied().collect();
            std::fs::write(file, bytes).unwrap();
            Ok(())
        };
        self.perform("part", path, put).await?;
        Ok(PartId { content_id: part.to_string() })
    }

    async fn complete_multipart(&self, path: &Path, id: &MultipartId, parts: Vec<PartId>) -> Result<PutResult> {
        let dir = self.parts.join(id);
        let read = |p: &PartId| std::fs::read(dir.join(&p.content_id)).unwrap();
        let whole: Vec<u8> = parts.iter().flat_map(read).collect();
        let complete = async {
            let put = self.inner.put(path, whole.into()).await;
            std::fs::remove_dir_all(&dir).unwrap();
            put
        };
        self.perform("complete", path, complete).await
    }

    async fn abort_multipart(&self, _: &Path, id: &MultipartId) -> Result<()> {
        let _ = std::fs::remove_dir_all(self.parts.join(id));
        Ok(())
    }
}

/// The objects of one of two ranks: half of both kinds; on rank 0 files in addition, on rank 1 an object with two parts.
fn rank_objects(step: u64, rank: u64) -> Vec<Object> {
    let begin = rank * COUNT / 2;
    let count = COUNT / 2;
    let values = |s: &TensorSlice| (s.begin..s.begin + s.count).map(|i| value(step, &s.kind, i)).collect();
    let slices = tensor_slices(&[("weight", begin, count), ("exp_avg", begin, count)]);
    let mut rank_objects = shards(rank as usize, slices, 2000, values);
    if rank == 0 {
        rank_objects.extend(objects(step).into_iter().filter(|o| o.layout.is_none()));
    } else {
        let bytes = vec![step as u8; (16 << 20) + 9];
        rank_objects.push(Object { name: "model/large.bin".into(), bytes: bytes.into(), layout: None });
    }
    rank_objects
}

async fn write_rank(store: &Store, step: u64, term: u64, rank: u64) -> WriteReport {
    write(store, WriteTask { step, term, rank: rank as usize, objects: rank_objects(step, rank) }).await.unwrap()
}

/// The body of the child process: saves step 2.
#[test]
#[ignore = "started by other tests"]
fn child() {
    let spec: ChildSpec =
        serde_json::from_str(&std::env::var(SPEC_VARIABLE).expect("started by another test")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = KillingStore::new(&spec.dir, spec.kill_at).store();
        if spec.single_rank {
            write_rank(&store, 2, 1, 1).await;
            return;
        }
        let mut c = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
        let term = c.term();
        c.begin_save(2).await.unwrap();
        let reports = futures::future::join_all((0..2).map(|rank| write_rank(&store, 2, term, rank))).await;
        c.commit(CheckpointHeader { best: true, ..header(2) }, reports).await.unwrap();
    });
}

/// Runs a child and returns its output.
fn run_child(dir: &FsPath, kill_at: usize, single_rank: bool) -> String {
    let mut command = ignored_test("killed::child");
    let spec = ChildSpec { dir: dir.to_owned(), kill_at, single_rank };
    command.env(SPEC_VARIABLE, serde_json::to_string(&spec).unwrap()).stderr(Stdio::null());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.success(), text.contains("test result: ok. 1 passed"), "{text}");
    text
}

/// Kills a child before each operation of its save in turn, until one survives; returns the output of that one.
async fn kill_at_every_operation(single_rank: bool) -> String {
    let term = if single_rank { 1 } else { 2 };
    for kill_at in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let multipart = KillingStore::new(dir.path(), usize::MAX);
        let no_options: [(&str, &str); 0] = [];
        let store = Store::open(run_dir.to_str().unwrap(), no_options, Access::Write).await.unwrap();
        let store = store.with_multipart(Arc::new(multipart));
        let mut first = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
        save(&mut first, 1).await.unwrap();
        let text = run_child(dir.path(), kill_at, single_rank);
        let last = text.lines().rfind(|l| l.starts_with("operation")).unwrap_or_default().to_owned();
        // Every existing checkpoint is valid, and one of the two is loaded.
        let checks = verify(&store, None).await.unwrap();
        assert!(checks.iter().all(|c| c.ok), "{last}: {checks:?}");
        let infos = list(&store).await.unwrap();
        let loaded = load(&store, Resume::Auto).await.unwrap().unwrap();
        let step = loaded.info.step;
        assert!(loaded.warnings.is_empty() && infos.iter().any(|c| c.step == step), "{last}");
        assert!(step == 1 || (!single_rank && step == 2), "{last}");
        for kind in ["weight", "exp_avg"] {
            let expected: Vec<f32> = (0..COUNT).map(|i| value(step, kind, i)).collect();
            assert_eq!(loaded.tensors[kind], expected, "{last}");
        }
        let committed = text.contains("after put log/00000004.json");
        assert_eq!(step == 2, committed, "{last}: the checkpoint exists if and only if the log names it");
        // The next learner resumes, aborts the uploads, and removes the objects of the interrupted save.
        let mut next = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
        let candidates = next.resume_candidates(Resume::Auto).unwrap();
        let from = load_first_valid(&store, candidates).await.unwrap().unwrap();
        next.record_resume(Some(&from.info)).await.unwrap();
        // Only the store itself can remove an upload whose id has not been recorded; all others are aborted.
        let begun = text.contains(&format!("after begin checkpoints/step-2/term-{term}/model/large.bin"));
        let recorded = text.contains(&format!("after put uploads/step-2-term-{term}-rank-1.json"));
        let open = std::fs::read_dir(dir.path().join("parts")).unwrap().count();
        assert!(open <= usize::from(begun && !recorded), "{last}: {open} uploads stay open");
        save(&mut next, 3).await.unwrap();
        assert!(verify(&store, None).await.unwrap().iter().all(|c| c.ok), "{last}");
        let step_dir = dir.path().join("run/checkpoints/step-2");
        let kept = list(&store).await.unwrap().iter().any(|c| c.step == 2);
        assert_eq!(step_dir.exists(), kept, "{last}: objects of the interrupted save");
        if text.contains("test result: ok") {
            return text;
        }
    }
    unreachable!()
}

#[tokio::test]
async fn kill_in_any_phase_of_a_save_loses_no_checkpoint() {
    let text = kill_at_every_operation(false).await;
    // The phases by name; each one begins and completes.
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
async fn kill_of_a_writing_rank_loses_only_that_save() {
    let text = kill_at_every_operation(true).await;
    assert!(text.contains("complete checkpoints/step-2/term-1/model/large.bin"), "{text}");
}
