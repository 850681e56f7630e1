//! `unveil-reward`: the reward commands in a binary without libtorch.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::{Parser, Subcommand};
use unveil_cli::{ConfigArgs, RoleArgs, exit, run_role, telemetry};
use unveil_service::{READY, check_health};

/// How long `health` waits for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// Scores responses: localization, vision relevance, format, relevance, and what users add.
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
    /// Asks a role's health listener; exit code 1 when the answer is no or nobody answers.
    Health {
        #[command(flatten)]
        config: ConfigArgs,
        /// Its address, host:port; `health.listen` of the configuration without it.
        #[arg(long)]
        address: Option<String>,
        /// Alive is not enough: it must be ready.
        #[arg(long)]
        ready: bool,
    },
    /// Chooses the attention heads that look at lesions; writes the file that reward.vision_relevance.heads_file names.
    Calibrate {
        /// What `unveil score --heads` writes: JSON lines {"id","image_size","boxes","grid","heads":[{"layer","head","row"}]}.
        #[arg(long)]
        data: PathBuf,
        /// Heads to choose at most.
        #[arg(long, default_value_t = 4)]
        top: usize,
        /// Where the choice goes.
        #[arg(long)]
        out: PathBuf,
    },
}

fn main() -> ExitCode {
    exit(match Cli::parse().command {
        Command::Serve(args) => serve(&args),
        Command::Score { config, data } => score(&config, &data),
        Command::Health { config, address, ready } => health(&config, address, ready),
        Command::Calibrate { data, top, out } => calibrate(&data, top, &out),
    })
}

fn serve(args: &RoleArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let _tracing = telemetry(&config, "reward", "info")?;
    let threads = std::thread::available_parallelism().map_or(2, usize::from).max(2);
    run_role(args.supervised, threads, |token| async move { Ok(unveil_reward::run_serve(&config, token).await?) })
}

fn health(config: &ConfigArgs, address: Option<String>, ready: bool) -> anyhow::Result<()> {
    let address = match address {
        Some(address) => address,
        None => config.load()?.health.listen,
    };
    if address.is_empty() {
        bail!("there is no listener to ask: give --address, or set health.listen");
    }
    let service = if ready { READY } else { "" };
    let asked = run_role(false, 1, |_| async { Ok(check_health(&address, service, ANSWER_WITHIN).await?) });
    if !asked? {
        bail!("{address} is not {}", if ready { "ready" } else { "alive" });
    }
    Ok(())
}

fn calibrate(data: &std::path::Path, top: usize, out: &std::path::Path) -> anyhow::Result<()> {
    let choice = unveil_reward::calibrate::calibrate(data, top)?;
    choice.save(out)?;
    println!("{}", serde_json::to_string(&choice)?);
    Ok(())
}

fn score(config: &ConfigArgs, data: &std::path::Path) -> anyhow::Result<()> {
    let config = config.load()?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    unveil_reward::run_score(&config, data, &mut out)?;
    std::io::Write::flush(&mut out)?;
    Ok(())
}
