//! What is looked at before work begins: whether the model is known and there, and whether the learning rates fit its size.

use std::path::Path;

use anyhow::bail;
use clap::Args;
use unveil_cli::ConfigArgs;
use unveil_config::schema::{DataKind, Model};
use unveil_config::{Config, ConfigError, Loaded, Stage, entries, model_fault, parameters, shown_count};
use unveil_core::tell;
use unveil_model::{Family, preset, presets};

#[derive(Args)]
pub struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Does not look whether the model, the data and other files that are named are there: for another machine's configuration.
    #[arg(long)]
    offline: bool,
}

/// `unveil config check`
pub fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let loaded = args.config.loaded()?;
    known(&loaded)?;
    if !args.offline {
        loaded.places()?;
    }
    rates(&loaded, &Stage::ALL)?;
    trainable(&loaded)?;
    tell(&format!("ok: {}", described(&loaded, args.config.config.as_deref())));
    Ok(())
}

/// Everything that the stages need: a family that exists, files that are there, rates that fit.
pub fn all(loaded: &Loaded, stages: &[Stage]) -> Result<(), ConfigError> {
    known(loaded)?;
    loaded.places()?;
    rates(loaded, stages)?;
    trainable(loaded)
}

/// Refuses learning rates that do not fit the model, as far as its size can be known here.
pub fn rates(loaded: &Loaded, stages: &[Stage]) -> Result<(), ConfigError> {
    size(&loaded.config).map_or(Ok(()), |parameters| loaded.rates(parameters, stages))
}

/// Parameters of the model that training starts from.
fn size(config: &Config) -> Option<u64> {
    let m = &config.model;
    match m.dir.as_str() {
        "" => preset(&m.family, &m.preset).ok().map(|p| p.size(0).0),
        dir => parameters(Path::new(dir)),
    }
}

/// Refuses families and presets that do not exist.
fn known(loaded: &Loaded) -> Result<(), ConfigError> {
    let Model { dir, family, preset: name, .. } = &loaded.config.model;
    if !dir.is_empty() || preset(family, name).is_ok() {
        return Ok(());
    }
    let fault = match presets(family) {
        none if none.is_empty() => {
            let families = Family::ALL.map(Family::name).join(" or ");
            format!("model.family is `{family}`: use {families}, or name a model directory in model.dir")
        }
        there => format!("model.preset is `{name}`: {family} has {}", there.join(", ")),
    };
    Err(loaded.refuse(vec![fault]))
}

/// Refuses to train a published shape from scratch unless somebody made it already: its tokenizer is not the published one.
fn trainable(loaded: &Loaded) -> Result<(), ConfigError> {
    let c = &loaded.config;
    let m = &c.model;
    let published = m.dir.is_empty() && preset(&m.family, &m.preset).is_ok_and(|p| p.vocabulary() > 0);
    if !published || c.initial_model().join("config.json").exists() {
        return Ok(());
    }
    Err(loaded.refuse(vec![format!(
        "model.preset is `{}`: it is the published shape with fresh weights and a small tokenizer, for measurements; name the directory of \
         the published model in model.dir",
        m.preset
    )]))
}

fn described(loaded: &Loaded, file: Option<&Path>) -> String {
    let c = &loaded.config;
    let file = file.map_or_else(|| "the defaults".to_owned(), |f| f.display().to_string());
    let count = size(c).map_or_else(String::new, |n| format!(", {} parameters", shown_count(n)));
    let model = match c.model.dir.as_str() {
        "" => format!("{}/{} from scratch", c.model.family, c.model.preset),
        dir => dir.to_owned(),
    };
    let data = match c.data.kind {
        DataKind::Synth => "synthetic",
        DataKind::Voc | DataKind::Jsonl => &c.data.root,
    };
    format!("{file}, {} of {} keys set, model {model}{count}, data {data}", loaded.named(), entries(c).len())
}

/// Refuses a directory that a flag names and that is no model directory. `name` is that of the flag.
pub fn model_directory(name: &str, dir: &Path) -> anyhow::Result<()> {
    model_fault(name, dir).map_or(Ok(()), |fault| bail!("{fault}"))
}

/// What a role that is started alone finds on its machine: the data where it reads them, and the model that it starts from, which an
/// earlier step makes unless `model.dir` names it.
pub fn role(loaded: &Loaded, model: &Path, reads_data: bool) -> anyhow::Result<()> {
    let c = &loaded.config;
    if model == Path::new(&c.model.dir) {
        if let Some(fault) = model_fault("model.dir", model) {
            return Err(loaded.refuse(vec![fault]).into());
        }
    } else if !model.join("config.json").exists() {
        let (what, first) = if model == c.initial_model() {
            ("the model to start from", "`unveil train --prepare` or `unveil prepare sft`")
        } else {
            ("the model of stage 1", "`unveil train --prepare` or `unveil sft`")
        };
        bail!(
            "{} is not there: {what} is made by {first}; run that first, with the same configuration",
            model.display()
        );
    }
    let records = c.records();
    if reads_data && !records.exists() {
        if c.data.kind == DataKind::Jsonl {
            loaded.places()?;
        }
        bail!(
            "{} is not there: the data are made by `unveil train --prepare` or `unveil prepare`; run that first, with the same configuration",
            records.display()
        );
    }
    Ok(())
}
