//! Peak memory of updates beside what `unveil plan` predicts for them (tests/bench/memory.py).
//!
//! `memory_bench MODEL_DIR CASE`, where CASE is a JSON object: `stage` (`sft` or `learner`), `lora` (rank, 0 for full training), `recompute`,
//! `groups`, `n` (responses per group), `new` (tokens per response) and `threads`. Runs two updates on random data and prints one JSON line:
//! the plan of the role, and the peak of the resident memory in GiB above that of a process with libtorch but without a model.

#![allow(clippy::print_stdout, reason = "results go to stdout")]

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use procfs::process::Process;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use unveil_config::Config;
use unveil_config::schema::DataKind;
use unveil_core::{Breakdown, Finish, Grid, GroupId, GroupInput, Prompt, Record, Response, TrainGroup};
use unveil_model::Vlm;
use unveil_plan::{GIB, PlanInput, plan};
use unveil_trainer::lora::{attach_adapters, attach_sft_adapters};
use unveil_trainer::{PolicyTrainer, Ranks, SftBatch, SftSettings, SftTrainer, StepSettings};

type BoxError = Box<dyn std::error::Error>;

/// Patches of an image: 256 image tokens.
const GRID: [i64; 3] = [1, 32, 32];
const IMAGE_TOKENS: usize = 256;
/// Text tokens of a prompt, as many as a plan assumes for a short question.
const TEXT_TOKENS: usize = 64;

/// The case that a process measures.
struct Case {
    stage: String,
    groups: usize,
    n: usize,
    new: usize,
    threads: i32,
}

impl Case {
    fn parse(case: &Value) -> Result<Self, BoxError> {
        let number = |key: &str| case[key].as_u64().ok_or_else(|| format!("`{key}` is missing"));
        Ok(Self {
            stage: case["stage"].as_str().ok_or("`stage` is missing")?.to_owned(),
            groups: number("groups")? as usize,
            n: number("n")? as usize,
            new: number("new")? as usize,
            threads: number("threads")? as i32,
        })
    }
}

/// Returns the configuration of a case.
fn configure(raw: &Value, case: &Case) -> Result<Config, BoxError> {
    let mut config = Config::default();
    let recompute = raw["recompute"].as_bool().ok_or("`recompute` is missing")?;
    config.run.device = "cpu".into();
    config.data.kind = DataKind::Jsonl;
    config.model.max_pixels = 256 * 28 * 28;
    config.sft.batch = case.groups;
    config.rollout.n = case.n;
    config.rollout.max_new_tokens = case.new;
    config.learner.groups = case.groups;
    config.sft.recompute = recompute;
    config.learner.recompute = recompute;
    config.sft.lora.rank = raw["lora"].as_u64().ok_or("`lora` is missing")? as usize;
    config.learner.lora.rank = config.sft.lora.rank;
    if case.stage == "sft" {
        config.learner.steps = 0;
    } else {
        config.sft.steps = 0;
    }
    Ok(config)
}

/// Returns `count` random tokens that are not special: those are the last ones of the vocabulary.
fn random_tokens(rng: &mut ChaCha8Rng, vlm: &Vlm, count: usize) -> Vec<u32> {
    let top = vlm.config().vision_end_token_id;
    (0..count).map(|_| rng.random_range(0..top)).collect()
}

fn input(rng: &mut ChaCha8Rng, vlm: &Vlm, id: &str) -> Result<GroupInput, BoxError> {
    let c = vlm.config();
    let mut tokens = random_tokens(rng, vlm, TEXT_TOKENS - 2);
    tokens.push(c.vision_start_token_id);
    tokens.extend([c.image_token_id; IMAGE_TOKENS]);
    tokens.push(c.vision_end_token_id);
    let values = GRID.iter().product::<i64>() * c.vision.patch_len();
    let record: Record = serde_json::from_value(json!({"id": id, "image_size": [448, 448]}))?;
    Ok(GroupInput {
        record,
        image_size: (448, 448),
        prompt: Prompt { tokens, grids: vec![GRID] },
        patches: (0..values).map(|_| rng.random_range(-1.0..1.0)).collect(),
        merged: Grid { rows: 16, cols: 16 },
        encoded: Default::default(),
    })
}

fn group(rng: &mut ChaCha8Rng, vlm: &Vlm, index: usize, case: &Case) -> Result<TrainGroup, BoxError> {
    let id = format!("{index:03}");
    let input = Arc::new(input(rng, vlm, &id)?);
    let response = |index: usize, rng: &mut ChaCha8Rng| Response {
        index,
        tokens: random_tokens(rng, vlm, case.new),
        text: String::new(),
        logprobs: vec![-3.0; case.new],
        versions: vec![0; case.new],
        finish: Finish::Length,
    };
    let responses: Vec<Response> = (0..case.n).map(|r| response(r, rng)).collect();
    let breakdown = |index: usize| Breakdown {
        id: id.clone(),
        index,
        total: Some((index % 2) as f64),
        components: Default::default(),
    };
    Ok(TrainGroup {
        id: GroupId { pass: 0, position: index as u64, record: id.clone() },
        worker: "bench".into(),
        input,
        spans: vec![vec![(0, 0); case.new]; case.n],
        breakdowns: (0..case.n).map(breakdown).collect(),
        responses,
        attention: Vec::new(),
        generate_ms: 0.0,
        reward_ms: 0.0,
    })
}

/// Returns the current and the highest resident memory of this process in GiB.
fn resident_gib() -> Result<(f64, f64), BoxError> {
    let status = Process::myself()?.status()?;
    let gib = |kib: Option<u64>| kib.map(|k| k as f64 * 1024.0 / GIB).ok_or("the kernel reports no memory");
    Ok((gib(status.vmrss)?, gib(status.vmhwm)?))
}

/// Runs two updates; the second finds the optimiser's state in memory.
fn update(vlm: Vlm, config: &Config, case: &Case) -> Result<(), BoxError> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    if case.stage == "sft" {
        let inputs = (0..case.groups)
            .map(|i| input(&mut rng, &vlm, &format!("{i:03}")).map(Arc::new))
            .collect::<Result<_, _>>()?;
        let targets = (0..case.groups).map(|_| random_tokens(&mut rng, &vlm, case.new)).collect();
        let batch = SftBatch { inputs, targets, pass: 0 };
        let settings =
            SftSettings { recompute: config.sft.recompute, ..SftSettings::new(config.sft.optimizer.clone(), 100) };
        let mut trainer = SftTrainer::distributed(Ranks::solo(), vlm, settings)?;
        for _ in 0..2 {
            if let Some(why) = trainer.update(&batch)?.skipped {
                return Err(why.into());
            }
        }
        return Ok(());
    }
    let groups = (0..case.groups).map(|i| group(&mut rng, &vlm, i, case)).collect::<Result<Vec<_>, _>>()?;
    let settings = StepSettings { agreement_limit: f64::INFINITY, ..StepSettings::new(config, &vlm, &[]) };
    let mut trainer = PolicyTrainer::new(vlm, None, settings)?;
    for _ in 0..2 {
        if let Some(why) = trainer.update(&groups)?.skipped {
            return Err(why.into());
        }
    }
    Ok(())
}

fn run(dir: &Path, raw: &Value) -> Result<Value, BoxError> {
    let case = Case::parse(raw)?;
    tch::set_num_threads(case.threads);
    let warm = Tensor::ones([256, 256], (Kind::Float, Device::Cpu));
    let _ = warm.matmul(&warm).double_value(&[0, 0]);
    let (baseline, _) = resident_gib()?;
    let config = configure(raw, &case)?;
    let mut vlm = Vlm::load(dir, Device::Cpu, Kind::Float)?;
    let device = unveil_plan::Device::cpu(1 << 44, 1);
    let shape = vlm.config().shape();
    let planned = plan(&PlanInput { config: &config, shape: &shape, device, gpus: None, nodes: 1, max_pixels: None })?;
    let role = planned.roles.iter().find(|r| r.role == case.stage).ok_or("the plan lacks the stage")?;
    if case.stage == "sft" {
        attach_sft_adapters(&mut vlm, &config)?;
    } else {
        attach_adapters(&mut vlm, &config)?;
    }
    update(vlm, &config, &case)?;
    let (_, peak) = resident_gib()?;
    Ok(json!({ "plan": role, "measured_gib": peak - baseline, "baseline_gib": baseline }))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let [_, dir, case] = args.as_slice() else {
        println!("{}", json!({ "error": "usage: memory_bench MODEL_DIR CASE" }));
        return ExitCode::FAILURE;
    };
    let result = serde_json::from_str(case).map_err(BoxError::from).and_then(|case| run(Path::new(dir), &case));
    match result {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            println!("{}", json!({ "error": e.to_string() }));
            ExitCode::FAILURE
        }
    }
}
