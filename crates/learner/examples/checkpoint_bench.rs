//! Our side of the checkpoint benchmark (tests/bench/checkpoint.py), and the raw rate of the same store by the same client: reads one
//! JSON command per line, answers with one JSON line.
//!
//! `checkpoint_bench MODEL_DIR THREADS`; `save`, `load`, `raw_save`, `raw_load` and `clear` take `url`, `memcpy` nothing. A save is what
//! a learner of one rank does: the copy, then objects, manifest and log; a load reads, checks, and puts everything in its place.

use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::multipart::MultipartStore;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use serde_json::{Value, json};
use tch::{Device, Kind};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use unveil_checkpoint::{Access, Checkpoints, Object, Reader, Resume, Retention, Snapshot, Store, Task, choice, write};
use unveil_config::Config;
use unveil_learner::{Buffers, Learner, Stand, StepSettings};
use unveil_model::Vlm;

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
        for (key, value) in unveil_config::environment() {
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
        use tokio_stream::StreamExt;
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

struct Bench {
    runtime: Runtime,
    learner: Learner,
    buffers: Buffers,
}

impl Bench {
    fn objects(&self) -> Result<(Vec<Object>, f64), Fault> {
        let copied = self.learner.snapshot(&self.buffers)?;
        Ok((copied.objects, copied.took.as_secs_f64()))
    }

    fn save(&self, url: &str) -> Result<Value, Fault> {
        let environment = unveil_config::environment();
        let store = self.runtime.block_on(Store::open(url, environment, Access::Write))?;
        let retention = Retention { keep: 1, keep_best: false, keep_every: 0 };
        let mut held = self.runtime.block_on(Checkpoints::claim(store.clone(), retention))?;
        let start = Instant::now();
        let (objects, copy) = self.objects()?;
        let bytes: usize = objects.iter().map(|o| o.bytes.len()).sum();
        let meta = serde_json::to_value(self.learner.stand())?;
        self.runtime.block_on(async {
            held.begin(1).await?;
            let report = write(&store, Task { step: 1, term: held.term(), rank: 0, objects }).await?;
            held.commit(Snapshot { step: 1, meta, best: false }, vec![report]).await
        })?;
        Ok(json!({"seconds": start.elapsed().as_secs_f64(), "copy_s": copy, "bytes": bytes}))
    }

    fn load(&mut self, url: &str) -> Result<Value, Fault> {
        let environment = unveil_config::environment();
        let store = self.runtime.block_on(Store::open(url, environment, Access::Read))?;
        let start = Instant::now();
        let info = self.runtime.block_on(choice(&store, Resume::Auto))?.take()?.ok_or("there is no checkpoint")?;
        let reader = self.runtime.block_on(Reader::open(&store, &info))?;
        self.learner.read(self.runtime.handle(), &reader)?;
        let stand: Stand = serde_json::from_value(reader.manifest().meta.clone())?;
        self.learner.go_on(&stand)?;
        Ok(json!({"seconds": start.elapsed().as_secs_f64(), "bytes": info.bytes}))
    }

    fn raw(&self, op: &str, url: &str) -> Result<Value, Fault> {
        let raw = Raw::open(url)?;
        let objects: Vec<Bytes> = self.objects()?.0.into_iter().map(|o| o.bytes).collect();
        let sizes: Vec<usize> = objects.iter().map(Bytes::len).collect();
        let start = Instant::now();
        if op == "raw_save" {
            self.runtime.block_on(raw.save(&objects))?;
        } else {
            self.runtime.block_on(raw.load(&sizes))?;
        }
        Ok(json!({"seconds": start.elapsed().as_secs_f64(), "bytes": sizes.iter().sum::<usize>()}))
    }

    /// As many bytes from one place in memory to another, by as many threads as there are cores; the best of three.
    fn memcpy(&self) -> Result<Value, Fault> {
        let bytes: usize = self.objects()?.0.iter().map(|o| o.bytes.len()).sum();
        let (from, mut to) = (vec![1u8; bytes], vec![2u8; bytes]);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let piece = bytes.div_ceil(cores);
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            std::thread::scope(|s| {
                for (from, to) in from.chunks(piece).zip(to.chunks_mut(piece)) {
                    s.spawn(|| to.copy_from_slice(from));
                }
            });
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(json!({"seconds": best, "bytes": bytes, "check": to[bytes / 2]}))
    }

    fn answer(&mut self, command: &Value) -> Result<Value, Fault> {
        let url = command["url"].as_str().unwrap_or_default();
        match command["op"].as_str().unwrap_or_default() {
            "save" => self.save(url),
            "load" => self.load(url),
            op @ ("raw_save" | "raw_load") => self.raw(op, url),
            "memcpy" => self.memcpy(),
            "clear" => {
                self.runtime.block_on(Raw::open(url)?.clear())?;
                Ok(json!({}))
            }
            other => Err(format!("no command `{other}`").into()),
        }
    }
}

fn main() -> Result<(), Fault> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, threads] = &args[..] else { return Err("usage: checkpoint_bench MODEL_DIR THREADS".into()) };
    tch::set_num_threads(threads.parse()?);
    let vlm = Vlm::load(Path::new(model), Device::Cpu, Kind::Float)?;
    let settings = StepSettings::new(&Config::default(), &vlm, &[]);
    let learner = Learner::new(vlm, None, settings)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut bench = Bench { runtime, learner, buffers: Buffers::default() };
    let mut out = std::io::stdout();
    writeln!(out, "{}", json!({"ready": true}))?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let reply = bench.answer(&serde_json::from_str(&line?)?);
        let reply = reply.unwrap_or_else(|e| json!({"error": e.to_string()}));
        writeln!(out, "{reply}")?;
        out.flush()?;
    }
    Ok(())
}
