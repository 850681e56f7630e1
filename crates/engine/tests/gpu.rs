//! Tests of the engine on a GPU: equality with the CPU, agreement with teacher forcing in both dtypes, CUDA graphs, weight swaps. Run by
//! `make test-gpu`; every test fails without a GPU.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]

use std::path::Path;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use unveil_core::{Family, Sampling};
use unveil_engine::{Engine, EngineOptions, GroupOutput, GroupRequest, PromptInput, ScoreRequest};
use unveil_model::{AttentionSet, Vlm, device};
use unveil_testkit_model::{EOS, image_prompt, write_model_of};
use unveil_torch_ext::free_memory;

fn gpu() -> Device {
    device("cuda").unwrap_or_else(|e| panic!("these tests need a GPU: {e}"))
}

fn model_dir(family: Family, seed: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_model_of(family, dir.path(), seed);
    dir
}

fn load(dir: &Path, device: Device, kind: Kind) -> Vlm {
    Vlm::load(dir, device, kind).unwrap()
}

fn requests(vlm: &Vlm, temperature: f64) -> Vec<GroupRequest> {
    (0..5usize)
        .map(|k| {
            let (prompt, patches) = image_prompt(vlm, k);
            let input = PromptInput { id: format!("g{k}"), prompt, patches: Arc::new(patches), hashes: vec![] };
            let sampling = Sampling { n: 4, temperature, max_new_tokens: 90, seed: 5, ..Default::default() };
            GroupRequest { input, key: k as u64, sampling, stop: None }
        })
        .collect()
}

fn options() -> EngineOptions {
    // Few rows, so that groups are admitted while others run; no end token, so that steps repeat.
    let capture = Some(AttentionSet::new(&[2], &[[0, 1], [3, 5]]));
    EngineOptions { max_rows: 12, capture, banned: vec![EOS], ..Default::default() }
}

fn score_requests(requests: &[GroupRequest], outputs: &[GroupOutput]) -> Vec<ScoreRequest> {
    let score_request = |(r, o): (&GroupRequest, &GroupOutput)| ScoreRequest {
        input: r.input.clone(),
        responses: o.responses.iter().map(|x| x.tokens.clone()).collect(),
    };
    requests.iter().zip(outputs).map(score_request).collect()
}

/// Returns the maximum and mean difference of log-probabilities, and the maximum difference of attention rows, between generation and
/// teacher forcing.
fn agreement(engine: &mut Engine<&Vlm>, requests: &[GroupRequest], temperature: f64) -> (f32, f32, f32) {
    let outputs = engine.generate(requests, None).unwrap();
    let scored = engine.score(&score_requests(requests, &outputs), temperature).unwrap();
    let mut max = 0f32;
    let mut sum = 0f32;
    let mut count = 0;
    let mut rows = 0f32;
    for (r, s) in outputs.iter().flat_map(|o| &o.responses).zip(scored.iter().flatten()) {
        for (a, b) in r.logprobs.iter().zip(&s.logprobs) {
            max = max.max((a - b).abs());
            sum += (a - b).abs();
            count += 1;
        }
        let generated = r.attention.as_ref().unwrap();
        let teacher_forced = s.attention.as_ref().unwrap();
        assert_eq!(generated.len(), r.tokens.len());
        rows = generated.values.iter().zip(&teacher_forced.values).map(|(a, b)| (a - b).abs()).fold(rows, f32::max);
    }
    (max, sum / count as f32, rows)
}

#[test]
fn generation_agrees_with_teacher_forcing() {
    let gpu = gpu();
    for family in Family::ALL {
        let dir = model_dir(family, 3);
        for (kind, max_limit, mean_limit) in [(Kind::Float, 1e-5, 1e-5), (Kind::BFloat16, 1e-2, 1e-3)] {
            let vlm = load(dir.path(), gpu, kind);
            let mut engine = Engine::new(&vlm, options()).unwrap();
            let (max, mean, rows) = agreement(&mut engine, &requests(&vlm, 0.9), 0.9);
            println!(
                "{} {kind:?}: log p differs by at most {max}, by {mean} on average; rows by at most {rows}",
                family.name()
            );
            assert!(max <= max_limit && mean <= mean_limit && rows <= 1e-3);
            let stats = engine.stats();
            assert_eq!(engine.graph_error(), None);
            assert!(stats.graph_steps * 10 > stats.decode_steps * 9, "{stats:?}");
        }
    }
}

#[test]
fn gpu_equals_cpu() {
    let gpu = gpu();
    for family in Family::ALL {
        let dir = model_dir(family, 4);
        let cpu_model = load(dir.path(), Device::Cpu, Kind::Float);
        let gpu_model = load(dir.path(), gpu, Kind::Float);
        let requests = requests(&cpu_model, 0.0);
        let on_cpu = Engine::new(&cpu_model, options()).unwrap().generate(&requests, None).unwrap();
        let on_gpu = Engine::new(&gpu_model, options()).unwrap().generate(&requests, None).unwrap();
        let pairs = on_cpu.iter().flat_map(|g| &g.responses).zip(on_gpu.iter().flat_map(|g| &g.responses));
        for (a, b) in pairs {
            assert_eq!(a.tokens, b.tokens);
            let max_difference =
                |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(max_difference(&a.logprobs, &b.logprobs) < 1e-3);
            assert!(
                max_difference(&a.attention.as_ref().unwrap().values, &b.attention.as_ref().unwrap().values) < 1e-3
            );
        }
    }
}

#[test]
fn weights_change_under_cuda_graphs() {
    let gpu = gpu();
    let old = model_dir(Family::Qwen2_5Vl, 5);
    let new = model_dir(Family::Qwen2_5Vl, 6);
    let mut engine = Engine::new(load(old.path(), gpu, Kind::Float), options()).unwrap();
    let requests = requests(engine.vlm(), 1.0);
    let tickets: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    for _ in 0..20 {
        engine.step().unwrap();
    }
    let new_model = load(new.path(), gpu, Kind::Float);
    let named: Vec<(String, Tensor)> =
        new_model.named_parameters().iter().map(|(n, t)| (n.clone(), t.to_device(Device::Cpu))).collect();
    engine.load_weights(1, &named).unwrap();
    let mut outputs = std::collections::HashMap::new();
    while !engine.is_idle() {
        outputs.extend(engine.step().unwrap());
    }
    for (k, ticket) in tickets.iter().enumerate() {
        let output = &outputs[ticket];
        let requests = score_requests(&requests[k..=k], std::slice::from_ref(output));
        let scored = Engine::new(&new_model, options()).unwrap().score(&requests, 1.0).unwrap();
        for (r, s) in output.responses.iter().zip(&scored[0]) {
            for (i, version) in r.versions.iter().enumerate() {
                assert!(*version == 0 || (r.logprobs[i] - s.logprobs[i]).abs() < 1e-5, "group {k}, token {i}");
            }
        }
    }
}

#[test]
fn weights_are_loaded_to_the_gpu_in_the_requested_dtype() {
    let gpu = gpu();
    let dir = model_dir(Family::Qwen3Vl, 7);
    let vlm = load(dir.path(), gpu, Kind::BFloat16);
    assert!(vlm.named_parameters().iter().all(|(_, t)| t.device() == gpu && t.kind() == Kind::BFloat16));
    assert!(free_memory(gpu).unwrap() > 1 << 30);
    vlm.save(&dir.path().join("saved")).unwrap();
    let saved = load(&dir.path().join("saved"), Device::Cpu, Kind::BFloat16);
    for ((name, a), (_, b)) in vlm.named_parameters().iter().zip(saved.named_parameters()) {
        assert_eq!((a.to_device(Device::Cpu) - b).abs().max().double_value(&[]), 0.0, "{name}");
    }
}
