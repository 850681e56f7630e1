//! `unveil plan`, and the check of `unveil train` that a run fits into the memory of this machine.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use serde_json::json;
use unveil_cli::ConfigArgs;
use unveil_config::{Config, ConfigError, Loaded};
use unveil_launch::{MachineMemory, placement};
use unveil_model::{VlmConfig, preset};
use unveil_plan::{Device, ModelShape, PlanInput, RunPlan, plan};
use unveil_preprocess::processor::ProcessorConfig;
use unveil_preprocess::tokenizer::tiny::TinyProcessorSpec;

/// Tokens of a vocabulary that is made for the synthetic data.
const SMALL_VOCABULARY: i64 = 512;

#[derive(Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// GPU of each process, such as A100-80 or H100; without it, the device of this machine that the run would use.
    #[arg(long, value_name = "NAME")]
    gpu: Option<String>,
    /// GPUs per node; one per process by default.
    #[arg(long, value_name = "N")]
    gpus: Option<u64>,
    /// Number of nodes.
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    nodes: u64,
}

/// Runs `unveil plan`: prints one JSON object.
pub(crate) fn run(args: &PlanArgs) -> anyhow::Result<()> {
    let loaded = args.config.load_with_origins()?;
    let invalid = |what: String| ConfigError::Invalid(vec![what]);
    let device = match &args.gpu {
        Some(name) => Device::gpu(name).map_err(|e| invalid(format!("--gpu: {e}")))?,
        None => local_device(&loaded.config).ok_or_else(|| {
            let device = &loaded.config.run.device;
            invalid(format!("run.device is `{device}`, but this machine has no GPU: name one by --gpu"))
        })?,
    };
    let plan = plan_of(&loaded.config, (device, args.gpus, args.nodes))?.map_err(invalid)?;
    println!("{}", serde_json::to_value(plan)?);
    Ok(())
}

/// Refuses a run whose remaining stages do not fit into the memory of this machine, if `launch.check_memory` is set; with `prepare`, stage 2
/// runs elsewhere.
pub(crate) fn check_memory(loaded: &Loaded, prepare: bool) -> anyhow::Result<()> {
    let mut config = loaded.config.clone();
    if !config.launch.check_memory {
        return Ok(());
    }
    let exists = |model: PathBuf| model.join("config.json").exists();
    if prepare || exists(config.final_model()) {
        config.learner.steps = 0;
    }
    if exists(config.stage1_model()) {
        config.sft.steps = 0;
    }
    match local_plan(&config)?.and_then(|plan| plan.problem()) {
        Some(problem) => Err(loaded.invalid(vec![refusal(&problem)]).into()),
        None => Ok(()),
    }
}

/// Runs `unveil train --dry-run`: prints plan and placement, and fails if the run does not fit.
pub(crate) fn dry_run(loaded: &Loaded) -> anyhow::Result<()> {
    let processes = placement(&loaded.config)?;
    let plan = local_plan(&loaded.config)?;
    let problem = plan.as_ref().and_then(RunPlan::problem);
    println!("{}", json!({ "plan": plan, "placement": processes }));
    match problem.filter(|_| loaded.config.launch.check_memory) {
        Some(problem) => Err(loaded.invalid(vec![refusal(&problem)]).into()),
        None => Ok(()),
    }
}

fn refusal(problem: &str) -> String {
    format!(
        "the run does not fit into the memory of this machine: {problem}; or set launch.check_memory = false to start it anyway"
    )
}

/// Plans a run on the devices of this machine; `None` if they are unknown, or if the processes share them in a way that was refused before.
fn local_plan(config: &Config) -> anyhow::Result<Option<RunPlan>> {
    let Some(device) = local_device(config) else { return Ok(None) };
    let gpus =
        placement(config)?.into_iter().filter_map(|p| p.gpu).collect::<std::collections::BTreeSet<_>>().len() as u64;
    Ok(plan_of(config, (device, (gpus > 0).then_some(gpus), 1))?.ok())
}

/// Returns the device of this machine that a run uses; `None` without one.
fn local_device(config: &Config) -> Option<Device> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    MachineMemory::of(&config.run.device).map(|memory| match memory {
        MachineMemory::Gpu(bytes) => Device::with_memory(bytes),
        MachineMemory::Host(bytes) => Device::cpu(bytes, cores),
    })
}

/// Plans a run on a device, with a number of GPUs per node and of nodes; the inner error says what is wrong with these.
fn plan_of(
    config: &Config,
    (device, gpus, nodes): (Device, Option<u64>, u64),
) -> anyhow::Result<Result<RunPlan, String>> {
    let shape = model_shape(config)?;
    let max_pixels = max_pixels(config);
    Ok(plan(&PlanInput { config, shape: &shape, device, gpus, nodes, max_pixels }).map_err(|e| e.to_string()))
}

/// Returns the bound of an image's pixels in the directory of the initial model, or in that of a small preset before it exists.
fn max_pixels(config: &Config) -> Option<u64> {
    let m = &config.model;
    let is_small = || m.dir.is_empty() && preset(&m.family, &m.preset).is_ok_and(|p| p.vocabulary() == 0);
    let processor = ProcessorConfig::load(&config.initial_model()).ok().map(|p| p.max_pixels);
    processor.or_else(|| is_small().then(|| TinyProcessorSpec::default().max_pixels))
}

/// Returns the sizes of the initial model, from `config.json` or the preset.
fn model_shape(config: &Config) -> anyhow::Result<ModelShape> {
    let m = &config.model;
    let initial = config.initial_model();
    let mut model = if m.dir.is_empty() && !initial.join("config.json").exists() {
        preset(&m.family, &m.preset).context("model.family and model.preset")?.config()
    } else {
        VlmConfig::load(&initial)?
    };
    model.text.vocab_size = model.text.vocab_size.max(SMALL_VOCABULARY);
    Ok(model.shape())
}
