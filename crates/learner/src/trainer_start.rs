//! Start of stage 2 on every rank: creates its trainer.

use tch::{Device, Kind, Tensor};
use unveil_config::schema::Critic;
use unveil_model::Vlm;
use unveil_trainer::lora::{self, BaseModel};
use unveil_trainer::{Models, PolicyTrainer, StepSettings, load_model, rank_device, wire_kind};

use crate::error::Result;
use crate::rank_control::RankControl;
use crate::stage::Stage;

/// Creates this rank's trainer from the model directory; returns it with the base model of its adapters, if there are
/// any.
pub(crate) fn make_trainer(stage: &Stage<'_>, control: &RankControl) -> Result<(PolicyTrainer, Option<BaseModel>)> {
    let config = stage.config;
    let load = || load_model(config, config.learner.threads, stage.model_dir, wire_kind(config), rank_device(config)?);
    let mut vlm = load()?;
    let base = lora::attach_adapters(&mut vlm, config)?.then(|| BaseModel::read(stage.model_dir)).transpose()?;
    // With adapters, the model without them serves as the reference.
    let reference = if config.learner.kl_coef > 0.0 && base.is_none() { Some(load()?) } else { None };
    let critic = if config.learner.critic == Critic::Separate { Some(load()?) } else { None };
    let banned = stage.data.preprocessor().tokenizer().banned().to_vec();
    let settings = StepSettings::new(config, &vlm, &banned);
    let mut trainer = PolicyTrainer::distributed(control.ranks.clone(), Models { vlm, reference, critic }, settings)?;
    trainer.broadcast_from_rank_0(&first_weights(stage, control)?)?;
    Ok((trainer, base))
}

/// Loads the fp32 master weights from the model directory, on rank 0 and if the trainer itself loads a narrower dtype;
/// else returns none.
fn first_weights(stage: &Stage<'_>, control: &RankControl) -> Result<Vec<(String, Tensor)>> {
    if wire_kind(stage.config) == Kind::Float || control.ranks.rank() > 0 || stage.config.learner.lora.rank > 0 {
        return Ok(Vec::new());
    }
    let vlm = Vlm::load(stage.model_dir, Device::Cpu, Kind::Float)?;
    Ok(vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect())
}
