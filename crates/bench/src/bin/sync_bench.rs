//! Our sides of the weight sync benchmark (tests/bench/sync.py), one JSON line per command.
//!
//! `sync_bench send SHAPES DTYPE` is an experience server with tensors of the shapes in a JSON file (name to shape);
//! `sync_bench receive SHAPES DTYPE ADDRESS RAW_ADDRESS` is a worker's receiver. Tensors are views of one block of
//! random numbers on both sides, so that a model of the published size fits into memory next to its copies.
//!
//! Commands on standard input: `{"op":"sync"}` publishes the next version on the sender; on the receiver it fetches,
//! verifies and copies the version into the tensors. `{"op":"raw"}` sends as many bytes over a plain TCP connection. On
//! the receiver, `{"op":"join"}` switches to broadcasts and `{"op":"leave"}` back to streams; on the sender,
//! `{"op":"sent"}` returns the number of broadcasts since the last call.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark may panic, and its results go to stdout")]

use std::collections::BTreeMap;
use std::io::{BufRead, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tokio::runtime::{Builder, Runtime};
use unveil_core::{GroupId, Sampling, TrainGroup};
use unveil_experience::{Experience, Settings};
use unveil_experience_rpc::{
    BroadcastMember, BroadcastOptions, ExperienceServer, ExperienceServerOptions, GroupSource, NewWeights,
    PreparedGroup, RecordFailure, WeightReceiver,
};
use unveil_model::parse_dtype;

type BoxError = Box<dyn std::error::Error>;

const BUFFER: usize = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(60);

/// A source without groups.
struct NoLeases;

impl GroupSource for NoLeases {
    fn prepare(&self, _: usize, group: &GroupId) -> Result<PreparedGroup, RecordFailure> {
        Err(format!("group {} is not leased here", group.record).into())
    }
}

/// Tensors to sync.
struct Model {
    named: Vec<(String, Tensor)>,
    kind: Kind,
    bytes: u64,
}

/// Creates tensors of the given shapes as views of one block.
fn tensors(path: &str, dtype: &str) -> Result<Model, BoxError> {
    let kind = parse_dtype(dtype)?;
    let shapes: BTreeMap<String, Vec<i64>> = serde_json::from_slice(&std::fs::read(path)?)?;
    let numel = |shape: &[i64]| shape.iter().product::<i64>();
    let largest = shapes.values().map(|s| numel(s)).max().ok_or("no shapes")?;
    let block = Tensor::f_rand([largest + (1 << 22)], (kind, Device::Cpu))?;
    let mut offset = 0;
    let mut bytes = 0;
    let mut named = Vec::with_capacity(shapes.len());
    for (name, shape) in shapes {
        let count = numel(&shape);
        if offset + count > block.size()[0] {
            offset = 0;
        }
        named.push((name, block.f_narrow(0, offset, count)?.f_view(shape.as_slice())?));
        (offset, bytes) = (offset + count, bytes + count as u64 * kind.elt_size_in_bytes() as u64);
    }
    Ok(Model { named, kind, bytes })
}

fn runtime(threads: usize) -> Result<Runtime, BoxError> {
    Ok(Builder::new_multi_thread().worker_threads(threads).enable_all().build()?)
}

/// Prints `ready`, then answers each command with one line.
fn serve(ready: Value, mut answer: impl FnMut(&str) -> Result<Value, BoxError>) -> Result<(), BoxError> {
    println!("{ready}");
    for line in std::io::stdin().lock().lines() {
        let command: Value = serde_json::from_str(&line?)?;
        println!("{}", answer(command["op"].as_str().unwrap_or_default())?);
    }
    Ok(())
}

fn send(shapes: &str, dtype: &str) -> Result<(), BoxError> {
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
    let options = ExperienceServerOptions {
        listen: "127.0.0.1:0".into(),
        sampling: Sampling::default(),
        stop: vec![],
        vocab: 1,
        fixed_lease_size: None,
        broadcast: Some(BroadcastOptions { device: Device::Cpu, timeout: TIMEOUT }),
    };
    let server = ExperienceServer::start(runtime.handle(), options, machine, Arc::new(NoLeases))?;
    let raw = TcpListener::bind("127.0.0.1:0")?;
    let ready = json!({"address": server.address().to_string(), "raw": raw.local_addr()?.to_string(), "bytes": bytes});
    let mut version = 0;
    let buffer = vec![7u8; BUFFER];
    serve(ready, |op| {
        let start = Instant::now();
        if op == "sent" {
            return Ok(json!({"broadcasts": server.drain_broadcasts().len()}));
        }
        if op == "raw" {
            // The receiver connects when it gets its own command.
            let (mut stream, _) = raw.accept()?;
            let mut left = bytes as usize;
            while left > 0 {
                let part = left.min(BUFFER);
                stream.write_all(&buffer[..part])?;
                left -= part;
            }
        } else {
            server.publish(&NewWeights { version, named: &named, kind, adapters: None, may_change: &|_| true })?;
            version += 1;
        }
        Ok(json!({"seconds": start.elapsed().as_secs_f64()}))
    })
}

fn receive(shapes: &str, dtype: &str, address: &str, raw: &str) -> Result<(), BoxError> {
    let Model { named, bytes, .. } = tensors(shapes, dtype)?;
    let mut targets: BTreeMap<String, Tensor> = named.into_iter().collect();
    let runtime = runtime(1)?;
    let mut receiver = Some(runtime.block_on(WeightReceiver::connect(address, "bench", TIMEOUT))?);
    let member = BroadcastMember::start(Device::Cpu, TIMEOUT, None)?;
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
            // A fetch without a result reports the weights that are held.
            let plain = receiver.take().ok_or("no receiver")?;
            let mut subscribed = plain.with_broadcast(Some(member.clone()));
            runtime.block_on(subscribed.fetch(Duration::from_millis(1)))?;
            receiver = Some(subscribed);
            return Ok(json!({}));
        }
        if op == "leave" {
            receiver = receiver.take().map(|r| r.with_broadcast(None));
            return Ok(json!({}));
        }
        let receiver = receiver.as_mut().ok_or("no receiver")?;
        let update = runtime.block_on(receiver.fetch(TIMEOUT))?.ok_or("no weights were published")?;
        let fetched = start.elapsed().as_secs_f64();
        for (name, tensor) in &update.tensors {
            targets.get_mut(name).ok_or("an unknown tensor arrived")?.f_copy_(tensor)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let version = update.version;
        receiver.adopt(update);
        Ok(json!({"seconds": seconds, "fetch_seconds": fetched, "version": version}))
    })
}

fn main() -> Result<(), BoxError> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["send", shapes, dtype] => send(shapes, dtype),
        ["receive", shapes, dtype, address, raw] => receive(shapes, dtype, address, raw),
        _ => Err("usage: sync_bench send SHAPES DTYPE | receive SHAPES DTYPE ADDRESS RAW_ADDRESS".into()),
    }
}
