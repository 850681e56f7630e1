//! Fixtures: a random tiny model, prompts, and a rollout by the real engine with a toy reward. The tests of the learner use them too.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use unveil_config::Config;
use unveil_config::schema::{Algorithm, Learner};
use unveil_core::{Breakdown, Component, Grid, GroupId, GroupInput, Prompt, Record, Response, Sampling, TrainGroup};
use unveil_engine::{Engine, EngineOptions, GroupRequest};
use unveil_model::{InitSpec, LoraSpec, SpecialIds, Vlm, init};
use unveil_trainer::StepSettings;

pub const VOCAB: u32 = 64;
pub const EOS: u32 = 60;
pub const IMAGE: u32 = 61;
pub const MAX_TOKENS: usize = 8;

pub fn write_model(dir: &Path, seed: u64) {
    let special =
        SpecialIds { image_pad: IMAGE, video_pad: 62, vision_start: 58, vision_end: 59, bos: None, eos: EOS, pad: 63 };
    let spec = InitSpec { family: "qwen2_5_vl".into(), preset: "tiny".into(), vocab_size: VOCAB, seed, special };
    init(&spec, dir).unwrap();
}

pub fn model(seed: u64) -> Vlm {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), seed);
    Vlm::load(dir.path(), Device::Cpu, Kind::Float).unwrap()
}

pub fn record(id: &str) -> Record {
    let line = format!(
        r#"{{"id":"{id}","image_size":[64,64],"category":"x","boxes":[[0.0,0.0,16.0,16.0]],"question":"q","image":"i.png"}}"#
    );
    serde_json::from_str(&line).unwrap()
}

/// Returns prompt `k`: a few words around an image of 2 x 2 merged tokens.
pub fn input(vlm: &Vlm, k: usize) -> GroupInput {
    let v = &vlm.config().vision;
    let side = v.spatial_merge_size * 2;
    let mut tokens: Vec<u32> = vec![1, 2 + k as u32 % 8, 58];
    tokens.extend([IMAGE; 4]);
    tokens.extend([59, 20 + k as u32 % 8]);
    let patches = (0..side * side * v.patch_len()).map(|i| ((i as f32 + 1.0) * (0.37 + k as f32)).sin()).collect();
    GroupInput {
        record: record(&format!("r{k}")),
        image_size: (64, 64),
        prompt: Prompt { tokens, grids: vec![[1, side, side]] },
        patches,
        merged: Grid { rows: 2, cols: 2 },
        encoded: Default::default(),
    }
}

pub fn breakdown(id: &str, index: usize, total: Option<f64>) -> Breakdown {
    let component = total.map_or_else(|| Component::masked(unveil_core::MaskReason::NoAttention), Component::value);
    Breakdown { id: id.into(), index, total, components: BTreeMap::from([("toy".into(), component)]) }
}

/// Generates groups with the engine at weight version `version`; `reward` scores the tokens. The text has one letter
/// per token.
pub fn rollout(
    vlm: &Vlm,
    groups: usize,
    n: usize,
    version: u64,
    reward: &dyn Fn(&[u32]) -> Option<f64>,
) -> Vec<TrainGroup> {
    let sampling = Sampling { n, temperature: 1.0, max_new_tokens: MAX_TOKENS, seed: 11, ..Default::default() };
    let mut engine = Engine::new(vlm, EngineOptions::default()).unwrap();
    engine.set_version(version);
    let inputs: Vec<GroupInput> = (0..groups).map(|k| input(vlm, k)).collect();
    let requests: Vec<GroupRequest> = inputs
        .iter()
        .enumerate()
        .map(|(k, i)| GroupRequest {
            input: unveil_engine::PromptInput {
                id: i.record.id.clone(),
                prompt: i.prompt.clone(),
                patches: i.patches.clone().into(),
                hashes: vec![],
            },
            key: version * 1000 + k as u64,
            sampling,
            stop: None,
        })
        .collect();
    let outputs = engine.generate(&requests, None).unwrap();
    inputs
        .into_iter()
        .zip(outputs)
        .enumerate()
        .map(|(k, (input, out))| {
            let id = GroupId { pass: version, position: k as u64, record: input.record.id.clone() };
            let letter = |t: &u32| char::from(b'A' + (*t % 58) as u8);
            let responses: Vec<Response> = out
                .responses
                .into_iter()
                .map(|r| Response {
                    index: r.index,
                    text: r.tokens.iter().map(letter).collect(),
                    tokens: r.tokens,
                    logprobs: r.logprobs,
                    versions: r.versions,
                    finish: r.finish,
                })
                .collect();
            let spans = responses.iter().map(|r| (0..r.tokens.len()).map(|i| (i, i + 1)).collect()).collect();
            let breakdowns = responses.iter().map(|r| breakdown(&id.record, r.index, reward(&r.tokens))).collect();
            TrainGroup {
                id,
                worker: "w".into(),
                input: Arc::new(input),
                responses,
                spans,
                breakdowns,
                attention: Vec::new(),
                generate_ms: 1.0,
                reward_ms: 1.0,
            }
        })
        .collect()
}

/// Returns the share of tokens below 16.
pub fn low_tokens(tokens: &[u32]) -> Option<f64> {
    Some(tokens.iter().filter(|t| **t < 16).count() as f64 / tokens.len().max(1) as f64)
}

pub fn settings(vlm: &Vlm, algorithm: Algorithm, steps: u64) -> StepSettings {
    configured(vlm, steps, |l| l.algorithm = algorithm)
}

/// Returns settings from a configuration whose section `[learner]` is changed by `change`.
pub fn configured(vlm: &Vlm, steps: u64, change: impl FnOnce(&mut Learner)) -> StepSettings {
    let mut config = Config::default();
    config.rollout.max_new_tokens = MAX_TOKENS;
    config.learner.steps = steps;
    config.learner.optimizer.lr = 1e-3;
    config.learner.optimizer.warmup = 2;
    change(&mut config.learner);
    StepSettings::new(&config, vlm, &[])
}

/// Returns the values of all parameters.
pub fn weights(vlm: &Vlm) -> Vec<(String, Vec<f32>)> {
    let host = |t: &Tensor| Vec::<f32>::try_from(t.detach().reshape([-1])).unwrap();
    vlm.named_parameters().iter().map(|(n, t)| (n.clone(), host(t))).collect()
}

/// Returns adapters of this rank on the default targets.
pub fn lora_spec(rank: i64) -> LoraSpec {
    LoraSpec { rank, alpha: 8.0, rank_stabilised: false, targets: Learner::default().lora.targets }
}

/// Overwrites all adapters with noise.
pub fn add_noise(vlm: &mut Vlm, seed: i64) {
    tch::manual_seed(seed);
    let named = vlm.adapters().unwrap().named_parameters();
    let noise: Vec<(String, Tensor)> = named.iter().map(|(n, t)| (n.clone(), t.detach().randn_like() * 0.1)).collect();
    vlm.load_adapters(&noise).unwrap();
}

/// Returns copies of all adapters.
pub fn adapters(vlm: &Vlm) -> Vec<(String, Tensor)> {
    vlm.adapters().unwrap().named_parameters().iter().map(|(n, t)| (n.clone(), t.detach().copy())).collect()
}
