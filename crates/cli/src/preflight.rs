//! Checks before work begins: existence of the model and other inputs, and learning rates that fit the model's size.

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use unveil_cli::ConfigArgs;
use unveil_config::schema::{DataKind, Model};
use unveil_config::{
    Config, ConfigError, Loaded, TrainingStage, count_parameters, entries, format_count, model_dir_problem,
};
use unveil_core::Family;
use unveil_core::stderr_line;
use unveil_model::{preset, presets};
use unveil_preprocess::processor::{PixelBounds, ProcessorConfig};
use unveil_preprocess::prompt_template::PromptTemplate;

#[derive(Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Skips checking that the model, the data and other files exist, for the configuration of another machine.
    #[arg(long)]
    offline: bool,
}

/// Runs `unveil config check`.
pub(crate) fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let loaded = args.config.load_with_origins()?;
    check_model_name(&loaded)?;
    if !args.offline {
        loaded.check_paths()?;
        check_pixel_bounds(&loaded)?;
    }
    check_prompt(&loaded)?;
    check_learning_rates(&loaded, &TrainingStage::ALL)?;
    check_trainable(&loaded)?;
    stderr_line(&format!("ok: {}", summarise(&loaded, &args.config.config)));
    Ok(())
}

/// Checks everything that the stages need: model family, files, learning rates.
pub(crate) fn check_all(loaded: &Loaded, stages: &[TrainingStage]) -> Result<(), ConfigError> {
    check_model_name(loaded)?;
    loaded.check_paths()?;
    check_pixel_bounds(loaded)?;
    check_prompt(loaded)?;
    check_learning_rates(loaded, stages)?;
    check_trainable(loaded)
}

/// Checks that the learning rates fit the model, if its size can be determined here.
pub(crate) fn check_learning_rates(loaded: &Loaded, stages: &[TrainingStage]) -> Result<(), ConfigError> {
    model_size(&loaded.config).map_or(Ok(()), |parameters| loaded.check_learning_rates(parameters, stages))
}

/// Returns the number of parameters of the initial model.
fn model_size(config: &Config) -> Option<u64> {
    let m = &config.model;
    match m.dir.as_str() {
        "" => preset(&m.family, &m.preset).ok().map(|p| p.size(0).0),
        dir => count_parameters(Path::new(dir)),
    }
}

/// Checks that the model family and preset exist.
fn check_model_name(loaded: &Loaded) -> Result<(), ConfigError> {
    let Model { dir, family, preset: name, .. } = &loaded.config.model;
    if !dir.is_empty() || preset(family, name).is_ok() {
        return Ok(());
    }
    let problem = match presets(family) {
        known if known.is_empty() => {
            let families = Family::ALL.map(Family::name).join(" or ");
            format!("model.family is `{family}`: use {families}, or set model.dir to a model directory")
        }
        known => format!("model.preset is `{name}`: {family} has {}", known.join(", ")),
    };
    Err(loaded.invalid(vec![problem]))
}

/// Checks that the prompt template can be parsed.
fn check_prompt(loaded: &Loaded) -> Result<(), ConfigError> {
    let template = PromptTemplate::new(&loaded.config.input_settings().prompt);
    template.map(|_| ()).map_err(|e| loaded.invalid(vec![e.to_string()]))
}

/// Checks that the bounds of the resize do not contradict those of the model directory, if there is one.
fn check_pixel_bounds(loaded: &Loaded) -> Result<(), ConfigError> {
    let c = &loaded.config;
    let settings = c.input_settings();
    let bounds = PixelBounds { min: settings.min_pixels, max: settings.max_pixels };
    // A directory without a usable processor is reported where it is loaded.
    let directory = Path::new(&c.model.dir);
    match ProcessorConfig::load(directory) {
        Ok(processor) if !c.model.dir.is_empty() => {
            processor.bounded(bounds).map(|_| ()).map_err(|e| loaded.invalid(vec![e.to_string()]))
        }
        _ => Ok(()),
    }
}

/// Refuses to train a preset with a published shape from scratch, unless it already exists: it does not have the published tokenizer.
fn check_trainable(loaded: &Loaded) -> Result<(), ConfigError> {
    let c = &loaded.config;
    let m = &c.model;
    let published = m.dir.is_empty() && preset(&m.family, &m.preset).is_ok_and(|p| p.vocabulary() > 0);
    if !published || c.initial_model().join("config.json").exists() {
        return Ok(());
    }
    Err(loaded.invalid(vec![format!(
        "model.preset is `{}`: it has the published shape with random weights and a small tokenizer, for benchmarks; set model.dir to the \
         directory of the published model",
        m.preset
    )]))
}

/// Summarises a configuration in one line.
fn summarise(loaded: &Loaded, files: &[PathBuf]) -> String {
    let c = &loaded.config;
    let file = match files {
        [] => "the defaults".to_owned(),
        files => files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(" + "),
    };
    let count = model_size(c).map_or_else(String::new, |n| format!(", {} parameters", format_count(n)));
    let model = match c.model.dir.as_str() {
        "" => format!("{}/{} from scratch", c.model.family, c.model.preset),
        dir => dir.to_owned(),
    };
    let data = match c.data.kind {
        DataKind::Synth => "synthetic",
        DataKind::Voc | DataKind::Jsonl => &c.data.root,
    };
    format!("{file}, {} of {} keys set, model {model}{count}, data {data}", loaded.set_key_count(), entries(c).len())
}

/// Checks that `dir`, the value of the flag `name`, is a model directory.
pub(crate) fn require_model_dir(name: &str, dir: &Path) -> anyhow::Result<()> {
    model_dir_problem(name, dir).map_or(Ok(()), |problem| bail!("{problem}"))
}

/// Checks the inputs of a role that is started separately: the data if it reads them, and its initial model, which an earlier step creates
/// unless it is `model.dir`.
pub(crate) fn check_role_inputs(loaded: &Loaded, model: &Path, reads_data: bool) -> anyhow::Result<()> {
    let c = &loaded.config;
    if model == Path::new(&c.model.dir) {
        if let Some(problem) = model_dir_problem("model.dir", model) {
            return Err(loaded.invalid(vec![problem]).into());
        }
    } else if !model.join("config.json").exists() {
        let (what, command) = if model == c.initial_model() {
            ("the initial model", "`unveil train --prepare` or `unveil prepare sft`")
        } else {
            ("the model of stage 1", "`unveil train --prepare` or `unveil sft`")
        };
        bail!(
            "{} does not exist: {what} is created by {command}; run that first, with the same configuration",
            model.display()
        );
    }
    let records = c.records();
    if reads_data && !records.exists() {
        if c.data.kind == DataKind::Jsonl {
            loaded.check_paths()?;
        }
        bail!(
            "{} does not exist: the data are created by `unveil train --prepare` or `unveil prepare`; run that first, with the same configuration",
            records.display()
        );
    }
    Ok(())
}
