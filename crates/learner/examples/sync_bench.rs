//! Our sides of the weight sync benchmark (tests/bench/sync.py), one JSON line per command.
//!
//! `sync_bench send SHAPES DTYPE` is a learner's host with tensors of the shapes in a JSON file (name to shape);
//! `sync_bench receive SHAPES DTYPE ADDRESS RAW_ADDRESS` is a worker's receiver. Tensors are cut from one block of random numbers
//! on both sides, so that a model of the published size fits beside its copies.
//!
//! Commands on standard input: `{"op":"sync"}` publishes the next version on the sender, and on the receiver fetches it, checks it
//! and copies it into the tensors; `{"op":"raw"}` sends as many bytes over a plain TCP connection. On the receiver, `{"op":"join"}` has
//! the next versions come by broadcast, and `{"op":"leave"}` by stream again; on the sender, `{"op":"sent"}` counts the broadcasts
//! since the last time.

use std::collections::BTreeMap;
use std::io::{BufRead, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tokio::runtime::{Builder, Runtime};
use unveil_core::{GroupId, Sampling};
use unveil_experience::{Experience, Settings};
use unveil_learner::{Broadcasting, Host, HostOptions, LearnerError, LeaseSource, Leased, NewWeights, TrainGroup};
use unveil_rollout::sync::{Member, WeightReceiver};

type Fault = Box<dyn std::error::Error>;

const BUFFER: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

struct Nothing;

impl LeaseSource for Nothing {
    fn lease(&self, _: usize, group: &GroupId) -> Result<Leased, LearnerError> {
        Err(LearnerError::Setting(format!("group {} is not leased here", group.record)))
    }
}

/// What is synced.
struct Model {
    named: Vec<(String, Tensor)>,
    kind: Kind,
    bytes: u64,
}

/// Tensors of the given shapes over one block.
fn tensors(path: &str, dtype: &str) -> Result<Model, Fault> {
    let kind = match dtype {
        "float32" => Kind::Float,
        "bfloat16" => Kind::BFloat16,
        other => return Err(format!("dtype `{other}`: use float32 or bfloat16").into()),
    };
    let shapes: BTreeMap<String, Vec<i64>> = serde_json::from_slice(&std::fs::read(path)?)?;
    let numel = |shape: &[i64]| shape.iter().product::<i64>();
    let largest = shapes.values().map(|s| numel(s)).max().ok_or("no shapes")?;
    let block = Tensor::f_rand([largest + (1 << 22)], (kind, Device::Cpu))?;
    let (mut at, mut bytes, mut named) = (0, 0, Vec::with_capacity(shapes.len()));
    for (name, shape) in shapes {
        let count = numel(&shape);
        if at + count > block.size()[0] {
            at = 0;
        }
        named.push((name, block.f_narrow(0, at, count)?.f_view(shape.as_slice())?));
        (at, bytes) = (at + count, bytes + count as u64 * kind.elt_size_in_bytes() as u64);
    }
    Ok(Model { named, kind, bytes })
}

fn runtime(threads: usize) -> Result<Runtime, Fault> {
    Ok(Builder::new_multi_thread().worker_threads(threads).enable_all().build()?)
}

/// Answers each command with one line; the first line says what is there.
fn serve(ready: Value, mut answer: impl FnMut(&str) -> Result<Value, Fault>) -> Result<(), Fault> {
    println!("{ready}");
    for line in std::io::stdin().lock().lines() {
        let command: Value = serde_json::from_str(&line?)?;
        println!("{}", answer(command["op"].as_str().unwrap_or_default())?);
    }
    Ok(())
}

fn send(shapes: &str, dtype: &str) -> Result<(), Fault> {
    let Model { named, kind, bytes } = tensors(shapes, dtype)?;
    let runtime = runtime(2)?;
    let settings = Settings {
        groups_per_step: 1,
        max_staleness: 0,
        lease_s: 60.0,
        stall_s: 300.0,
        silence_s: 60.0,
        seed: 0,
        term: 1,
        total_groups: None,
    };
    let machine: Experience<TrainGroup> = Experience::new(settings, vec!["none".into()])?;
    let options = HostOptions {
        listen: "127.0.0.1:0".into(),
        sampling: Sampling::default(),
        stop: vec![],
        vocab: 1,
        fixed: None,
        broadcast: Some(Broadcasting { device: Device::Cpu, limit: PATIENCE }),
    };
    let host = Host::start(runtime.handle(), options, machine, Arc::new(Nothing))?;
    let raw = TcpListener::bind("127.0.0.1:0")?;
    let ready = json!({"address": host.address().to_string(), "raw": raw.local_addr()?.to_string(), "bytes": bytes});
    let (mut version, buffer) = (0, vec![7u8; BUFFER]);
    serve(ready, |op| {
        let start = Instant::now();
        if op == "sent" {
            return Ok(json!({"broadcasts": host.drain_broadcasts().len()}));
        }
        if op == "raw" {
            // The receiver connects when it is asked; this one sends and is done when all is read.
            let (mut stream, _) = raw.accept()?;
            let mut left = bytes as usize;
            while left > 0 {
                let part = left.min(BUFFER);
                stream.write_all(&buffer[..part])?;
                left -= part;
            }
        } else {
            host.publish(&NewWeights { version, named: &named, kind, adapters: None, changes: &|_| true })?;
            version += 1;
        }
        Ok(json!({"seconds": start.elapsed().as_secs_f64()}))
    })
}

fn receive(shapes: &str, dtype: &str, address: &str, raw: &str) -> Result<(), Fault> {
    let Model { named, bytes, .. } = tensors(shapes, dtype)?;
    let mut targets: BTreeMap<String, Tensor> = named.into_iter().collect();
    let runtime = runtime(1)?;
    let mut receiver = Some(runtime.block_on(WeightReceiver::connect(address, "bench", PATIENCE))?);
    let member = Member::start(Device::Cpu, PATIENCE, None)?;
    let mut buffer = vec![0u8; BUFFER];
    serve(json!({"bytes": bytes}), |op| {
        let start = Instant::now();
        if op == "raw" {
            let mut stream = TcpStream::connect(raw)?;
            let mut left = bytes as usize;
            while left > 0 {
                let part = left.min(BUFFER);
                let count = stream.read(&mut buffer[..part])?;
                if count == 0 {
                    return Err("the plain stream ended early".into());
                }
                left -= count;
            }
            return Ok(json!({"seconds": start.elapsed().as_secs_f64()}));
        }
        if op == "join" {
            // A fetch that brings nothing tells what is held.
            let own = receiver.take().ok_or("no receiver")?;
            let mut own = own.with_broadcast(Some(member.clone()));
            runtime.block_on(own.fetch(Duration::from_millis(1)))?;
            receiver = Some(own);
            return Ok(json!({}));
        }
        if op == "leave" {
            receiver = receiver.take().map(|own| own.with_broadcast(None));
            return Ok(json!({}));
        }
        let receiver = receiver.as_mut().ok_or("no receiver")?;
        let update = runtime.block_on(receiver.fetch(PATIENCE))?.ok_or("no weights were published")?;
        let fetched = start.elapsed().as_secs_f64();
        for (name, tensor) in &update.tensors {
            targets.get_mut(name).ok_or("an unknown tensor arrived")?.f_copy_(tensor)?;
        }
        let (seconds, version) = (start.elapsed().as_secs_f64(), update.version);
        receiver.taken(update);
        Ok(json!({"seconds": seconds, "fetch_seconds": fetched, "version": version}))
    })
}

fn main() -> Result<(), Fault> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["send", shapes, dtype] => send(shapes, dtype),
        ["receive", shapes, dtype, address, raw] => receive(shapes, dtype, address, raw),
        _ => Err("usage: sync_bench send SHAPES DTYPE | receive SHAPES DTYPE ADDRESS RAW_ADDRESS".into()),
    }
}
