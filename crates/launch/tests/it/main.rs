//! Tests of the batch script of a Slurm job: its settings, rejected options, and its behaviour with small programs in place of Slurm's
//! commands. The workspace's `tests/` run it on a real Slurm.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]

mod script_behaviour;
mod script_refusals;
mod script_settings;

use std::path::PathBuf;

use clap::Parser;
use unveil_config::{Config, ConfigError};
use unveil_launch::submit::slurm::{SlurmJob, SlurmOptions, SubmitContext};

/// Parses flags as the command line does.
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

/// Returns the job for `flags` and a configuration with `sets`, submitted from `directory`.
pub(crate) fn job(directory: &str, flags: &[&str], sets: &[&str]) -> Result<SlurmJob, ConfigError> {
    let context = SubmitContext {
        directory: directory.into(),
        config: "run.toml".into(),
        sets: sets.iter().map(|s| (*s).to_owned()).collect(),
        program: PathBuf::from("/opt/unveil/bin/unveil"),
    };
    SlurmJob::new(&config(sets), &options(flags), &context)
}

/// Returns the directives and settings of a script.
pub(crate) fn settings(script: &str) -> &str {
    let from = script.split_once("# --- settings ---\n").expect("settings").1;
    from.split_once("# --- end of settings ---").expect("their end").0
}
