//! Tests of the engine on a GPU: equality with the CPU, agreement with teacher forcing in both dtypes, CUDA graphs, weight swaps. Run by
//! `make test-gpu`; every test fails without a GPU.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]

use std::path::Path;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use unveil_core::{Family, Sampling};
use unveil_engine::{
    AttentionRows, Engine, EngineOptions, GroupOutput, GroupRequest, PromptInput, ScoreRequest, ScoredResponse,
};
use unveil_model::{AttentionSet, Vlm, device};
use unveil_testkit_model::{EOS, image_prompt, write_model_of};
use unveil_torch_ext::{free_memory, set_deterministic};

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

/// Differences between two computations of the same responses.
#[derive(Debug, Default)]
struct Difference {
    /// Largest difference of log-probabilities.
    max: f32,
    /// Mean difference of log-probabilities. Kernels round differently, but a wrong result is not rare.
    mean: f32,
    /// Largest difference of attention rows.
    rows: f32,
}

/// Log-probabilities and attention rows of a response.
type Computed<'a> = (&'a [f32], &'a AttentionRows);

fn difference<'a>(pairs: impl Iterator<Item = (Computed<'a>, Computed<'a>)>) -> Difference {
    let mut out = Difference::default();
    let mut sum = 0f32;
    let mut count = 0;
    for ((logprobs, rows), (other_logprobs, other_rows)) in pairs {
        assert_eq!((logprobs.len(), rows.len()), (other_logprobs.len(), other_rows.len()));
        for delta in logprobs.iter().zip(other_logprobs).map(|(a, b)| (a - b).abs()) {
            out.max = out.max.max(delta);
            sum += delta;
            count += 1;
        }
        let deltas = rows.values.iter().zip(&other_rows.values).map(|(a, b)| (a - b).abs());
        out.rows = deltas.fold(out.rows, f32::max);
    }
    assert!(count > 0);
    out.mean = sum / count as f32;
    out
}

fn generated(outputs: &[GroupOutput]) -> impl Iterator<Item = Computed<'_>> {
    outputs.iter().flat_map(|o| &o.responses).map(|r| (r.logprobs.as_slice(), r.attention.as_ref().unwrap()))
}

fn scored(outputs: &[Vec<ScoredResponse>]) -> impl Iterator<Item = Computed<'_>> {
    outputs.iter().flatten().map(|s| (s.logprobs.as_slice(), s.attention.as_ref().unwrap()))
}

/// Compares generation with teacher forcing.
fn agreement(engine: &mut Engine<&Vlm>, requests: &[GroupRequest], temperature: f64) -> Difference {
    let outputs = engine.generate(requests, None).unwrap();
    let forced = engine.score(&score_requests(requests, &outputs), temperature).unwrap();
    difference(generated(&outputs).zip(scored(&forced)))
}

#[test]
fn generation_agrees_with_teacher_forcing() {
    let gpu = gpu();
    for family in Family::ALL {
        let dir = model_dir(family, 3);
        for (kind, max_limit, mean_limit) in [(Kind::Float, 1e-3, 1e-5), (Kind::BFloat16, 1e-2, 1e-3)] {
            let vlm = load(dir.path(), gpu, kind);
            let mut engine = Engine::new(&vlm, options()).unwrap();
            let Difference { max, mean, rows } = agreement(&mut engine, &requests(&vlm, 0.9), 0.9);
            println!(
                "{} {kind:?}: log p differs by at most {max}, by {mean} on average; rows by at most {rows}",
                family.name()
            );
            assert!(max <= max_limit && mean <= mean_limit && rows <= 1e-3);
            let stats = engine.stats();
            assert_eq!(engine.graph_error(), None);
            // The next batch of the same shape finds all its steps recorded.
            engine.generate(&requests(&vlm, 0.9), None).unwrap();
            let again = engine.stats();
            assert_eq!(again.graph_steps - stats.graph_steps, again.decode_steps - stats.decode_steps);
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
        let requests = requests(&cpu_model, 1.0);
        let mut on_cpu = Engine::new(&cpu_model, options()).unwrap();
        let outputs = on_cpu.generate(&requests, None).unwrap();
        // Both are given the CPU's tokens: sampled ones may differ by rounding alone, and so would all that follow.
        let forced = score_requests(&requests, &outputs);
        let on_gpu = Engine::new(&gpu_model, options()).unwrap().score(&forced, 1.0).unwrap();
        let Difference { max, mean, rows } = difference(generated(&outputs).zip(scored(&on_gpu)));
        println!("{}: log p differs by at most {max}, by {mean} on average; rows by at most {rows}", family.name());
        assert!(max <= 1e-3 && mean <= 1e-5 && rows <= 1e-3);
        let on_cpu = on_cpu.score(&forced, 1.0).unwrap();
        for (a, b) in on_cpu.iter().flatten().zip(on_gpu.iter().flatten()) {
            let equal = a.greedy.iter().zip(&b.greedy).filter(|(a, b)| a == b).count();
            assert!(equal * 100 >= a.greedy.len() * 95, "{equal} of {} greedy tokens are equal", a.greedy.len());
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
            let of_new: Vec<usize> = (0..r.versions.len()).filter(|i| r.versions[*i] == 1).collect();
            let deltas: Vec<f32> = of_new.iter().map(|i| (r.logprobs[*i] - s.logprobs[*i]).abs()).collect();
            let mean = deltas.iter().sum::<f32>() / deltas.len().max(1) as f32;
            assert!(mean < 1e-5 && deltas.iter().all(|delta| *delta < 1e-3), "group {k}: {deltas:?}");
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

/// Deterministic algorithms exist for all operations of generation, and repeat it bit for bit.
#[test]
fn deterministic_generation_repeats() {
    let gpu = gpu();
    set_deterministic(true).unwrap();
    for kind in [Kind::Float, Kind::BFloat16] {
        let dir = model_dir(Family::Qwen2_5Vl, 9);
        let run = || {
            let vlm = load(dir.path(), gpu, kind);
            let options = EngineOptions { fixed_shapes: true, ..options() };
            Engine::new(&vlm, options).unwrap().generate(&requests(&vlm, 1.0), None).unwrap()
        };
        let first = run();
        for (a, b) in first.iter().zip(&run()).flat_map(|(a, b)| a.responses.iter().zip(&b.responses)) {
            assert_eq!((&a.tokens, &a.logprobs), (&b.tokens, &b.logprobs), "{kind:?}");
        }
    }
    set_deterministic(false).unwrap();
}
