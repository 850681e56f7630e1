//! Roles: the supervisor and what it starts.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail};
use tch::Device;
use unveil_cli::{ConfigArgs, RoleArgs, Stop, run_role};
use unveil_config::Config;
use unveil_launch::{LaunchError, Options};

/// The device that `run.device` names; an error when it asks for CUDA and there is none.
pub fn device(config: &Config) -> anyhow::Result<Device> {
    let cuda = tch::Cuda::is_available();
    Ok(match config.run.device.as_str() {
        "cpu" => Device::Cpu,
        "auto" => Device::cuda_if_available(),
        name if !cuda => bail!("run.device = \"{name}\", but no CUDA device is available; use auto or cpu"),
        "cuda" => Device::Cuda(0),
        name => Device::Cuda(name.trim_start_matches("cuda:").parse()?),
    })
}

fn sibling(name: &str) -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe().context("cannot find this program's own path")?;
    let path = me.with_file_name(name);
    if !path.exists() {
        bail!("{} is missing: build it with `cargo build --bins`, or copy it beside {}", path.display(), me.display());
    }
    Ok(path)
}

/// `unveil train`
pub fn train(args: &ConfigArgs, resume: Option<String>) -> anyhow::Result<()> {
    let mut args = args.clone();
    args.sets.extend(resume.map(|r| format!("run.resume={r}")));
    let config = args.load()?;
    unveil_service::init_tracing("train", "info")?;
    let (unveil, unveil_reward) = (sibling("unveil")?, sibling("unveil-reward")?);
    let summary = run_role(false, 1, |token| async move {
        let note = |line: &str| eprintln!("{line}");
        let stop = || token.is_cancelled();
        let options = Options { unveil, unveil_reward, stop: &stop, note: &note };
        let summary = tokio::task::block_in_place(|| unveil_launch::train(&config, &options)).map_err(|e| match e {
            LaunchError::Interrupted => anyhow::Error::new(Stop::Interrupted).context(e.to_string()),
            e => e.into(),
        })?;
        let page = unveil_report::write_report(&config.run_dir(), config.eval.report_images)?;
        eprintln!("report: {}", page.display());
        Ok(summary)
    })?;
    println!("{summary}");
    Ok(())
}

/// `unveil reward …`: becomes `unveil-reward …`.
pub fn reward(args: &[String]) -> anyhow::Result<()> {
    let error = Command::new(sibling("unveil-reward")?).args(args).exec();
    Err(error).context("cannot start unveil-reward")
}

/// `unveil sft`
pub fn sft(args: &RoleArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    unveil_service::init_tracing("sft", "warn")?;
    let device = device(&config)?;
    run_role(args.supervised, 1, |token| async move {
        interruptible(unveil_learner::run_sft(config, device, token).await?)
    })
}

/// `unveil learner`
pub fn learner(args: &RoleArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    unveil_service::init_tracing("learner", "warn")?;
    let device = device(&config)?;
    run_role(args.supervised, 2, |token| async move {
        interruptible(unveil_learner::run_learner(config, device, token).await?)
    })
}

/// `unveil rollout`
pub fn rollout(args: &RoleArgs, worker: String) -> anyhow::Result<()> {
    let config = args.config.load()?;
    unveil_service::init_tracing("rollout", "info")?;
    let device = device(&config)?;
    run_role(args.supervised, 2, |token| async move {
        Ok(unveil_rollout::run(config, worker, device, token).await?)
    })
}

fn interruptible(finished: bool) -> anyhow::Result<()> {
    if finished { Ok(()) } else { Err(Stop::Interrupted.into()) }
}
