//! `unveil-reward`: the reward commands in a binary without libtorch.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use unveil_cli::{ConfigArgs, RoleArgs, exit, run_role};

/// Scores responses: localization, vision relevance, format.
#[derive(Parser)]
#[command(name = "unveil-reward", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves scores over gRPC.
    Serve(RoleArgs),
    /// Scores a file of responses; one breakdown per line on stdout.
    Score {
        #[command(flatten)]
        config: ConfigArgs,
        /// Responses: records with `index` and `response` or `tokens`.
        #[arg(long)]
        data: PathBuf,
    },
}

fn main() -> ExitCode {
    exit(match Cli::parse().command {
        Command::Serve(args) => serve(&args),
        Command::Score { config, data } => score(&config, &data),
    })
}

fn serve(args: &RoleArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    unveil_service::init_tracing("reward", "info")?;
    run_role(args.supervised, 2, |token| async move { Ok(unveil_reward::run_serve(&config, token).await?) })
}

fn score(config: &ConfigArgs, data: &std::path::Path) -> anyhow::Result<()> {
    let config = config.load()?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    unveil_reward::run_score(&config, data, &mut out)?;
    std::io::Write::flush(&mut out)?;
    Ok(())
}
