//! Driver of the rollout benchmark (tests/bench/rollout.py): reads one JSON command per line and answers each with one JSON line.
//!
//! `rollout_bench MODEL_DIR PROMPTS DEVICE DTYPE THREADS`
//!
//! Commands: `greedy {groups, new}` returns tokens; `generate {groups, n, new, capture, calls}` returns the seconds of each call and the
//! number of encoded images per call. Attention is captured in the layer that rollout uses.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark may panic, and its results go to stdout")]

use std::io::{BufRead, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::{Value, json};
use tch::Tensor;
use unveil_core::{Finish, Prompt, Sampling};
use unveil_engine::{Engine, EngineOptions, GroupOutput, GroupRequest, PromptInput};
use unveil_model::{AttentionSet, Vlm, device, parse_dtype, read_safetensors};

type BoxError = Box<dyn std::error::Error>;

struct Bench<'a> {
    vlm: &'a Vlm,
    inputs: Vec<PromptInput>,
    with_capture: Option<Engine<&'a Vlm>>,
    without_capture: Option<Engine<&'a Vlm>>,
}

impl<'a> Bench<'a> {
    fn engine(&mut self, capture: bool) -> Result<&mut Engine<&'a Vlm>, BoxError> {
        let slot = if capture { &mut self.with_capture } else { &mut self.without_capture };
        if slot.is_none() {
            let config = self.vlm.config();
            let options = EngineOptions {
                capture: capture.then(|| AttentionSet::layer(config.default_capture_layer())),
                // Without end tokens all responses have the same length in both engines.
                banned: config.eos_token_ids(),
                ..EngineOptions::default()
            };
            *slot = Some(Engine::new(self.vlm, options)?);
        }
        slot.as_mut().ok_or_else(|| "no engine".into())
    }

    fn requests(&self, groups: usize, sampling: Sampling) -> Result<Vec<GroupRequest>, BoxError> {
        let inputs = self.inputs.get(..groups).ok_or("more groups requested than there are prompts")?;
        let request = |(key, input): (usize, &PromptInput)| GroupRequest {
            input: input.clone(),
            key: key as u64,
            sampling,
            stop: None,
        };
        Ok(inputs.iter().enumerate().map(request).collect())
    }

    fn greedy(&mut self, command: &Value) -> Result<Value, BoxError> {
        let sampling =
            Sampling { n: 1, temperature: 0.0, max_new_tokens: number(command, "new")?, ..Default::default() };
        let requests = self.requests(number(command, "groups")?, sampling)?;
        let outputs = self.engine(true)?.generate(&requests, None)?;
        let tokens: Vec<&[u32]> = outputs.iter().map(|g| g.responses[0].tokens.as_slice()).collect();
        Ok(json!({ "tokens": tokens }))
    }

    fn generate(&mut self, command: &Value) -> Result<Value, BoxError> {
        let n = number(command, "n")?;
        let new = number(command, "new")?;
        let calls = number(command, "calls")?;
        let capture = command["capture"].as_bool().ok_or("`capture` is missing")?;
        let groups = number(command, "groups")?;
        let seed = command["seed"].as_u64().unwrap_or(0);
        let mut seconds = Vec::with_capacity(calls);
        let mut images = 0;
        for call in 0..calls {
            let sampling =
                Sampling { n, temperature: 1.0, max_new_tokens: new, seed: seed + call as u64, ..Default::default() };
            let requests = self.requests(groups, sampling)?;
            let engine = self.engine(capture)?;
            let before = engine.stats().images_encoded;
            let start = Instant::now();
            let outputs = engine.generate(&requests, None)?;
            seconds.push(start.elapsed().as_secs_f64());
            images += engine.stats().images_encoded - before;
            check(&outputs, n, new, capture)?;
        }
        Ok(json!({ "seconds": seconds, "images": images as f64 / calls as f64 }))
    }
}

/// Checks that all responses are complete and have the requested attention rows.
fn check(outputs: &[GroupOutput], n: usize, new: usize, capture: bool) -> Result<(), BoxError> {
    for response in outputs.iter().flat_map(|g| &g.responses) {
        let rows = response.attention.as_ref().map_or(0, |a| a.len());
        let is_complete = response.tokens.len() == new && response.finish == Finish::Length;
        if !is_complete || rows != if capture { new } else { 0 } {
            return Err(format!("a response has {} tokens and {rows} attention rows", response.tokens.len()).into());
        }
    }
    if outputs.iter().any(|g| g.responses.len() != n) {
        return Err("a group has another number of responses than requested".into());
    }
    Ok(())
}

fn number(command: &Value, key: &str) -> Result<usize, BoxError> {
    command[key].as_u64().map(|n| n as usize).ok_or_else(|| format!("`{key}` is missing").into())
}

/// Reads the prompts of a file: `NNN.tokens`, `NNN.pixels`, and one `grid` for all.
fn prompts(path: &Path) -> Result<Vec<PromptInput>, BoxError> {
    let tensors = read_safetensors(path)?;
    let get = |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, t)| t);
    let grid = Vec::<i64>::try_from(get("grid").ok_or("no `grid`")?)?;
    let grid: [i64; 3] = grid.try_into().map_err(|_| "`grid` does not have three numbers")?;
    let mut inputs = Vec::new();
    while let Some(tokens) = get(&format!("{:03}.tokens", inputs.len())) {
        let id = format!("{:03}", inputs.len());
        let pixels = get(&format!("{id}.pixels")).ok_or("a prompt has no pixels")?;
        let tokens = Vec::<i64>::try_from(tokens)?.into_iter().map(|t| t as u32).collect();
        let patches = Vec::<f32>::try_from(Tensor::f_view(pixels, [-1])?)?;
        let prompt = Prompt { tokens, grids: vec![grid] };
        inputs.push(PromptInput { id, prompt, patches: patches.into(), hashes: Vec::new() });
    }
    Ok(inputs)
}

fn serve(args: &[String], reply: &mut dyn FnMut(Value) -> Result<(), BoxError>) -> Result<(), BoxError> {
    let [_, dir, file, device_name, kind, threads] = args else {
        return Err("usage: rollout_bench MODEL_DIR PROMPTS DEVICE DTYPE THREADS".into());
    };
    tch::set_num_threads(threads.parse()?);
    let kind = parse_dtype(kind)?;
    let vlm = Vlm::load(Path::new(dir), device(device_name)?, kind)?;
    let mut bench = Bench { vlm: &vlm, inputs: prompts(Path::new(file))?, with_capture: None, without_capture: None };
    reply(json!({ "ready": true }))?;
    for line in std::io::stdin().lock().lines() {
        let command: Value = serde_json::from_str(&line?)?;
        let result = match command["op"].as_str() {
            Some("greedy") => bench.greedy(&command)?,
            Some("generate") => bench.generate(&command)?,
            other => return Err(format!("unknown command {other:?}").into()),
        };
        reply(result)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let mut reply = |value: Value| -> Result<(), BoxError> {
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{value}")?;
        Ok(stdout.flush()?)
    };
    let args: Vec<String> = std::env::args().collect();
    let Err(error) = serve(&args, &mut reply) else { return ExitCode::SUCCESS };
    eprintln!("rollout_bench: {error}");
    let _ = reply(json!({ "error": error.to_string() }));
    ExitCode::FAILURE
}
