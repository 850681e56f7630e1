//! Replays one update from a dumped batch and writes everything that another program needs to check it: `replay.json`,
//! `grads.safetensors` and `model/` (if adapters are trained: the merged model, with the adapters in `adapter/`). Moments start at 0;
//! the learning rate and schedules are those of the dumped step.

use std::path::Path;

use serde_json::{Value, json};
use tch::Kind;
use unveil_config::Config;
use unveil_config::schema::Critic;
use unveil_model::{ValueHead, copy_companion_files, write_safetensors};

use crate::dump;
use crate::error::{Result, TrainerError};
use crate::freeze::CRITIC_PREFIX;
use crate::load::load_model;
use crate::lora;
use crate::settings::StepSettings;
use crate::shard::Ranks;
use crate::step::Models;
use crate::step::{Counters, PolicyTrainer};

/// Models that a replay starts from.
#[derive(Debug, Clone, Copy)]
pub struct ReplayModels<'a> {
    /// Model directory, including the value head if there is one.
    pub model: &'a Path,
    /// Directory of adapters in PEFT's format, if `learner.lora` asks for adapters; `None`: fresh ones.
    pub adapter: Option<&'a Path>,
    /// Directory of the KL reference; `None`: `model` without adapters.
    pub reference: Option<&'a Path>,
}

/// Runs the update of the dumped `batch` from `models` under `config`, computing in dtype `kind` (fp32 or fp64), and writes the results
/// to `out`. `banned` are the token ids that are never sampled. The KL coefficient is the one before the dumped update. The written
/// gradients are those of the last optimiser step, before clipping. Agreement is reported, not enforced. Returns the contents of
/// `replay.json`.
///
/// # Errors
/// Returns [`TrainerError::Dump`], [`TrainerError::Io`] or an error of the model if a file cannot be read or does not fit, and
/// [`TrainerError::Setting`] if the update was skipped.
pub fn replay(
    config: &Config,
    models: ReplayModels<'_>,
    batch: &Path,
    out: &Path,
    banned: &[u32],
    kind: Kind,
) -> Result<Value> {
    let device = unveil_model::device(&config.run.device)?;
    let load = |dir: &Path| load_model(config, config.learner.threads, dir, kind, device);
    let model = models.model;
    let mut vlm = load(model)?;
    let adapted = lora::attach_adapters(&mut vlm, config)?;
    if let Some(dir) = models.adapter {
        lora::load(&mut vlm, dir, "learner")?;
    }
    let (groups, values, dumped) = dump::read(batch, vlm.config().vision.patch_len())?;
    let reference = models.reference.or((!adapted).then_some(model)).filter(|_| config.learner.kl_coef > 0.0);
    let reference = reference.map(load).transpose()?;
    let settings = StepSettings { agreement_limit: f64::INFINITY, ..StepSettings::new(config, &vlm, banned) };
    let hidden = vlm.config().text.hidden_size;
    let options = (kind, vlm.device());
    let critic = if config.learner.critic == Critic::Separate { Some(load(model)?) } else { None };
    let mut trainer = PolicyTrainer::distributed(Ranks::solo(), Models { vlm, reference, critic }, settings)?;
    if let (Some(head), Some(stored)) = (&mut trainer.policy.value_head, ValueHead::load(model, hidden, options)?) {
        head.load_state(stored.named_parameters())?;
    }
    trainer.restore_counters(Counters { updates: 0, ..dumped.counters }, Some(&dumped.kl));
    trainer.record_gradients();
    let report = trainer.update_with_values(&groups, &values)?;
    if let Some(why) = &report.skipped {
        return Err(TrainerError::Setting(format!("{}: the update was skipped: {why}", batch.display())));
    }
    std::fs::create_dir_all(out).map_err(TrainerError::io(out))?;
    write_safetensors(&out.join("grads.safetensors"), &trainer.take_recorded_gradients())?;
    let model_out = out.join("model");
    if adapted {
        lora::export(trainer.vlm_mut(), model, &model_out, &lora::adapter_dir(&model_out))?;
    } else {
        trainer.vlm().save(&model_out)?;
        copy_companion_files(model, &model_out)?;
    }
    if let Some(head) = trainer.value_head() {
        head.save(&model_out)?;
    }
    let (mut critic, _) = trainer.state()?;
    critic.retain(|(name, _)| name.starts_with(CRITIC_PREFIX));
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
    unveil_core::write_atomic(&path, format!("{result:#}\n").as_bytes()).map_err(TrainerError::io(&path))?;
    Ok(result)
}
