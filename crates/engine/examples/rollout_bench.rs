//! Our side of the rollout benchmark (tests/bench/rollout.py): reads one JSON command per line, answers with one JSON line.
//!
//! `rollout_bench MODEL_DIR PROMPTS DEVICE DTYPE THREADS`
//!
//! Commands: `greedy {groups, new}` gives tokens; `generate {groups, n, new, capture, calls}` gives the seconds of each call
//! and how many images went through the vision tower per call. Capture is on in the layer that rollout uses.

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};
use tch::{Kind, Tensor};
use unveil_core::{Finish, Sampling};
use unveil_engine::{Engine, EngineOptions, GroupInput, GroupOutput, GroupRequest};
use unveil_model::{Prompt, Vlm, device, read_safetensors};

type Fault = Box<dyn std::error::Error>;

struct Bench<'a> {
    vlm: &'a Vlm,
    inputs: Vec<GroupInput>,
    with_capture: Option<Engine<&'a Vlm>>,
    without_capture: Option<Engine<&'a Vlm>>,
}

impl<'a> Bench<'a> {
    fn engine(&mut self, capture: bool) -> Result<&mut Engine<&'a Vlm>, Fault> {
        let slot = if capture { &mut self.with_capture } else { &mut self.without_capture };
        if slot.is_none() {
            let config = self.vlm.config();
            let options = EngineOptions {
                capture_layer: capture.then(|| config.default_capture_layer()),
                // Every response has the same length on both sides.
                banned: config.eos_token_ids(),
                ..EngineOptions::default()
            };
            *slot = Some(Engine::new(self.vlm, options)?);
        }
        slot.as_mut().ok_or_else(|| "no engine".into())
    }

    fn requests(&self, groups: usize, sampling: Sampling) -> Result<Vec<GroupRequest>, Fault> {
        let inputs = self.inputs.get(..groups).ok_or("more groups are asked for than there are prompts")?;
        let request =
            |(key, input): (usize, &GroupInput)| GroupRequest { input: input.clone(), key: key as u64, sampling };
        Ok(inputs.iter().enumerate().map(request).collect())
    }

    fn greedy(&mut self, command: &Value) -> Result<Value, Fault> {
        let sampling = Sampling { n: 1, temperature: 0.0, max_new_tokens: number(command, "new")?, seed: 0 };
        let requests = self.requests(number(command, "groups")?, sampling)?;
        let out = self.engine(true)?.generate(&requests, None)?;
        let tokens: Vec<&[u32]> = out.iter().map(|g| g.responses[0].tokens.as_slice()).collect();
        Ok(json!({ "tokens": tokens }))
    }

    fn generate(&mut self, command: &Value) -> Result<Value, Fault> {
        let (n, new, calls) = (number(command, "n")?, number(command, "new")?, number(command, "calls")?);
        let capture = command["capture"].as_bool().ok_or("`capture` is missing")?;
        let groups = number(command, "groups")?;
        let seed = command["seed"].as_u64().unwrap_or(0);
        let mut seconds = Vec::with_capacity(calls);
        let mut images = 0;
        for call in 0..calls {
            let sampling = Sampling { n, temperature: 1.0, max_new_tokens: new, seed: seed + call as u64 };
            let requests = self.requests(groups, sampling)?;
            let engine = self.engine(capture)?;
            let before = engine.stats().images_encoded;
            let start = Instant::now();
            let out = engine.generate(&requests, None)?;
            seconds.push(start.elapsed().as_secs_f64());
            images += engine.stats().images_encoded - before;
            check(&out, n, new, capture)?;
        }
        Ok(json!({ "seconds": seconds, "images": images as f64 / calls as f64 }))
    }
}

/// Whole responses, each with the rows that were asked for.
fn check(out: &[GroupOutput], n: usize, new: usize, capture: bool) -> Result<(), Fault> {
    for response in out.iter().flat_map(|g| &g.responses) {
        let rows = response.attention.as_ref().map_or(0, |a| a.len());
        let whole = response.tokens.len() == new && response.finish == Finish::Length;
        if !whole || rows != if capture { new } else { 0 } {
            return Err(format!("a response has {} tokens and {rows} attention rows", response.tokens.len()).into());
        }
    }
    if out.iter().any(|g| g.responses.len() != n) {
        return Err("a group has another number of responses than asked for".into());
    }
    Ok(())
}

fn number(command: &Value, key: &str) -> Result<usize, Fault> {
    command[key].as_u64().map(|n| n as usize).ok_or_else(|| format!("`{key}` is missing").into())
}

/// The prompts of the file: `NNN.tokens`, `NNN.pixels`, and one `grid` for all.
fn prompts(path: &Path) -> Result<Vec<GroupInput>, Fault> {
    let tensors = read_safetensors(path)?;
    let get = |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, t)| t);
    let grid = Vec::<i64>::try_from(get("grid").ok_or("no `grid`")?)?;
    let grid: [i64; 3] = grid.try_into().map_err(|_| "`grid` is not three numbers")?;
    let mut out = Vec::new();
    while let Some(tokens) = get(&format!("{:03}.tokens", out.len())) {
        let id = format!("{:03}", out.len());
        let pixels = get(&format!("{id}.pixels")).ok_or("a prompt without pixels")?;
        let tokens = Vec::<i64>::try_from(tokens)?.into_iter().map(|t| t as u32).collect();
        let patches = Vec::<f32>::try_from(Tensor::f_view(pixels, [-1])?)?;
        out.push(GroupInput { id, prompt: Prompt { tokens, grids: vec![grid] }, patches });
    }
    Ok(out)
}

fn serve(args: &[String], say: &mut dyn FnMut(Value) -> Result<(), Fault>) -> Result<(), Fault> {
    let [_, dir, file, device_name, kind, threads] = args else {
        return Err("usage: rollout_bench MODEL_DIR PROMPTS DEVICE DTYPE THREADS".into());
    };
    tch::set_num_threads(threads.parse()?);
    let kind = match kind.as_str() {
        "float32" => Kind::Float,
        "bfloat16" => Kind::BFloat16,
        other => return Err(format!("dtype `{other}`: use float32 or bfloat16").into()),
    };
    let vlm = Vlm::load(Path::new(dir), device(device_name)?, kind)?;
    let mut bench = Bench { vlm: &vlm, inputs: prompts(Path::new(file))?, with_capture: None, without_capture: None };
    say(json!({ "ready": true }))?;
    for line in std::io::stdin().lock().lines() {
        let command: Value = serde_json::from_str(&line?)?;
        let reply = match command["op"].as_str() {
            Some("greedy") => bench.greedy(&command)?,
            Some("generate") => bench.generate(&command)?,
            other => return Err(format!("unknown command {other:?}").into()),
        };
        say(reply)?;
    }
    Ok(())
}

fn main() {
    let mut say = |reply: Value| -> Result<(), Fault> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{reply}")?;
        Ok(out.flush()?)
    };
    let args: Vec<String> = std::env::args().collect();
    if let Err(error) = serve(&args, &mut say) {
        eprintln!("rollout_bench: {error}");
        let _ = say(json!({ "error": error.to_string() }));
        std::process::exit(1);
    }
}
