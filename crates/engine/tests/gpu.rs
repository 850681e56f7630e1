//! The engine on a GPU: numbers like the CPU's, agreement with teacher forcing in both kinds of numbers, recorded steps, swaps.
//! `make test-gpu`; every test fails where there is no GPU.

use std::path::Path;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use unveil_core::Sampling;
use unveil_engine::{Engine, EngineOptions, GroupInput, GroupOutput, GroupRequest, ScoreRequest};
use unveil_model::{AttentionSet, Family, InitSpec, Prompt, SpecialIds, Vlm, device, free_memory, init};

const EOS: u32 = 60;
const IMAGE: u32 = 61;

fn gpu() -> Device {
    device("cuda").unwrap_or_else(|e| panic!("these tests need a GPU: {e}"))
}

fn directory(family: Family, seed: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let special =
        SpecialIds { image_pad: IMAGE, video_pad: 62, vision_start: 58, vision_end: 59, bos: None, eos: EOS, pad: 63 };
    let spec = InitSpec { family: family.name().into(), preset: "tiny".into(), vocab_size: 64, seed, special };
    init(&spec, dir.path()).unwrap();
    dir
}

fn load(dir: &Path, device: Device, kind: Kind) -> Vlm {
    Vlm::load(dir, device, kind).unwrap()
}

fn requests(vlm: &Vlm, temperature: f64) -> Vec<GroupRequest> {
    (0..5usize)
        .map(|k| {
            let v = &vlm.config().vision;
            let (h, w) = (2 * (2 + (k as i64 % 2)), 2 * (2 + (k as i64 % 3)));
            let mut tokens: Vec<u32> = vec![1, 2 + k as u32, 58];
            tokens.extend(vec![IMAGE; (h * w / 4) as usize]);
            tokens.push(59);
            tokens.extend((0..1 + k as u32).map(|i| 10 + i));
            let patches: Vec<f32> =
                (0..h * w * v.patch_len()).map(|i| ((i as f32 + 1.0) * (0.37 + k as f32)).sin()).collect();
            let prompt = Prompt { tokens, grids: vec![[1, h, w]] };
            let input = GroupInput { id: format!("g{k}"), prompt, patches: Arc::new(patches), hashes: vec![] };
            let sampling = Sampling { n: 4, temperature, max_new_tokens: 90, seed: 5, ..Default::default() };
            GroupRequest { input, key: k as u64, sampling, stop: None }
        })
        .collect()
}

fn options() -> EngineOptions {
    // Few rows, so that groups come and go; no response ends by itself, so that steps repeat.
    let capture = Some(AttentionSet::new(&[2], &[[0, 1], [3, 5]]));
    EngineOptions { max_rows: 12, capture, banned: vec![EOS], ..Default::default() }
}

fn given(requests: &[GroupRequest], outputs: &[GroupOutput]) -> Vec<ScoreRequest> {
    let one = |(r, o): (&GroupRequest, &GroupOutput)| ScoreRequest {
        input: r.input.clone(),
        responses: o.responses.iter().map(|x| x.tokens.clone()).collect(),
    };
    requests.iter().zip(outputs).map(one).collect()
}

/// Largest and mean difference of log-probabilities and of attention rows between generation and teacher forcing.
fn agreement(engine: &mut Engine<&Vlm>, requests: &[GroupRequest], temperature: f64) -> (f32, f32, f32) {
    let outputs = engine.generate(requests, None).unwrap();
    let scored = engine.score(&given(requests, &outputs), temperature).unwrap();
    let (mut worst, mut sum, mut count, mut rows) = (0f32, 0f32, 0, 0f32);
    for (r, s) in outputs.iter().flat_map(|o| &o.responses).zip(scored.iter().flatten()) {
        for (a, b) in r.logprobs.iter().zip(&s.logprobs) {
            worst = worst.max((a - b).abs());
            sum += (a - b).abs();
            count += 1;
        }
        let (mine, theirs) = (r.attention.as_ref().unwrap(), s.attention.as_ref().unwrap());
        assert_eq!(mine.len(), r.tokens.len());
        rows = mine.values.iter().zip(&theirs.values).map(|(a, b)| (a - b).abs()).fold(rows, f32::max);
    }
    (worst, sum / count as f32, rows)
}

#[test]
fn generation_agrees_with_teacher_forcing() {
    let gpu = gpu();
    for family in Family::ALL {
        let dir = directory(family, 3);
        for (kind, most, mean) in [(Kind::Float, 1e-5, 1e-5), (Kind::BFloat16, 1e-2, 1e-3)] {
            let vlm = load(dir.path(), gpu, kind);
            let mut engine = Engine::new(&vlm, options()).unwrap();
            let (worst, average, rows) = agreement(&mut engine, &requests(&vlm, 0.9), 0.9);
            println!(
                "{} {kind:?}: log p differs by {worst} at most, {average} on average; rows by {rows}",
                family.name()
            );
            assert!(worst <= most && average <= mean && rows <= 1e-3);
            let stats = engine.stats();
            assert_eq!(engine.graph_fault(), None);
            assert!(stats.graph_steps * 10 > stats.decode_steps * 9, "{stats:?}");
        }
    }
}

#[test]
fn the_gpu_equals_the_cpu() {
    let gpu = gpu();
    for family in Family::ALL {
        let dir = directory(family, 4);
        let (here, there) = (load(dir.path(), Device::Cpu, Kind::Float), load(dir.path(), gpu, Kind::Float));
        let requests = requests(&here, 0.0);
        let a = Engine::new(&here, options()).unwrap().generate(&requests, None).unwrap();
        let b = Engine::new(&there, options()).unwrap().generate(&requests, None).unwrap();
        for (a, b) in a.iter().flat_map(|g| &g.responses).zip(b.iter().flat_map(|g| &g.responses)) {
            assert_eq!(a.tokens, b.tokens);
            let far = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(far(&a.logprobs, &b.logprobs) < 1e-3);
            assert!(far(&a.attention.as_ref().unwrap().values, &b.attention.as_ref().unwrap().values) < 1e-3);
        }
    }
}

#[test]
fn weights_change_under_recorded_steps() {
    let gpu = gpu();
    let (old, new) = (directory(Family::Qwen2_5Vl, 5), directory(Family::Qwen2_5Vl, 6));
    let mut engine = Engine::new(load(old.path(), gpu, Kind::Float), options()).unwrap();
    let requests = requests(engine.vlm(), 1.0);
    let tickets: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    for _ in 0..20 {
        engine.step().unwrap();
    }
    let other = load(new.path(), gpu, Kind::Float);
    let named: Vec<(String, Tensor)> =
        other.named_parameters().iter().map(|(n, t)| (n.clone(), t.to_device(Device::Cpu))).collect();
    engine.load_weights(1, &named).unwrap();
    let mut done = std::collections::HashMap::new();
    while !engine.idle() {
        done.extend(engine.step().unwrap());
    }
    for (k, ticket) in tickets.iter().enumerate() {
        let output = &done[ticket];
        let scored =
            Engine::new(&other, options()).unwrap().score(&given(&requests[k..=k], std::slice::from_ref(output)), 1.0);
        for (r, s) in output.responses.iter().zip(&scored.unwrap()[0]) {
            for (i, version) in r.versions.iter().enumerate() {
                assert!(*version == 0 || (r.logprobs[i] - s.logprobs[i]).abs() < 1e-5, "group {k}, token {i}");
            }
        }
    }
}

#[test]
fn memory_is_known_and_weights_come_straight_to_the_gpu() {
    let gpu = gpu();
    let dir = directory(Family::Qwen3Vl, 7);
    let vlm = load(dir.path(), gpu, Kind::BFloat16);
    assert!(vlm.named_parameters().iter().all(|(_, t)| t.device() == gpu && t.kind() == Kind::BFloat16));
    assert!(free_memory(gpu).unwrap() > 1 << 30);
    vlm.save(&dir.path().join("again")).unwrap();
    let again = load(&dir.path().join("again"), Device::Cpu, Kind::BFloat16);
    for ((name, a), (_, b)) in vlm.named_parameters().iter().zip(again.named_parameters()) {
        assert_eq!((a.to_device(Device::Cpu) - b).abs().max().double_value(&[]), 0.0, "{name}");
    }
}
