//! Benchmark of the copy of a learner's state to host memory, which blocks training, against memcpy: part of the
//! checkpoint benchmark (tests/bench/checkpoint.py). Prints one JSON line.
//!
//! `copy_bench MODEL_DIR THREADS ROUNDS` measures alternately the seconds of each copy (the first one allocates its
//! memory) and the seconds of a memcpy of as many bytes by as many threads.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark may panic, and its results go to stdout")]

use std::path::Path;
use std::time::Instant;

use serde_json::json;
use tch::{Device, Kind};
use unveil_config::Config;
use unveil_learner::{HostBufferPool, copy_to_host};
use unveil_model::Vlm;
use unveil_trainer::{PolicyTrainer, StepSettings};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), BoxError> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, threads, rounds] = &args[..] else {
        return Err("usage: copy_bench MODEL_DIR THREADS ROUNDS".into());
    };
    let (threads, rounds): (usize, usize) = (threads.parse()?, rounds.parse()?);
    tch::set_num_threads(threads as i32);
    let vlm = Vlm::load(Path::new(model), Device::Cpu, Kind::Float)?;
    let settings = StepSettings::new(&Config::default(), &vlm, &[]);
    let learner = PolicyTrainer::new(vlm, None, settings)?;
    let buffers = HostBufferPool::default();
    let mut copies = Vec::new();
    let mut plain = Vec::new();
    let mut bytes = 0;
    let mut from = Vec::new();
    let mut to = Vec::new();
    for _ in 0..=rounds {
        let copy = copy_to_host(&learner.state_to_save()?, &buffers)?;
        copies.push(copy.took.as_secs_f64());
        bytes = copy.objects.iter().map(|o| o.bytes.len()).sum();
        drop(copy);
        from.resize(bytes, 1u8);
        to.resize(bytes, 2u8);
        let piece = bytes.div_ceil(threads.max(1));
        let start = Instant::now();
        std::thread::scope(|s| {
            for (from, to) in from.chunks(piece).zip(to.chunks_mut(piece)) {
                s.spawn(|| to.copy_from_slice(from));
            }
        });
        plain.push(start.elapsed().as_secs_f64());
    }
    println!("{}", json!({"bytes": bytes, "copy_s": copies, "memcpy_s": plain, "check": to.last()}));
    Ok(())
}
