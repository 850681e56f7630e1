//! `unveil submit slurm`: a run as one Slurm job.

use anyhow::Context;
use clap::Args;
use unveil_cli::ConfigArgs;
use unveil_config::{ConfigError, TrainingStage};
use unveil_launch::submit::slurm::{SlurmJob, SlurmOptions, SubmitContext};

use crate::preflight::check_learning_rates;

#[derive(Args)]
pub(crate) struct SlurmArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    options: Box<SlurmOptions>,
    /// Only prints the batch script.
    #[arg(long)]
    dry_run: bool,
}

/// Runs `unveil submit slurm`.
pub(super) fn run(args: &SlurmArgs) -> anyhow::Result<()> {
    let loaded = args.config.load_with_origins()?;
    check_learning_rates(&loaded, &TrainingStage::ALL)?;
    let config = loaded.config;
    let config_file = match args.config.config.as_slice() {
        [file] => file.clone(),
        [] => return Err(ConfigError::Invalid(vec!["submit needs --config FILE".into()]).into()),
        _ => {
            let message = "submit slurm takes one --config FILE: combine files with `base = [\"other.toml\"]` in it";
            return Err(ConfigError::Invalid(vec![message.into()]).into());
        }
    };
    let context = SubmitContext {
        directory: std::env::current_dir().context("cannot determine the working directory")?,
        config: config_file,
        sets: args.config.sets.clone(),
        program: std::env::current_exe().context("cannot determine the path of this program")?,
    };
    let job = SlurmJob::new(&config, &args.options, &context)?;
    if args.dry_run {
        print!("{}", job.script);
        return Ok(());
    }
    let id = job.submit()?;
    println!("{}", serde_json::json!({"job": id, "script": job.path, "logs": job.logs}));
    Ok(())
}
