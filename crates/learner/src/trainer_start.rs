//! Start of a stage on every rank: creates its trainer.

use tch::{Device, Kind, Tensor};
use unveil_config::Config;
use unveil_config::schema::Critic;
use unveil_model::Vlm;
use unveil_trainer::lora::{self, BaseModel};
use unveil_trainer::{
    Freezing, Models, PolicyTrainer, SftSettings, SftTrainer, StepSettings, TrainerError, device_of_rank, load_model,
    rank_device, wire_kind,
};

use crate::error::Result;
use crate::rank_control::RankControl;
use crate::stage::Stage;

/// Creates this rank's trainer of stage 2 from the model directory; returns it with the base model of its adapters, if there are
/// any.
pub(crate) fn make_trainer(stage: &Stage<'_>, control: &RankControl) -> Result<(PolicyTrainer, Option<BaseModel>)> {
    let config = stage.config;
    let load = || load_model(config, config.learner.threads, stage.model_dir, wire_kind(config), rank_device(config)?);
    let mut vlm = load()?;
    let base = lora::attach_adapters(&mut vlm, config)?.then(|| BaseModel::read(stage.model_dir)).transpose()?;
    if config.learner.lora.continue_sft {
        let adapter = config.stage1_adapter();
        unveil_model::check_adapter_base(&adapter, stage.model_dir)?;
        lora::load(&mut vlm, &adapter, "learner")?;
    }
    // With adapters, the model without them serves as the reference.
    let reference = if config.learner.kl_coef > 0.0 && base.is_none() { Some(load()?) } else { None };
    let critic = if config.learner.critic == Critic::Separate { Some(load()?) } else { None };
    let banned = stage.data.preprocessor().tokenizer().banned().to_vec();
    let settings = StepSettings::new(config, &vlm, &banned);
    let mut trainer = PolicyTrainer::distributed(control.ranks.clone(), Models { vlm, reference, critic }, settings)?;
    let adapted = base.is_some();
    trainer.broadcast_from_rank_0(&first_weights(stage, control, adapted)?)?;
    Ok((trainer, base))
}

/// Creates this rank's trainer of a phase of stage 1, which begins after `first_step` updates, from the model directory; returns it with the
/// base model of its adapters, if there are any.
pub(crate) fn make_sft_trainer(
    stage: &Stage<'_>,
    control: &RankControl,
    first_step: u64,
) -> Result<(SftTrainer, Option<BaseModel>)> {
    let config = stage.config;
    let device = device_of_rank(config, &config.sft.parallel)?;
    let mut vlm = load_model(config, config.run.threads, stage.model_dir, wire_kind(config), device)?;
    let base = lora::attach_sft_adapters(&mut vlm, config)?.then(|| BaseModel::read(stage.model_dir)).transpose()?;
    check_phases(config, &vlm)?;
    let settings = SftSettings::from_config(config, first_step);
    let mut trainer = SftTrainer::distributed(control.ranks.clone(), vlm, settings)?;
    // The modules beside adapters are trained, too.
    let adapted = base.is_some() && config.sft.lora.modules_to_save.is_empty();
    trainer.broadcast_from_rank_0(&first_weights(stage, control, adapted)?)?;
    Ok((trainer, base))
}

/// Checks that every phase of stage 1 trains something, before the first one begins.
fn check_phases(config: &Config, vlm: &Vlm) -> Result<()> {
    for (i, phase) in config.sft.stage.iter().enumerate().filter(|(_, phase)| phase.lora.rank == 0) {
        let freezing = Freezing::always(&format!("sft.stage, entry {i}: frozen"), &phase.frozen);
        let names = vlm.named_parameters().iter().map(|(n, _)| n.as_str());
        freezing.check(names).map_err(TrainerError::Setting)?;
    }
    Ok(())
}

/// Loads the fp32 master weights from the model directory, on rank 0 and if the trainer itself loads a narrower dtype;
/// else returns none. The weights of an `adapted` model are not trained.
fn first_weights(stage: &Stage<'_>, control: &RankControl, adapted: bool) -> Result<Vec<(String, Tensor)>> {
    if wire_kind(stage.config) == Kind::Float || control.ranks.rank() > 0 || adapted {
        return Ok(Vec::new());
    }
    let vlm = Vlm::load(stage.model_dir, Device::Cpu, Kind::Float)?;
    Ok(vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect())
}
