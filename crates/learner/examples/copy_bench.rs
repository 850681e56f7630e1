//! The copy of a learner's state to host memory, which training stands still for, against memcpy: part of the checkpoint benchmark
//! (tests/bench/checkpoint.py). Prints one JSON line.
//!
//! `copy_bench MODEL_DIR THREADS ROUNDS`: bytes, seconds of each copy (the first one takes its memory from the system), and seconds of
//! as many bytes from one place in memory to another by as many threads, in turns.

use std::path::Path;
use std::time::Instant;

use serde_json::json;
use tch::{Device, Kind};
use unveil_config::Config;
use unveil_learner::{Buffers, Learner, StepSettings};
use unveil_model::Vlm;

type Fault = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Fault> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, threads, rounds] = &args[..] else {
        return Err("usage: copy_bench MODEL_DIR THREADS ROUNDS".into());
    };
    let (threads, rounds): (usize, usize) = (threads.parse()?, rounds.parse()?);
    tch::set_num_threads(threads as i32);
    let vlm = Vlm::load(Path::new(model), Device::Cpu, Kind::Float)?;
    let settings = StepSettings::new(&Config::default(), &vlm, &[]);
    let learner = Learner::new(vlm, None, settings)?;
    let buffers = Buffers::default();
    let (mut copies, mut plain, mut bytes) = (Vec::new(), Vec::new(), 0);
    let (mut from, mut to) = (Vec::new(), Vec::new());
    for _ in 0..=rounds {
        let copied = learner.snapshot(&buffers)?;
        copies.push(copied.took.as_secs_f64());
        bytes = copied.objects.iter().map(|o| o.bytes.len()).sum();
        drop(copied);
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
