//! Driver of the checkpoint benchmark (tests/bench/checkpoint.py): measures Unveil's checkpoints, and the raw throughput of the same
//! store with the same client. Reads one JSON command per line and answers each with one JSON line.
//!
//! `checkpoint_bench SHAPES.json` creates parameters in fp32 with two moments each, in host memory. The commands `save`, `load`,
//! `raw_save`, `raw_load` and `clear` have the key `url`. A save copies the state as a learner does, then writes objects, manifest and
//! log; a load reads and verifies everything into memory.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark may panic, and its results go to stdout")]
#![allow(clippy::disallowed_methods, reason = "credentials of the store come from the environment")]

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::multipart::MultipartStore;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use unveil_checkpoint::{
    Access, CheckpointHeader, Checkpoints, Dtype, MAX_OBJECT_BYTES, Object, ObjectLayout, ReadRequest, Reader, Resume,
    Retention, Store, TensorSlice, WriteTask, resume_candidates, write,
};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Size of a part in bytes, as in the checkpoint crate.
const PART_BYTES: usize = 16 << 20;

/// Number of parts in flight, as in the checkpoint crate.
const MAX_IN_FLIGHT: usize = 8;

/// A store whose raw throughput is measured.
#[derive(Clone)]
enum RawStore {
    Local(Arc<LocalFileSystem>),
    S3(Arc<object_store::aws::AmazonS3>, ObjectPath),
}

impl RawStore {
    fn open(url: &str) -> Result<Self, BoxError> {
        if !url.starts_with("s3://") {
            std::fs::create_dir_all(url)?;
            return Ok(Self::Local(Arc::new(LocalFileSystem::new_with_prefix(url)?.with_fsync(true))));
        }
        let mut builder = AmazonS3Builder::new().with_url(url);
        for (key, value) in std::env::vars() {
            if let Ok(key) = key.to_ascii_lowercase().parse() {
                builder = builder.with_config(key, value);
            }
        }
        let path = url.trim_start_matches("s3://").split_once('/').map_or("", |(_, p)| p);
        Ok(Self::S3(Arc::new(builder.build()?), ObjectPath::from(path)))
    }

    fn key(&self, name: &str) -> ObjectPath {
        match self {
            Self::Local(_) => ObjectPath::from(name),
            Self::S3(_, prefix) => prefix.clone().join(name),
        }
    }

    fn object_store(&self) -> Arc<dyn ObjectStore> {
        match self {
            Self::Local(s) => s.clone(),
            Self::S3(s, _) => s.clone(),
        }
    }

    /// Writes objects in parallel, in parts if the store supports them.
    async fn save(&self, objects: &[Bytes]) -> Result<(), BoxError> {
        let mut uploads = Vec::new();
        let mut requests = Vec::new();
        for (object, bytes) in objects.iter().enumerate() {
            let key = self.key(&format!("raw-{object}"));
            match self {
                Self::Local(_) => requests.push((object, 0, None, key, bytes.clone())),
                Self::S3(s, _) => {
                    let id = s.create_multipart(&key).await?;
                    for (index, first) in (0..bytes.len()).step_by(PART_BYTES).enumerate() {
                        let part = bytes.slice(first..bytes.len().min(first + PART_BYTES));
                        requests.push((object, index, Some(id.clone()), key.clone(), part));
                    }
                    uploads.push((key, id));
                }
            }
        }
        let mut running = JoinSet::new();
        let mut parts = vec![Vec::new(); objects.len()];
        let mut requests = requests.into_iter();
        loop {
            while running.len() < MAX_IN_FLIGHT {
                let Some((object, index, id, key, bytes)) = requests.next() else { break };
                let store = self.clone();
                running.spawn(async move {
                    let payload = PutPayload::from_bytes(bytes);
                    let part = match (&store, &id) {
                        (Self::S3(s, _), Some(id)) => Some(s.put_part(&key, id, index, payload).await?),
                        _ => store.object_store().put(&key, payload).await.map(|_| None)?,
                    };
                    Ok::<_, object_store::Error>((object, index, part))
                });
            }
            let Some(finished) = running.join_next().await else { break };
            let (object, index, part) = finished??;
            parts[object].extend(part.map(|p| (index, p)));
        }
        if let Self::S3(s, _) = self {
            for ((key, id), mut parts) in uploads.into_iter().zip(parts) {
                parts.sort_by_key(|(index, _)| *index);
                s.complete_multipart(&key, &id, parts.into_iter().map(|(_, p)| p).collect()).await?;
            }
        }
        Ok(())
    }

    /// Reads objects of these sizes in parallel ranges.
    async fn load(&self, sizes: &[usize]) -> Result<u64, BoxError> {
        let ranges = sizes.iter().enumerate().flat_map(|(object, size)| {
            (0..*size)
                .step_by(PART_BYTES)
                .map(move |first| (object, first as u64..(*size).min(first + PART_BYTES) as u64))
        });
        let mut ranges: Vec<_> = ranges.collect();
        let mut running = JoinSet::new();
        let mut bytes = 0;
        loop {
            while running.len() < MAX_IN_FLIGHT {
                let Some((object, range)) = ranges.pop() else { break };
                let store = self.object_store();
                let key = self.key(&format!("raw-{object}"));
                running.spawn(async move { store.get_range(&key, range).await.map(|b| b.len() as u64) });
            }
            let Some(finished) = running.join_next().await else { return Ok(bytes) };
            bytes += finished??;
        }
    }

    async fn clear(&self) -> Result<(), BoxError> {
        let store = self.object_store();
        let prefix = match self {
            Self::Local(_) => None,
            Self::S3(_, prefix) => Some(prefix),
        };
        let mut listing = store.list(prefix);
        while let Some(meta) = listing.next().await {
            store.delete(&meta?.location).await?;
        }
        Ok(())
    }
}

/// A memory buffer that returns here when all of its slices are dropped.
type BufferPool = Arc<Mutex<Vec<u8>>>;

struct PooledBuffer {
    memory: Vec<u8>,
    pool: BufferPool,
}

impl AsRef<[u8]> for PooledBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.memory
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        *self.pool.lock().unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut self.memory);
    }
}

struct Bench {
    runtime: Runtime,
    /// Whole tensors, with their byte offsets in `state`.
    tensors: Vec<(TensorSlice, usize)>,
    state: Vec<u8>,
    pool: BufferPool,
    cores: usize,
}

impl Bench {
    fn new(shapes: &str) -> Result<Self, BoxError> {
        let shapes: BTreeMap<String, Vec<u64>> = serde_json::from_str(&std::fs::read_to_string(shapes)?)?;
        let mut tensors = Vec::new();
        let mut size = 0;
        for kind in ["weight", "exp_avg", "exp_avg_sq"] {
            for (name, shape) in &shapes {
                let tensor = TensorSlice {
                    kind: kind.to_owned(),
                    name: name.clone(),
                    artifact: String::new(),
                    dtype: Dtype::F32,
                    shape: shape.clone(),
                    begin: 0,
                    count: shape.iter().product(),
                };
                let bytes = tensor.bytes() as usize;
                tensors.push((tensor, size));
                size += bytes;
            }
        }
        let state = (0..size).map(|i| (i ^ (i >> 11)) as u8).collect();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { runtime, tensors, state, pool: BufferPool::default(), cores })
    }

    /// Copies the state into objects, with one thread per core, in reused memory.
    fn objects(&self) -> Vec<Object> {
        let slices = self.tensors.iter().map(|(t, _)| t.clone()).collect();
        let layouts = ObjectLayout::split_into_objects(slices, MAX_OBJECT_BYTES);
        let offsets: BTreeMap<_, _> = self.tensors.iter().map(|(t, offset)| ((&t.kind, &t.name), *offset)).collect();
        let size: usize = layouts.iter().map(|l| l.size() as usize).sum();
        let mut memory = std::mem::take(&mut *self.pool.lock().unwrap_or_else(PoisonError::into_inner));
        memory.resize(size, 0);
        let mut targets = Vec::new();
        let mut rest = memory.as_mut_slice();
        for layout in &layouts {
            let (target, remaining) = rest.split_at_mut(layout.size() as usize);
            targets.push((layout, target));
            rest = remaining;
        }
        let targets = Mutex::new(targets.into_iter());
        std::thread::scope(|s| {
            for _ in 0..self.cores {
                s.spawn(|| {
                    while let Some((layout, target)) = next(&targets) {
                        target[..layout.header().len()].copy_from_slice(layout.header());
                        for (slice, offset) in layout.slices() {
                            let from = offsets[&(&slice.kind, &slice.name)] + slice.begin as usize * 4;
                            let to = offset as usize;
                            let bytes = slice.bytes() as usize;
                            target[to..to + bytes].copy_from_slice(&self.state[from..from + bytes]);
                        }
                    }
                });
            }
        });
        let whole = Bytes::from_owner(PooledBuffer { memory, pool: self.pool.clone() });
        let mut first = 0;
        let object = |(i, layout): (usize, ObjectLayout)| {
            let bytes = whole.slice(first..first + layout.size() as usize);
            first += layout.size() as usize;
            Object { name: format!("shards/{i}.safetensors"), bytes, layout: Some(layout) }
        };
        layouts.into_iter().enumerate().map(object).collect()
    }

    fn save(&self, url: &str) -> Result<Value, BoxError> {
        let store = self.runtime.block_on(Store::open(url, std::env::vars(), Access::Write))?;
        let retention = Retention { keep: 1, keep_best: false, keep_every: 0 };
        let mut checkpoints = self.runtime.block_on(Checkpoints::claim(store.clone(), retention))?;
        let start = Instant::now();
        let objects = self.objects();
        let copy = start.elapsed().as_secs_f64();
        let bytes: usize = objects.iter().map(|o| o.bytes.len()).sum();
        self.runtime.block_on(async {
            checkpoints.begin_save(1).await?;
            let task = WriteTask { step: 1, term: checkpoints.term(), rank: 0, objects };
            let report = write(&store, task).await?;
            checkpoints.commit(CheckpointHeader { step: 1, meta: Value::Null, best: false }, vec![report]).await
        })?;
        Ok(json!({"seconds": start.elapsed().as_secs_f64(), "copy_s": copy, "bytes": bytes}))
    }

    fn load(&mut self, url: &str) -> Result<Value, BoxError> {
        let store = self.runtime.block_on(Store::open(url, std::env::vars(), Access::Read))?;
        let start = Instant::now();
        let mut candidates = self.runtime.block_on(resume_candidates(&store, Resume::Auto))?;
        let info = candidates.next_candidate()?.ok_or("there is no checkpoint")?;
        let reader = self.runtime.block_on(Reader::open(&store, &info))?;
        let requests: Vec<ReadRequest> = self
            .tensors
            .iter()
            .map(|(t, offset)| ReadRequest {
                kind: t.kind.clone(),
                name: t.name.clone(),
                begin: 0,
                count: t.count,
                destination: *offset,
            })
            .collect();
        let before = self.state[self.state.len() / 2];
        self.state.fill(0);
        self.runtime.block_on(reader.read(&requests, &mut self.state))?;
        let seconds = start.elapsed().as_secs_f64();
        if self.state[self.state.len() / 2] != before {
            return Err("the loaded state differs from the saved state".into());
        }
        Ok(json!({"seconds": seconds, "bytes": info.bytes}))
    }

    fn measure_raw(&self, op: &str, url: &str) -> Result<Value, BoxError> {
        let raw = RawStore::open(url)?;
        let objects: Vec<Bytes> = self.objects().into_iter().map(|o| o.bytes).collect();
        let sizes: Vec<usize> = objects.iter().map(Bytes::len).collect();
        let start = Instant::now();
        if op == "raw_save" {
            self.runtime.block_on(raw.save(&objects))?;
        } else {
            self.runtime.block_on(raw.load(&sizes))?;
        }
        Ok(json!({"seconds": start.elapsed().as_secs_f64(), "bytes": sizes.iter().sum::<usize>()}))
    }

    fn answer(&mut self, command: &Value) -> Result<Value, BoxError> {
        let url = command["url"].as_str().unwrap_or_default();
        match command["op"].as_str().unwrap_or_default() {
            "save" => self.save(url),
            "load" => self.load(url),
            op @ ("raw_save" | "raw_load") => self.measure_raw(op, url),
            "clear" => {
                self.runtime.block_on(RawStore::open(url)?.clear())?;
                Ok(json!({}))
            }
            other => Err(format!("no command `{other}`").into()),
        }
    }
}

fn next<T>(iterator: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    iterator.lock().unwrap_or_else(PoisonError::into_inner).next()
}

fn main() -> Result<(), BoxError> {
    let args: Vec<String> = std::env::args().collect();
    let [_, shapes] = &args[..] else { return Err("usage: checkpoint_bench SHAPES.json".into()) };
    let mut bench = Bench::new(shapes)?;
    let mut out = std::io::stdout();
    writeln!(out, "{}", json!({"bytes": bench.state.len()}))?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let reply = bench.answer(&serde_json::from_str(&line?)?);
        let reply = reply.unwrap_or_else(|e| json!({"error": e.to_string()}));
        writeln!(out, "{reply}")?;
        out.flush()?;
    }
    Ok(())
}
