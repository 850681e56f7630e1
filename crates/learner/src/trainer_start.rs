//! Start of stage 2 on every rank: creates its trainer, and loads its share of a checkpoint.

use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;
use unveil_checkpoint::Reader;
use unveil_config::schema::Critic;
use unveil_model::Vlm;
use unveil_trainer::lora::{self, BaseModel};
use unveil_trainer::{Models, PolicyTrainer, StepSettings, load_model, rank_device, wire_kind};

use crate::checkpoint_meta::CheckpointMeta;
use crate::error::Result;
use crate::rank_control::RankControl;
use crate::resume::compatibility::allowed_changes;
use crate::snapshot::read_state;
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
    let banned = stage.data.preprocessor().tokenizer().special().banned.clone();
    let settings = StepSettings::new(config, &vlm, &banned);
    let mut trainer = PolicyTrainer::distributed(control.ranks.clone(), Models { vlm, reference, critic }, settings)?;
    trainer.broadcast_from_rank_0(&first_weights(stage, control)?)?;
    Ok((trainer, base))
}

/// Loads this rank's share of a checkpoint after checking that it fits.
pub(crate) fn read_checkpoint(
    stage: &Stage<'_>,
    trainer: &PolicyTrainer,
    base: Option<&BaseModel>,
    reader: &Reader,
    handle: &Handle,
) -> Result<CheckpointMeta> {
    let meta = CheckpointMeta::read(reader, "rl", stage.config.run.seed)?;
    let critic = stage.config.learner.critic == Critic::Separate;
    meta.check_fits(reader, trainer.vlm(), base, critic)?;
    allowed_changes(reader.info().step, &meta.config, stage.config)?;
    read_state(&trainer.state_to_load()?, handle, reader)?;
    Ok(meta)
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
