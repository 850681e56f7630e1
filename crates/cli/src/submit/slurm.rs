//! `unveil submit slurm`: a run as one Slurm job.

use anyhow::Context;
use clap::Args;
use unveil_cli::ConfigArgs;
use unveil_config::{ConfigError, Stage};
use unveil_launch::submit::slurm::{Job, Place, SlurmOptions};

use crate::before::rates;

#[derive(Args)]
pub struct SlurmArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    options: Box<SlurmOptions>,
    /// Prints the batch script and does nothing else.
    #[arg(long)]
    dry_run: bool,
}

/// `unveil submit slurm`
pub fn run(args: &SlurmArgs) -> anyhow::Result<()> {
    let loaded = args.config.loaded()?;
    rates(&loaded, &Stage::ALL)?;
    let config = loaded.config;
    let named = args.config.config.clone();
    let place = Place {
        directory: std::env::current_dir().context("cannot find the working directory")?,
        config: named.ok_or_else(|| ConfigError::Invalid(vec!["submit needs --config FILE".into()]))?,
        sets: args.config.sets.clone(),
        program: std::env::current_exe().context("cannot find this program's own path")?,
    };
    let job = Job::new(&config, &args.options, &place)?;
    if args.dry_run {
        print!("{}", job.script);
        return Ok(());
    }
    let number = job.submit()?;
    println!("{}", serde_json::json!({"job": number, "script": job.path, "logs": job.logs}));
    Ok(())
}
