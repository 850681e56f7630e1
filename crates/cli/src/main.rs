//! `unveil`: all roles and tools. Parses arguments, calls the crates, prints results on stdout as JSON and logs on stderr.

#![expect(clippy::print_stdout, reason = "results go to stdout as JSON, everything else to stderr")]

mod certificates;
mod checkpoints;
mod dataset;
mod evaluation;
mod models;
mod planning;
mod preflight;
mod prepare;
mod roles;
mod submit;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use unveil_cli::{ConfigArgs, RoleArgs, exit};

/// Trains grounded medical vision-language models by reinforcement learning.
#[derive(Parser)]
#[command(name = "unveil", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a complete training on this machine: data, stage 1, stage 2, evaluation, report.
    Train {
        #[command(flatten)]
        config: ConfigArgs,
        /// auto: newest valid checkpoint; never: start stage 2 afresh; or a step.
        #[arg(long, value_name = "auto|never|STEP")]
        resume: Option<String>,
        /// Stops before stage 2: only data, model and stage 1, for clusters that start the roles themselves.
        #[arg(long)]
        prepare: bool,
        /// Prints the plan of the run and the GPU of each process, and starts nothing.
        #[arg(long, conflicts_with = "prepare")]
        dry_run: bool,
        #[command(flatten)]
        dump: DumpArgs,
    },
    /// Runs stage 1: supervised fine-tuning.
    Sft(RoleArgs),
    /// Runs the learner of stage 2, which also hosts the experience service.
    #[command(args_conflicts_with_subcommands = true)]
    Learner {
        #[command(flatten)]
        role: RoleArgs,
        /// auto: newest valid checkpoint; never: start afresh; or a step.
        #[arg(long, value_name = "auto|never|STEP")]
        resume: Option<String>,
        #[command(flatten)]
        dump: DumpArgs,
        #[command(subcommand)]
        command: Option<LearnerCommand>,
    },
    /// Runs a rollout worker of stage 2.
    Rollout {
        #[command(flatten)]
        role: RoleArgs,
        /// Name of this worker, `NAME#INCARNATION`.
        #[arg(long, default_value = "rollout")]
        worker: String,
    },
    /// Prepares data and model for a role on a separate machine, before it starts.
    Prepare(prepare::PrepareArgs),
    /// Runs the reward service or scores offline (calls `unveil-reward`).
    #[command(disable_help_flag = true)]
    Reward {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Generates responses for records; prints JSON lines.
    Generate(models::GenerateArgs),
    /// Computes teacher-forced log-probabilities of given responses; prints JSON lines.
    Score(models::ScoreArgs),
    /// Computes metrics of a model on held-out records, or of given responses; prints one JSON object.
    Eval(evaluation::EvalArgs),
    /// Creates, exports and inspects model directories.
    #[command(subcommand)]
    Model(models::ModelCommand),
    /// Creates, imports, checks and collects records.
    #[command(subcommand)]
    Data(dataset::DataCommand),
    /// Lists, verifies, exports and prunes checkpoints.
    #[command(subcommand)]
    Checkpoint(checkpoints::CheckpointCommand),
    /// Submits a run to a cluster.
    #[command(subcommand)]
    Submit(submit::SubmitCommand),
    /// Checks and shows configurations.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Computes the memory of each role and the time of a step from shapes alone; prints one JSON object.
    Plan(planning::PlanArgs),
    /// Creates certificates for mutual TLS between the roles.
    #[command(subcommand)]
    Tls(certificates::TlsCommand),
    /// Writes report.html and samples.html of a run directory, or a page with given responses and their rewards.
    Report(evaluation::ReportArgs),
}

/// Arguments for batch dumps.
#[derive(Debug, Clone, clap::Args)]
struct DumpArgs {
    /// Writes every batch to DIR/step-N before its update, for `unveil learner replay`.
    #[arg(long, value_name = "DIR")]
    dump_batch: Option<PathBuf>,
}

#[derive(Subcommand)]
enum LearnerCommand {
    /// Replays one update from a dumped batch: writes replay.json, grads.safetensors and model/ to OUT.
    Replay(models::ReplayArgs),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Loads and checks a configuration and the existence of its files; prints a summary line on stderr.
    Check(preflight::CheckArgs),
    /// Prints the effective configuration as TOML.
    Show {
        #[command(flatten)]
        config: ConfigArgs,
        /// Explains every key in comments, with its type, range, default and origin.
        #[arg(long)]
        explain: bool,
    },
    /// Prints the JSON Schema of configuration files, for editors.
    Schema,
}

fn main() -> ExitCode {
    exit(run(Cli::parse().command))
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Train { mut config, resume, prepare, dry_run, dump } => {
            config.sets.extend(overrides(resume, dump));
            roles::train(&config, prepare, dry_run)
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
        Command::Config(ConfigCommand::Check(args)) => preflight::check(&args),
        Command::Config(ConfigCommand::Show { config, explain }) => {
            let loaded = config.load_with_origins()?;
            print!("{}", if explain { loaded.explain()? } else { loaded.config.to_toml()? });
            Ok(())
        }
        Command::Config(ConfigCommand::Schema) => {
            println!("{:#}", unveil_config::json_schema());
            Ok(())
        }
        Command::Plan(args) => planning::run(&args),
        Command::Tls(command) => certificates::run(&command),
        Command::Report(args) => evaluation::report(&args),
    }
}

/// Converts flags to overrides of configuration keys.
fn overrides(resume: Option<String>, dump: DumpArgs) -> impl Iterator<Item = String> {
    let resume = resume.map(|r| format!("run.resume={r}"));
    resume.into_iter().chain(dump.dump_batch.map(|dir| format!("run.dump_batch={}", dir.display())))
}
