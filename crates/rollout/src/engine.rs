//! Builds the engine from the configuration (device, dtype, captured attention, memory limit) and the rule for stop strings. Shared by
//! the worker, the offline commands and evaluation.

use std::path::Path;
use std::sync::Arc;

use unveil_config::Config;
use unveil_engine::{Engine, EngineOptions, StopRule};
use unveil_model::{AttentionSet, Vlm, VlmConfig, weight_kind};
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_preprocess::tokenizer::stop::StopStrings;
use unveil_torch_ext::set_deterministic;

use crate::Result;

/// Returns the engine's options for a model: captures the attention that vision relevance reads, and bans the tokens in `banned` (the
/// tokenizer's vision tokens).
pub fn engine_options(config: &Config, model: &VlmConfig, banned: &[u32]) -> EngineOptions {
    let vision = &config.reward.vision_relevance;
    let rollout = &config.rollout;
    EngineOptions {
        max_rows: rollout.max_rows,
        capture: Some(AttentionSet::configured(model, &vision.layers, &vision.heads)),
        banned: banned.to_vec(),
        memory_limit: (rollout.memory_gib > 0.0).then(|| (rollout.memory_gib * f64::from(1 << 30)) as u64),
        keep_cache: rollout.keep_cache,
        // What a batch left behind would enter the shapes of the next one, which a resumed run cannot repeat.
        reuse_cache: !config.run.deterministic,
        ..Default::default()
    }
}

/// Loads a model into an engine, which then belongs to the calling thread. With `threads` 0, all cores are used.
///
/// # Errors
/// Returns [`RolloutError::Model`](crate::RolloutError::Model) if the device or the model directory cannot be used, and
/// [`RolloutError::Engine`](crate::RolloutError::Engine) if the model lacks a layer or head whose attention is captured.
pub fn open_engine(config: &Config, dir: &Path, threads: usize, banned: &[u32]) -> Result<Engine> {
    set_deterministic(config.run.deterministic).map_err(unveil_model::ModelError::from)?;
    if threads > 0 {
        tch::set_num_threads(threads as i32);
    }
    let mut vlm = Vlm::load(dir, unveil_model::device(&config.run.device)?, weight_kind(config.run.dtype))?;
    vlm.set_compute(config.run.compute)?;
    let options = engine_options(config, vlm.config(), banned);
    Ok(Engine::new(vlm, options)?)
}

/// Returns a rule that ends a response once its text contains one of `stop`; `None` without stop strings.
pub(crate) fn stop_rule(preprocessor: &Arc<Preprocessor>, stop: &[String]) -> Option<StopRule> {
    let stops = StopStrings::new(stop);
    if stops.is_empty() {
        return None;
    }
    let preprocessor = preprocessor.clone();
    Some(Arc::new(move || {
        let preprocessor = preprocessor.clone();
        let mut stops = stops.clone();
        Box::new(move |token| stops.push(&preprocessor.tokenizer().token_bytes(token)))
    }))
}
