//! Our side of the learner benchmark (tests/bench/learner.py): reads one JSON command per line and answers each with
//! one JSON line.
//!
//! `learner_bench MODEL_DIR PROMPTS BATCH THREADS [RANK RANKS HOST:PORT]`; the command `update {calls}` returns the
//! seconds of each update, the seconds of these spent waiting for other ranks, and the loss and gradient norm of the
//! first update. With `overlap = false`, the all-reduce over ranks starts after the backward pass.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark may panic, and its results go to stdout")]

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use unveil_collective::{Backend, Setup, Timeouts, open};
use unveil_config::Config;
use unveil_core::{Breakdown, Finish, Grid, GroupId, GroupInput, Prompt, Record, Response, TrainGroup};
use unveil_model::{Vlm, read_safetensors};
use unveil_trainer::{Models, PolicyTrainer, Ranks, StepSettings, ZeroStage};

type BoxError = Box<dyn std::error::Error>;

/// Reads the batch from two files: prompts `NNN.tokens`, `NNN.pixels` and `grid`; responses `tokens`, `logprobs` and
/// `rewards`.
fn batch(vlm: &Vlm, prompts: &Path, responses: &Path) -> Result<Vec<TrainGroup>, BoxError> {
    let files = [read_safetensors(prompts)?, read_safetensors(responses)?];
    let all: HashMap<String, Tensor> = files.into_iter().flatten().collect();
    let get = |name: &str| all.get(name).ok_or_else(|| format!("`{name}` is missing"));
    let grid: [i64; 3] = Vec::<i64>::try_from(get("grid")?)?.try_into().map_err(|_| "`grid` is not three numbers")?;
    let m = vlm.config().vision.spatial_merge_size;
    let size = get("tokens")?.size();
    let &[groups, n, new] = &size[..] else { return Err("`tokens` has not three dimensions".into()) };
    let ids = |t: &Tensor| -> Result<Vec<u32>, BoxError> {
        Ok(Vec::<i64>::try_from(t.reshape([-1]))?.into_iter().map(|t| t as u32).collect())
    };
    let mut out = Vec::new();
    for g in 0..groups {
        let id = format!("{g:03}");
        let record: Record = serde_json::from_value(json!({"id": id, "image_size": [448, 448]}))?;
        let input = GroupInput {
            record,
            image_size: (448, 448),
            prompt: Prompt { tokens: ids(get(&format!("{id}.tokens"))?)?, grids: vec![grid] },
            patches: Vec::<f32>::try_from(get(&format!("{id}.pixels"))?.reshape([-1]))?,
            merged: Grid { rows: (grid[1] / m) as usize, cols: (grid[2] / m) as usize },
            encoded: Default::default(),
        };
        let mut answers = Vec::new();
        let mut breakdowns = Vec::new();
        for r in 0..n {
            let index = r as usize;
            answers.push(Response {
                index,
                tokens: ids(&get("tokens")?.get(g).get(r))?,
                text: String::new(),
                logprobs: Vec::<f32>::try_from(get("logprobs")?.get(g).get(r))?,
                versions: vec![0; new as usize],
                finish: Finish::Length,
            });
            let total = Some(get("rewards")?.double_value(&[g, r]));
            breakdowns.push(Breakdown { id: id.clone(), index, total, components: Default::default() });
        }
        out.push(TrainGroup {
            id: GroupId { pass: 0, position: g as u64, record: id },
            worker: "bench".into(),
            input: Arc::new(input),
            spans: vec![vec![(0, 0); new as usize]; n as usize],
            responses: answers,
            breakdowns,
            attention: Vec::new(),
            generate_ms: 0.0,
            reward_ms: 0.0,
        });
    }
    Ok(out)
}

/// Connects the ranks of a data-parallel learner.
fn ranks(args: &[String]) -> Result<Rc<Ranks>, BoxError> {
    let [rank, world, address] = args else { return Ok(Ranks::solo()) };
    let rank = rank.parse()?;
    let world = world.parse()?;
    let address = address.clone();
    let backend = Backend::Gloo;
    let fingerprint = "bench".into();
    let timeouts = Timeouts::default();
    let world =
        open(&Setup { rank, world, address, local_address: None, backend, fingerprint, token: None, timeouts })?;
    Ok(Ranks::new(world, ZeroStage::None, 0)?)
}

fn serve(args: &[String], say: &mut dyn FnMut(Value) -> Result<(), BoxError>) -> Result<(), BoxError> {
    let [_, dir, prompts, responses, threads, rest @ ..] = args else {
        return Err("usage: learner_bench MODEL_DIR PROMPTS BATCH THREADS [RANK RANKS HOST:PORT]".into());
    };
    tch::set_num_threads(threads.parse()?);
    let vlm = Vlm::load(Path::new(dir), Device::Cpu, Kind::Float)?;
    let groups = batch(&vlm, Path::new(prompts), Path::new(responses))?;
    let mut config = Config::default();
    config.learner.steps = 1_000_000;
    config.learner.optimizer.lr = 1e-5;
    config.learner.optimizer.warmup = 0;
    config.learner.optimizer.clip_norm = 1.0;
    // The peer does not exclude vision tokens from its softmax.
    let settings =
        StepSettings { agreement_limit: f64::INFINITY, banned: Vec::new(), ..StepSettings::new(&config, &vlm, &[]) };
    let models = Models { vlm, reference: None, critic: None };
    let mut learner = PolicyTrainer::distributed(ranks(rest)?, models, settings)?;
    say(json!({ "ready": true }))?;
    for line in std::io::stdin().lock().lines() {
        let command: Value = serde_json::from_str(&line?)?;
        let calls = command["calls"].as_u64().ok_or("`calls` is missing")?;
        let mut seconds = Vec::new();
        let mut waits = Vec::new();
        let mut first = None;
        learner.set_overlap(command["overlap"] != false);
        for _ in 0..calls {
            let start = Instant::now();
            let report = learner.update(&groups)?;
            seconds.push(start.elapsed().as_secs_f64());
            waits.push(report.reduce_wait_ms / 1e3);
            if let Some(why) = report.skipped {
                return Err(why.into());
            }
            first.get_or_insert((report.loss["loss"], report.grad_norm));
        }
        let (loss, norm) = first.ok_or("`calls` is 0")?;
        say(json!({ "seconds": seconds, "waits": waits, "loss": loss, "grad_norm": norm }))?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let mut say = |reply: Value| -> Result<(), BoxError> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{reply}")?;
        Ok(out.flush()?)
    };
    let args: Vec<String> = std::env::args().collect();
    let Err(error) = serve(&args, &mut say) else { return ExitCode::SUCCESS };
    eprintln!("learner_bench: {error}");
    let _ = say(json!({ "error": error.to_string() }));
    ExitCode::FAILURE
}
