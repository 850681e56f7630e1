//! Our side of the checkpoint benchmark (tests/bench/checkpoint.py), and the raw rate of the same store by the same client: reads one
//! JSON command per line, answers with one JSON line.
//!
//! `checkpoint_bench SHAPES.json`: parameters in fp32 with two moments each, in host memory. Commands `save`, `load`, `raw_save`,
//! `raw_load` and `clear` take `url`. A save copies the state as a learner does, then writes objects, manifest and log; a load reads,
//! checks, and puts everything in its place.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::multipart::MultipartStore;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use unveil_checkpoint::{
    Access, Checkpoints, Dtype, Layout, OBJECT, Object, Piece, Reader, Resume, Retention, Snapshot, Store, Task, Want,
    choice, write,
};

type Fault = Box<dyn std::error::Error + Send + Sync>;

/// Bytes of a part, and parts in flight, as ours.
const PART: usize = 16 << 20;
const PARALLEL: usize = 8;

/// The store of a URL, as the raw rate is measured on it.
#[derive(Clone)]
enum Raw {
    Local(Arc<LocalFileSystem>),
    S3(Arc<object_store::aws::AmazonS3>, Key),
}

impl Raw {
    fn open(url: &str) -> Result<Self, Fault> {
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
        Ok(Self::S3(Arc::new(builder.build()?), Key::from(path)))
    }

    fn key(&self, name: &str) -> Key {
        match self {
            Self::Local(_) => Key::from(name),
            Self::S3(_, prefix) => prefix.clone().join(name),
        }
    }

    fn any(&self) -> Arc<dyn ObjectStore> {
        match self {
            Self::Local(s) => s.clone(),
            Self::S3(s, _) => s.clone(),
        }
    }

    /// Writes objects side by side: in parts where the store has them.
    async fn save(&self, objects: &[Bytes]) -> Result<(), Fault> {
        let mut uploads = Vec::new();
        let mut jobs = Vec::new();
        for (at, bytes) in objects.iter().enumerate() {
            let key = self.key(&format!("raw-{at}"));
            match self {
                Self::Local(_) => jobs.push((at, 0, None, key, bytes.clone())),
                Self::S3(s, _) => {
                    let id = s.create_multipart(&key).await?;
                    for (i, first) in (0..bytes.len()).step_by(PART).enumerate() {
                        let part = bytes.slice(first..bytes.len().min(first + PART));
                        jobs.push((at, i, Some(id.clone()), key.clone(), part));
                    }
                    uploads.push((key, id));
                }
            }
        }
        let (mut running, mut parts) = (JoinSet::new(), vec![Vec::new(); objects.len()]);
        let mut jobs = jobs.into_iter();
        loop {
            while running.len() < PARALLEL {
                let Some((at, i, id, key, bytes)) = jobs.next() else { break };
                let own = self.clone();
                running.spawn(async move {
                    let payload = PutPayload::from_bytes(bytes);
                    let part = match (&own, &id) {
                        (Self::S3(s, _), Some(id)) => Some(s.put_part(&key, id, i, payload).await?),
                        _ => own.any().put(&key, payload).await.map(|_| None)?,
                    };
                    Ok::<_, object_store::Error>((at, i, part))
                });
            }
            let Some(done) = running.join_next().await else { break };
            let (at, i, part) = done??;
            parts[at].extend(part.map(|p| (i, p)));
        }
        if let Self::S3(s, _) = self {
            for ((key, id), mut parts) in uploads.into_iter().zip(parts) {
                parts.sort_by_key(|(i, _)| *i);
                s.complete_multipart(&key, &id, parts.into_iter().map(|(_, p)| p).collect()).await?;
            }
        }
        Ok(())
    }

    /// Reads objects of these sizes in ranges side by side.
    async fn load(&self, sizes: &[usize]) -> Result<u64, Fault> {
        let ranges = sizes.iter().enumerate().flat_map(|(at, size)| {
            (0..*size).step_by(PART).map(move |first| (at, first as u64..(*size).min(first + PART) as u64))
        });
        let mut ranges: Vec<_> = ranges.collect();
        let (mut running, mut bytes) = (JoinSet::new(), 0);
        loop {
            while running.len() < PARALLEL {
                let Some((at, range)) = ranges.pop() else { break };
                let (store, key) = (self.any(), self.key(&format!("raw-{at}")));
                running.spawn(async move { store.get_range(&key, range).await.map(|b| b.len() as u64) });
            }
            let Some(done) = running.join_next().await else { return Ok(bytes) };
            bytes += done??;
        }
    }

    async fn clear(&self) -> Result<(), Fault> {
        let store = self.any();
        let prefix = match self {
            Self::Local(_) => None,
            Self::S3(_, prefix) => Some(prefix),
        };
        let mut found = store.list(prefix);
        while let Some(meta) = found.next().await {
            store.delete(&meta?.location).await?;
        }
        Ok(())
    }
}

/// Memory that goes back when all that was lent of it is gone.
type Pool = Arc<Mutex<Vec<u8>>>;

struct Lent {
    memory: Vec<u8>,
    home: Pool,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.memory
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        *self.home.lock().unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut self.memory);
    }
}

struct Bench {
    runtime: Runtime,
    /// Whole tensors, and where each lies in `live`.
    pieces: Vec<(Piece, usize)>,
    live: Vec<u8>,
    pool: Pool,
    cores: usize,
}

impl Bench {
    fn new(shapes: &str) -> Result<Self, Fault> {
        let shapes: BTreeMap<String, Vec<u64>> = serde_json::from_str(&std::fs::read_to_string(shapes)?)?;
        let (mut pieces, mut size) = (Vec::new(), 0);
        for kind in ["weight", "exp_avg", "exp_avg_sq"] {
            for (name, shape) in &shapes {
                let (kind, name, part) = (kind.to_owned(), name.clone(), String::new());
                let (shape, count) = (shape.clone(), shape.iter().product());
                let p = Piece { kind, name, part, dtype: Dtype::F32, shape, begin: 0, count };
                pieces.push((p.clone(), size));
                size += p.bytes() as usize;
            }
        }
        let live = (0..size).map(|i| (i ^ (i >> 11)) as u8).collect();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { runtime, pieces, live, pool: Pool::default(), cores })
    }

    /// The state as objects: copied by as many threads as there are cores, to memory that is used again.
    fn objects(&self) -> Vec<Object> {
        let layouts = Layout::divide(self.pieces.iter().map(|(p, _)| p.clone()).collect(), OBJECT);
        let place: BTreeMap<_, _> = self.pieces.iter().map(|(p, at)| ((&p.kind, &p.name), *at)).collect();
        let size: usize = layouts.iter().map(|l| l.size() as usize).sum();
        let mut memory = std::mem::take(&mut *self.pool.lock().unwrap_or_else(PoisonError::into_inner));
        memory.resize(size, 0);
        let mut jobs = Vec::new();
        let mut rest = memory.as_mut_slice();
        for layout in &layouts {
            let (own, more) = rest.split_at_mut(layout.size() as usize);
            jobs.push((layout, own));
            rest = more;
        }
        let jobs = Mutex::new(jobs.into_iter());
        std::thread::scope(|s| {
            for _ in 0..self.cores {
                s.spawn(|| {
                    while let Some((layout, own)) = next(&jobs) {
                        own[..layout.header().len()].copy_from_slice(layout.header());
                        for (p, at) in layout.pieces() {
                            let (from, to) = (place[&(&p.kind, &p.name)] + p.begin as usize * 4, at as usize);
                            let bytes = p.bytes() as usize;
                            own[to..to + bytes].copy_from_slice(&self.live[from..from + bytes]);
                        }
                    }
                });
            }
        });
        let whole = Bytes::from_owner(Lent { memory, home: self.pool.clone() });
        let mut first = 0;
        let object = |(i, layout): (usize, Layout)| {
            let bytes = whole.slice(first..first + layout.size() as usize);
            first += layout.size() as usize;
            Object { name: format!("shards/{i}.safetensors"), bytes, layout: Some(layout) }
        };
        layouts.into_iter().enumerate().map(object).collect()
    }

    fn save(&self, url: &str) -> Result<Value, Fault> {
        let store = self.runtime.block_on(Store::open(url, std::env::vars(), Access::Write))?;
        let retention = Retention { keep: 1, keep_best: false, keep_every: 0 };
        let mut held = self.runtime.block_on(Checkpoints::claim(store.clone(), retention))?;
        let start = Instant::now();
        let objects = self.objects();
        let copy = start.elapsed().as_secs_f64();
        let bytes: usize = objects.iter().map(|o| o.bytes.len()).sum();
        self.runtime.block_on(async {
            held.begin(1).await?;
            let report = write(&store, Task { step: 1, term: held.term(), rank: 0, objects }).await?;
            held.commit(Snapshot { step: 1, meta: Value::Null, best: false }, vec![report]).await
        })?;
        Ok(json!({"seconds": start.elapsed().as_secs_f64(), "copy_s": copy, "bytes": bytes}))
    }

    fn load(&mut self, url: &str) -> Result<Value, Fault> {
        let store = self.runtime.block_on(Store::open(url, std::env::vars(), Access::Read))?;
        let start = Instant::now();
        let info = self.runtime.block_on(choice(&store, Resume::Auto))?.take()?.ok_or("there is no checkpoint")?;
        let reader = self.runtime.block_on(Reader::open(&store, &info))?;
        let wants: Vec<Want> = self
            .pieces
            .iter()
            .map(|(p, to)| Want { kind: p.kind.clone(), name: p.name.clone(), begin: 0, count: p.count, to: *to })
            .collect();
        let before = self.live[self.live.len() / 2];
        self.live.fill(0);
        self.runtime.block_on(reader.read(&wants, &mut self.live))?;
        let seconds = start.elapsed().as_secs_f64();
        if self.live[self.live.len() / 2] != before {
            return Err("what was loaded is not what was saved".into());
        }
        Ok(json!({"seconds": seconds, "bytes": info.bytes}))
    }

    fn raw(&self, op: &str, url: &str) -> Result<Value, Fault> {
        let raw = Raw::open(url)?;
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

    fn answer(&mut self, command: &Value) -> Result<Value, Fault> {
        let url = command["url"].as_str().unwrap_or_default();
        match command["op"].as_str().unwrap_or_default() {
            "save" => self.save(url),
            "load" => self.load(url),
            op @ ("raw_save" | "raw_load") => self.raw(op, url),
            "clear" => {
                self.runtime.block_on(Raw::open(url)?.clear())?;
                Ok(json!({}))
            }
            other => Err(format!("no command `{other}`").into()),
        }
    }
}

fn next<T>(jobs: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    jobs.lock().unwrap_or_else(PoisonError::into_inner).next()
}

fn main() -> Result<(), Fault> {
    let args: Vec<String> = std::env::args().collect();
    let [_, shapes] = &args[..] else { return Err("usage: checkpoint_bench SHAPES.json".into()) };
    let mut bench = Bench::new(shapes)?;
    let mut out = std::io::stdout();
    writeln!(out, "{}", json!({"bytes": bench.live.len()}))?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let reply = bench.answer(&serde_json::from_str(&line?)?);
        let reply = reply.unwrap_or_else(|e| json!({"error": e.to_string()}));
        writeln!(out, "{reply}")?;
        out.flush()?;
    }
    Ok(())
}
