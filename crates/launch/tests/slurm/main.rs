//! The batch script of a Slurm job: what is written for which choices, what is refused, and what it does, with Slurm's commands played
//! by small programs. With a real Slurm it runs in the workspace's `tests/`.

mod behaviour;
mod choices;
mod refusals;

use std::path::PathBuf;

use clap::Parser;
use unveil_config::{Config, ConfigError};
use unveil_launch::submit::slurm::{Job, Place, SlurmOptions};

/// Flags as a user writes them.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    options: SlurmOptions,
}

pub(crate) fn options(flags: &[&str]) -> SlurmOptions {
    Flags::parse_from(std::iter::once("submit").chain(flags.iter().copied())).options
}

pub(crate) fn config(sets: &[&str]) -> Config {
    let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    unveil_config::load_from(None, std::iter::empty(), &sets).unwrap_or_else(|e| panic!("{sets:?}: {e}"))
}

/// The job that `flags` make of a configuration with `sets`, submitted from `directory`.
pub(crate) fn job(directory: &str, flags: &[&str], sets: &[&str]) -> Result<Job, ConfigError> {
    let place = Place {
        directory: directory.into(),
        config: "run.toml".into(),
        sets: sets.iter().map(|s| (*s).to_owned()).collect(),
        program: PathBuf::from("/opt/unveil/bin/unveil"),
    };
    Job::new(&config(sets), &options(flags), &place)
}

/// Directives and settings of a script.
pub(crate) fn settings(script: &str) -> &str {
    let from = script.split_once("# --- settings ---\n").expect("settings").1;
    from.split_once("# --- end of settings ---").expect("their end").0
}
