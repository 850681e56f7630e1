//! The engine as the configuration has it: device, kind of numbers, attention that is read, room; and a request's texts that
//! end a response. Shared by the worker, the offline commands and evaluation.

use std::path::Path;
use std::sync::Arc;

use tch::Kind;
use unveil_config::Config;
use unveil_config::schema::Dtype;
use unveil_data::prepare::Preparer;
use unveil_data::tokenizer::stop::StopStrings;
use unveil_engine::{Engine, EngineOptions, StopRule};
use unveil_model::{AttentionSet, Vlm, VlmConfig};
use unveil_torch_ext::set_deterministic;

use crate::Result;

/// The engine's options for a model: attention captured where vision relevance reads it, the tokenizer's vision tokens banned.
pub fn engine_options(config: &Config, model: &VlmConfig, banned: &[u32]) -> EngineOptions {
    let (vision, rollout) = (&config.reward.vision_relevance, &config.rollout);
    EngineOptions {
        max_rows: rollout.max_rows,
        capture: Some(AttentionSet::configured(model, &vision.layers, &vision.heads)),
        banned: banned.to_vec(),
        memory: (rollout.memory_gib > 0.0).then(|| (rollout.memory_gib * f64::from(1 << 30)) as u64),
        ..Default::default()
    }
}

/// Loads a model into an engine on the calling thread, which it then belongs to. `threads` 0 = all cores.
///
/// # Errors
/// The device cannot be used, the model directory does not hold together, or it lacks layers or heads that are to be read.
pub fn open_engine(config: &Config, dir: &Path, threads: usize, banned: &[u32]) -> Result<Engine> {
    set_deterministic(config.run.deterministic).map_err(unveil_model::ModelError::from)?;
    if threads > 0 {
        tch::set_num_threads(threads as i32);
    }
    let kind = match config.run.dtype {
        Dtype::Float32 => Kind::Float,
        Dtype::Bfloat16 => Kind::BFloat16,
    };
    let vlm = Vlm::load(dir, unveil_model::device(&config.run.device)?, kind)?;
    let options = engine_options(config, vlm.config(), banned);
    Ok(Engine::new(vlm, options)?)
}

/// Ends a response when its text holds one of `stop`; none where there is nothing to look for.
pub(crate) fn stop_rule(preparer: &Arc<Preparer>, stop: &[String]) -> Option<StopRule> {
    let stops = StopStrings::new(stop);
    if stops.is_empty() {
        return None;
    }
    let preparer = preparer.clone();
    Some(Arc::new(move || {
        let (preparer, mut stops) = (preparer.clone(), stops.clone());
        Box::new(move |token| stops.push(&preparer.tokenizer().token_bytes(token)))
    }))
}
