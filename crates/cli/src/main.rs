//! `unveil`: every role and tool. Arguments in, rooms called, results on stdout as JSON, logs on stderr.

mod before;
mod certificates;
mod checkpoints;
mod dataset;
mod evaluation;
mod models;
mod prepare;
mod roles;
mod submit;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use unveil_cli::{ConfigArgs, RoleArgs, exit};

/// Trains grounded medical vision-language models by reinforcement.
#[derive(Parser)]
#[command(name = "unveil", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The whole main job on this machine: data, stage 1, stage 2, evaluation, report.
    Train {
        #[command(flatten)]
        config: ConfigArgs,
        /// auto: newest checkpoint that verifies; never: start stage 2 afresh; or a step.
        #[arg(long, value_name = "auto|never|STEP")]
        resume: Option<String>,
        /// Ends before stage 2: data, model and stage 1 alone, for places that start the roles themselves.
        #[arg(long)]
        prepare: bool,
        #[command(flatten)]
        dump: DumpArgs,
    },
    /// Stage 1: instruction tuning.
    Sft(RoleArgs),
    /// Stage 2: the learner, which also hosts the experience service.
    #[command(args_conflicts_with_subcommands = true)]
    Learner {
        #[command(flatten)]
        role: RoleArgs,
        /// auto: newest checkpoint that verifies; never: start afresh; or a step.
        #[arg(long, value_name = "auto|never|STEP")]
        resume: Option<String>,
        #[command(flatten)]
        dump: DumpArgs,
        #[command(subcommand)]
        command: Option<LearnerCommand>,
    },
    /// Stage 2: a rollout worker.
    Rollout {
        #[command(flatten)]
        role: RoleArgs,
        /// Name of this worker, `NAME#INCARNATION`.
        #[arg(long, default_value = "rollout")]
        worker: String,
    },
    /// Data and model for a role on a machine of its own, before it starts.
    Prepare(prepare::PrepareArgs),
    /// The reward service and offline scoring (handed to `unveil-reward`).
    #[command(disable_help_flag = true)]
    Reward {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Generates responses for records; JSON lines.
    Generate(models::GenerateArgs),
    /// Teacher-forced log-probabilities of given responses; JSON lines.
    Score(models::ScoreArgs),
    /// Metrics of a model on held-out records, or of given responses; one JSON object.
    Eval(evaluation::EvalArgs),
    /// Model directories.
    #[command(subcommand)]
    Model(models::ModelCommand),
    /// Records and images.
    #[command(subcommand)]
    Data(dataset::DataCommand),
    /// Checkpoints at a path or URL.
    #[command(subcommand)]
    Checkpoint(checkpoints::CheckpointCommand),
    /// Hands a run to a cluster.
    #[command(subcommand)]
    Submit(submit::SubmitCommand),
    /// Configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Certificates for mutual TLS between the roles.
    #[command(subcommand)]
    Tls(certificates::TlsCommand),
    /// Writes report.html and samples.html of a run directory, or a page of given responses and their rewards.
    Report(evaluation::ReportArgs),
}

/// Keeps the batches of a run.
#[derive(Debug, Clone, clap::Args)]
struct DumpArgs {
    /// Writes every batch to DIR/step-N before its update, for `unveil learner replay`.
    #[arg(long, value_name = "DIR")]
    dump_batch: Option<PathBuf>,
}

#[derive(Subcommand)]
enum LearnerCommand {
    /// One update from a dumped batch: replay.json, grads.safetensors and model/ in OUT.
    Replay(models::ReplayArgs),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Loads and checks, and looks whether the files that are named are there; one line on stderr says what was found.
    Check(before::CheckArgs),
    /// Prints the effective configuration as TOML.
    Show(ConfigArgs),
}

fn main() -> ExitCode {
    exit(run(Cli::parse().command))
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Train { mut config, resume, prepare, dump } => {
            config.sets.extend(overrides(resume, dump));
            roles::train(&config, prepare)
        }
        Command::Sft(role) => roles::sft(&role),
        Command::Learner { command: Some(LearnerCommand::Replay(args)), .. } => models::replay(&args),
        Command::Learner { mut role, resume, dump, command: None } => {
            role.config.sets.extend(overrides(resume, dump));
            roles::learner(&role)
        }
        Command::Rollout { role, worker } => roles::rollout(&role, worker),
        Command::Prepare(args) => prepare::run(&args),
        Command::Reward { args } => roles::reward(&args),
        Command::Generate(args) => models::generate(&args),
        Command::Score(args) => models::score(&args),
        Command::Eval(args) => evaluation::eval(&args),
        Command::Model(command) => models::model(&command),
        Command::Data(command) => dataset::run(&command),
        Command::Checkpoint(command) => checkpoints::run(&command),
        Command::Submit(command) => submit::run(&command),
        Command::Config(ConfigCommand::Check(args)) => before::check(&args),
        Command::Config(ConfigCommand::Show(args)) => {
            print!("{}", args.load()?.to_toml()?);
            Ok(())
        }
        Command::Tls(command) => certificates::run(&command),
        Command::Report(args) => evaluation::report(&args),
    }
}

/// Flags that stand for configuration keys.
fn overrides(resume: Option<String>, dump: DumpArgs) -> impl Iterator<Item = String> {
    let resume = resume.map(|r| format!("run.resume={r}"));
    resume.into_iter().chain(dump.dump_batch.map(|dir| format!("run.dump_batch={}", dir.display())))
}
