//! `unveil-reward`: the reward commands in a binary without libtorch.

#![expect(clippy::print_stdout, reason = "results go to stdout as JSON, everything else to stderr")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::{Parser, Subcommand};
use unveil_cli::{ConfigArgs, RoleArgs, exit, init_telemetry, run_role};
use unveil_service::{READY, check_health};

/// Timeout of `health`.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(3);

/// Scores responses: localization, vision relevance, format, relevance, and custom components.
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
    /// Scores a file of responses; prints one breakdown per line.
    Score {
        #[command(flatten)]
        config: ConfigArgs,
        /// Responses: records with `index` and `response` or `tokens`.
        #[arg(long)]
        data: PathBuf,
    },
    /// Queries the health endpoint of a role; exits with 1 if it is unhealthy or does not answer.
    Health {
        #[command(flatten)]
        config: ConfigArgs,
        /// Address of the endpoint, host:port; defaults to `health.listen` of the configuration.
        #[arg(long)]
        address: Option<String>,
        /// Requires the role to be ready, not only alive.
        #[arg(long)]
        ready: bool,
    },
    /// Chooses the attention heads that attend to lesions; writes a file for reward.vision_relevance.heads_file.
    Calibrate {
        /// Output of `unveil score --heads`: JSON lines {"id","image_size","boxes","grid","heads":[{"layer","head","row"}]}.
        #[arg(long)]
        data: PathBuf,
        /// Maximum number of heads to choose.
        #[arg(long, default_value_t = 4)]
        top: usize,
        /// File to write.
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
    let _tracing = init_telemetry(&config, "reward", "info")?;
    let threads = std::thread::available_parallelism().map_or(2, usize::from).max(2);
    run_role(args.supervised, threads, |token| async move { Ok(unveil_reward::run_serve(&config, token).await?) })
}

fn health(config: &ConfigArgs, address: Option<String>, ready: bool) -> anyhow::Result<()> {
    let address = match address {
        Some(address) => address,
        None => config.load()?.health.listen,
    };
    if address.is_empty() {
        bail!("no health endpoint: give --address, or set health.listen");
    }
    let service = if ready { READY } else { "" };
    let healthy = run_role(false, 1, |_| async { Ok(check_health(&address, service, HEALTH_TIMEOUT).await?) });
    if !healthy? {
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
