//! One update from a dumped batch, with everything that another program needs to check it: `replay.json`, `grads.safetensors`,
//! `model/` (merged where adapters are trained, with those in `adapter/`). Moments start at 0; rates and schedules are those of the dumped step.

use std::path::Path;

use serde_json::{Value, json};
use tch::Kind;
use unveil_config::Config;
use unveil_config::schema::Critic;
use unveil_model::{ValueHead, copy_companions, write_safetensors};

use crate::dump;
use crate::error::{LearnerError, Result};
use crate::lora;
use crate::settings::StepSettings;
use crate::setup::{CRITIC, Models};
use crate::shard::Ranks;
use crate::stage::load_model_as;
use crate::step::{Counters, Learner};

/// What an update starts from.
#[derive(Debug, Clone, Copy)]
pub struct ReplayModels<'a> {
    /// Model directory, with a value head where there is one.
    pub model: &'a Path,
    /// Adapters as peft writes them, where `learner.lora` asks for some; none = fresh ones.
    pub adapter: Option<&'a Path>,
    /// Model that KL is to; none = `model` itself, without adapters.
    pub reference: Option<&'a Path>,
}

/// Makes the update of the batch in `batch` from the weights in `models` under `config`, and writes results to `out`, computing in
/// `kind` (fp32 or fp64). `banned` are ids that the rollout never samples. KL has the weight that it had before
/// the dumped update. Gradients are those of the last optimiser step, before clipping. Agreement is
/// reported, not enforced. Returns what `replay.json` holds.
///
/// # Errors
/// Files that cannot be read or do not fit, an update that had to be skipped.
pub fn replay(
    config: &Config,
    models: ReplayModels<'_>,
    batch: &Path,
    out: &Path,
    banned: &[u32],
    kind: Kind,
) -> Result<Value> {
    let device = unveil_model::device(&config.run.device)?;
    let load = |dir: &Path| load_model_as(config, config.learner.threads, dir, kind, device);
    let model = models.model;
    let mut vlm = load(model)?;
    let adapted = lora::adapt(&mut vlm, config)?;
    if let Some(dir) = models.adapter {
        lora::load(&mut vlm, dir)?;
    }
    let (groups, values, at) = dump::read(batch, vlm.config().vision.patch_len())?;
    let other = models.reference.or((!adapted).then_some(model)).filter(|_| config.learner.kl_coef > 0.0);
    let reference = other.map(load).transpose()?;
    let settings = StepSettings { agreement_limit: f64::INFINITY, ..StepSettings::new(config, &vlm, banned) };
    let (hidden, options) = (vlm.config().text.hidden_size, (kind, vlm.device()));
    let critic = if config.learner.critic == Critic::Separate { Some(load(model)?) } else { None };
    let mut learner = Learner::on(Ranks::solo(), Models { vlm, reference, critic }, settings)?;
    if let (Some(own), Some(stored)) = (&mut learner.policy.value_head, ValueHead::load(model, hidden, options)?) {
        own.load_state(stored.named_parameters())?;
    }
    learner.restore(Counters { updates: 0, ..at.counters }, Some(&at.kl));
    learner.trace();
    let report = learner.update_with(&groups, &values)?;
    if let Some(why) = &report.skipped {
        return Err(LearnerError::Setting(format!("{}: the update was skipped: {why}", batch.display())));
    }
    std::fs::create_dir_all(out).map_err(LearnerError::io(out))?;
    write_safetensors(&out.join("grads.safetensors"), &learner.take_trace())?;
    let made = out.join("model");
    if adapted {
        lora::export(learner.vlm_mut(), model, &made, &lora::beside(&made))?;
    } else {
        learner.vlm().save(&made)?;
        copy_companions(model, &made)?;
    }
    if let Some(head) = learner.value_head() {
        head.save(&made)?;
    }
    let (mut critic, _) = learner.state()?;
    critic.retain(|(name, _)| name.starts_with(CRITIC));
    if !critic.is_empty() {
        write_safetensors(&out.join("critic.safetensors"), &critic)?;
    }
    let mut parts = report.loss.clone();
    let loss = parts.remove("loss");
    let result = json!({
        "loss": loss, "parts": parts, "entropy": report.entropy, "kl": report.kl, "kl_reference": report.kl_reference,
        "clip_fraction": report.clip_fraction, "grad_norm": report.grad_norm, "agreement": report.agreement,
        "drift": report.drift, "step": report.step, "lr": report.lr, "groups": groups.len(), "tokens": report.tokens,
        "wholly_masked": report.wholly_masked.len(),
    });
    let path = out.join("replay.json");
    unveil_core::write_atomic(&path, format!("{result:#}\n").as_bytes()).map_err(LearnerError::io(&path))?;
    Ok(result)
}
