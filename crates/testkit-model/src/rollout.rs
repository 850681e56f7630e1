//! Groups that the real engine generates with a toy reward, and settings of the trainer for them.

use std::sync::Arc;

use unveil_config::Config;
use unveil_config::schema::Learner;
use unveil_core::{Grid, GroupId, GroupInput, Prompt, Response, Sampling, TrainGroup};
use unveil_engine::{Engine, EngineOptions, GroupRequest, PromptInput};
use unveil_model::{LoraSpec, Vlm};
use unveil_trainer::StepSettings;

use crate::tiny::{VISION_END, VISION_START};
use crate::{IMAGE, breakdown, patches, record};

/// Maximum number of tokens of a response.
pub const MAX_TOKENS: usize = 8;

/// Returns prompt `k`: a few words around an image of 2 x 2 merged tokens.
pub fn input(vlm: &Vlm, k: usize) -> GroupInput {
    let side = vlm.config().vision.spatial_merge_size * 2;
    let mut tokens: Vec<u32> = vec![1, 2 + k as u32 % 8, VISION_START];
    tokens.extend([IMAGE; 4]);
    tokens.extend([VISION_END, 20 + k as u32 % 8]);
    GroupInput {
        record: record(&format!("r{k}")),
        image_size: (64, 64),
        prompt: Prompt { tokens, grids: vec![[1, side, side]] },
        patches: patches(vlm, side * side, k),
        merged: Grid { rows: 2, cols: 2 },
        encoded: Default::default(),
    }
}

/// Generates groups of `n` responses at weight version `version`; `reward` scores the tokens. The text has one letter per token.
pub fn rollout(
    vlm: &Vlm,
    groups: usize,
    n: usize,
    version: u64,
    reward: &dyn Fn(&[u32]) -> Option<f64>,
) -> Vec<TrainGroup> {
    let sampling = Sampling { n, temperature: 1.0, max_new_tokens: MAX_TOKENS, seed: 11, ..Default::default() };
    let mut engine = Engine::new(vlm, EngineOptions::default()).expect("an engine for a tiny model");
    engine.set_version(version);
    let inputs: Vec<GroupInput> = (0..groups).map(|k| input(vlm, k)).collect();
    let request = |(k, input): (usize, &GroupInput)| GroupRequest {
        input: PromptInput {
            id: input.record.id.clone(),
            prompt: input.prompt.clone(),
            patches: input.patches.clone().into(),
            hashes: vec![],
        },
        key: version * 1000 + k as u64,
        sampling,
        stop: None,
    };
    let requests: Vec<GroupRequest> = inputs.iter().enumerate().map(request).collect();
    let outputs = engine.generate(&requests, None).expect("groups are generated");
    let letter = |t: &u32| char::from(b'A' + (*t % 58) as u8);
    let mut generated = Vec::new();
    for (k, (input, output)) in inputs.into_iter().zip(outputs).enumerate() {
        let id = GroupId { pass: version, position: k as u64, record: input.record.id.clone() };
        let responses: Vec<Response> = output
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
        generated.push(TrainGroup {
            id,
            worker: "w".into(),
            input: Arc::new(input),
            responses,
            spans,
            breakdowns,
            attention: Vec::new(),
            generate_ms: 1.0,
            reward_ms: 1.0,
        });
    }
    generated
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

/// Returns adapters of this rank on the default targets.
pub fn lora_spec(rank: i64) -> LoraSpec {
    LoraSpec { rank, alpha: 8.0, rank_stabilised: false, targets: Learner::default().lora.targets }
}
