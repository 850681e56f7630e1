//! Errors of the precision modes (tests/bench/precision.py): how far generation and training differ on tokens of the same weights, and how
//! far both are from fp32.
//!
//! `precision_bench MODEL_DIR THREADS STEPS` prints one JSON line for each dtype of the weights and mode of computation. `decode` compares
//! step-by-step decoding of sampled tokens with one teacher-forced pass: mean and largest |delta log p|, and the mean distance of the pass
//! from that of `exact` with fp32 weights on the same tokens. `sft` has the losses of STEPS updates of stage 1 on sequences that a fixed
//! table generates. The weights of MODEL_DIR should be bf16 numbers, so that nothing but the computation differs.

#![allow(clippy::print_stdout, reason = "results go to stdout")]

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use unveil_config::schema::Optimizer;
use unveil_core::{Compute, Grid, GroupInput, Prompt, Record};
use unveil_model::{CacheShape, PackedBatch, PackedGroup, Vlm, agreement_limit, dtype_name, logprobs};
use unveil_trainer::{SftBatch, SftTrainer};

type BoxError = Box<dyn std::error::Error>;

/// Weights and computation, the reference first.
const MODES: [(Kind, Compute); 4] = [
    (Kind::Float, Compute::Exact),
    (Kind::BFloat16, Compute::Exact),
    (Kind::Float, Compute::Fast),
    (Kind::BFloat16, Compute::Fast),
];
/// Responses and tokens of each generation. Single responses are computed by other products than several.
const GENERATIONS: [(usize, usize); 2] = [(8, 64), (1, 192)];
const PROMPT_TOKENS: usize = 286;
/// Patches of an image in stage 1: 64 image tokens.
const GRID: [i64; 3] = [1, 16, 16];
const SFT_BATCH: usize = 8;
const SFT_TOKENS: usize = 64;

fn load(dir: &Path, (kind, compute): (Kind, Compute)) -> Result<Vlm, BoxError> {
    let mut vlm = Vlm::load(dir, Device::Cpu, kind)?;
    vlm.set_compute(compute)?;
    Ok(vlm)
}

/// Returns `count` random tokens that are not special: those are the last ones of the vocabulary.
fn random_tokens(rng: &mut ChaCha8Rng, vlm: &Vlm, count: usize) -> Vec<u32> {
    let top = vlm.config().vision_end_token_id;
    (0..count).map(|_| rng.random_range(0..top)).collect()
}

/// Samples `n` responses of `count` tokens step by step. Returns them, and the log-probabilities of their tokens, response by response.
fn generate(vlm: &Vlm, prompt: &[u32], (n, count): (usize, usize)) -> Result<(Vec<Vec<u32>>, Tensor), BoxError> {
    let prefill = vlm.prefill(&[Prompt { tokens: prompt.to_vec(), grids: Vec::new() }], None)?;
    let shape = CacheShape { slots: 1, n, prompt: prompt.len(), response: count, images: 0 };
    let mut cache = vlm.cache(shape, None, false)?;
    cache.admit(&prefill, &[0])?;
    let rows: Vec<usize> = (0..n).collect();
    let mut hidden = prefill.last_hidden.expand([n as i64, -1], false);
    let mut responses = vec![Vec::with_capacity(count); n];
    let mut columns = Vec::with_capacity(count);
    tch::manual_seed(17);
    for step in 0..count {
        let logits = vlm.step_logits(&hidden);
        let tokens = logits.softmax(-1, Kind::Float).multinomial(1, true).squeeze_dim(1);
        columns.push(logprobs(&logits, &tokens, 1.0, &[]));
        for (response, token) in responses.iter_mut().zip(Vec::<i64>::try_from(&tokens)?) {
            response.push(u32::try_from(token)?);
        }
        if step + 1 < count {
            hidden = vlm.decode_step(&mut cache, &tokens, &rows)?.hidden;
        }
    }
    Ok((responses, Tensor::stack(&columns, 1).reshape([-1])))
}

/// Returns the log-probabilities of the tokens in one teacher-forced pass.
fn teacher_force(vlm: &Vlm, prompt: &[u32], responses: &[Vec<u32>]) -> Result<Tensor, BoxError> {
    let prompt = Prompt { tokens: prompt.to_vec(), grids: Vec::new() };
    let batch =
        PackedBatch::build(&[PackedGroup { prompt, responses: responses.to_vec() }], vlm.config(), Device::Cpu)?;
    let out = vlm.forward_packed(&batch, None, None)?;
    Ok(logprobs(&vlm.lm_head(&out.hidden), &batch.targets, 1.0, &[]))
}

fn decode(vlm: &Vlm, reference: &Vlm) -> Result<Vec<Value>, BoxError> {
    let _guard = tch::no_grad_guard();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let prompt = random_tokens(&mut rng, vlm, PROMPT_TOKENS);
    let mut rows = Vec::new();
    for (n, count) in GENERATIONS {
        let (responses, generated) = generate(vlm, &prompt, (n, count))?;
        let forced = teacher_force(vlm, &prompt, &responses)?;
        let exact = teacher_force(reference, &prompt, &responses)?;
        let gap = (generated - &forced).abs();
        rows.push(json!({
            "n": n,
            "tokens": count,
            "mean": gap.mean(Kind::Double).double_value(&[]),
            "max": gap.max().double_value(&[]),
            "from_fp32": (forced - exact).abs().mean(Kind::Double).double_value(&[]),
        }));
    }
    Ok(rows)
}

/// Returns a batch of stage 1 whose answers follow a fixed table of successors, so that they can be learned.
fn sft_batch(vlm: &Vlm, rng: &mut ChaCha8Rng) -> Result<SftBatch, BoxError> {
    let c = vlm.config();
    let top = u64::from(c.vision_end_token_id);
    let mut inputs = Vec::with_capacity(SFT_BATCH);
    let mut targets = Vec::with_capacity(SFT_BATCH);
    for index in 0..SFT_BATCH {
        let mut tokens = random_tokens(rng, vlm, 16);
        tokens.push(c.vision_start_token_id);
        tokens.extend(vec![c.image_token_id; c.merged_tokens(GRID)?]);
        tokens.push(c.vision_end_token_id);
        let record: Record = serde_json::from_value(json!({"id": format!("{index:03}"), "image_size": [224, 224]}))?;
        let values = GRID.iter().product::<i64>() * c.vision.patch_len();
        inputs.push(Arc::new(GroupInput {
            record,
            image_size: (224, 224),
            prompt: Prompt { tokens, grids: vec![GRID] },
            patches: (0..values).map(|_| rng.random_range(-1.0..1.0)).collect(),
            merged: Grid { rows: 8, cols: 8 },
            encoded: Default::default(),
        }));
        let first = rng.random_range(0..50u64);
        let answer = std::iter::successors(Some(first), |token| Some((token * 31 + 7) % 50));
        targets.push(answer.take(SFT_TOKENS).map(|token| (token % top) as u32).collect());
    }
    Ok(SftBatch { inputs, targets, pass: 0 })
}

fn sft(vlm: Vlm, steps: u64) -> Result<Vec<f64>, BoxError> {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let optimizer = Optimizer { lr: 1e-4, warmup: 0, ..Optimizer::default() };
    let mut trainer = SftTrainer::new(vlm, &optimizer, steps)?;
    let mut losses = Vec::new();
    for _ in 0..steps {
        let batch = sft_batch(trainer.vlm(), &mut rng)?;
        losses.push(trainer.update(&batch)?.loss);
    }
    Ok(losses)
}

fn run(args: &[String]) -> Result<(), BoxError> {
    let [_, dir, threads, steps] = args else {
        return Err("usage: precision_bench MODEL_DIR THREADS STEPS".into());
    };
    let dir = Path::new(dir);
    let steps = steps.parse()?;
    tch::set_num_threads(threads.parse()?);
    let reference = load(dir, MODES[0])?;
    for mode in MODES {
        let (kind, compute) = mode;
        let decoded = decode(&load(dir, mode)?, &reference)?;
        let losses = sft(load(dir, mode)?, steps)?;
        println!(
            "{}",
            json!({
                "dtype": dtype_name(kind),
                "compute": compute,
                "limit": agreement_limit(compute, kind),
                "decode": decoded,
                "sft": losses,
            })
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("{}", json!({ "error": e.to_string() }));
            ExitCode::FAILURE
        }
    }
}
