//! `unveil prepare`: creates the inputs of a role on its machine before it starts, for roles without a shared disk. Existing files are kept.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde_json::json;
use unveil_checkpoint::{self as checkpoint, Access, Store};
use unveil_cli::{ConfigArgs, Stop, run_role};
use unveil_config::{Config, SFT_PREFIXES};
use unveil_core::stderr_line;

use crate::models::{ModelCommand, model};
use crate::preflight::require_model_dir;

/// Interval of checks for the checkpoint of stage 1.
const POLL_INTERVAL: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PreparedRole {
    /// Data, and the initial model of stage 1.
    Sft,
    /// Data, and the initial model of stage 2.
    Learner,
    /// The initial model of stage 2.
    Rollout,
}

#[derive(Args)]
pub(crate) struct PrepareArgs {
    /// Role that will start on this machine.
    role: PreparedRole,
    #[command(flatten)]
    config: ConfigArgs,
    /// Seconds to wait for the end of stage 1, whose model is read from its checkpoint.
    #[arg(long, default_value_t = 0)]
    wait: u64,
}

/// Runs `unveil prepare ROLE`.
pub(crate) fn run(args: &PrepareArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    if args.role != PreparedRole::Rollout {
        unveil_launch::prepare_data(&config, &|line| _ = stderr_line(line))?;
    }
    let from_stage1 = args.role != PreparedRole::Sft && config.sft.steps > 0;
    let dir = if from_stage1 { config.stage1_model() } else { config.initial_model() };
    if !dir.join("config.json").exists() {
        if from_stage1 {
            fetch_stage1_model(&config, &dir, Duration::from_secs(args.wait))?;
        } else if config.model.dir.is_empty() {
            let seed = config.run.seed;
            let family = config.model.family.clone();
            let preset = config.model.preset.clone();
            model(&ModelCommand::Init { family, preset, out: dir, seed, yes: false })?;
            return Ok(());
        } else {
            require_model_dir("model.dir", &dir)?;
        }
    }
    println!("{}", json!({ "dir": dir }));
    Ok(())
}

/// Fetches the model of the last step of stage 1 from its checkpoint.
fn fetch_stage1_model(config: &Config, dir: &Path, wait: Duration) -> anyhow::Result<()> {
    let phases = config.sft_phases();
    let prefix = SFT_PREFIXES.get(phases.len().saturating_sub(1)).copied().unwrap_or_default();
    let url = &config.checkpoint_url(prefix);
    let step = config.sft.steps;
    // A checkpoint of adapters does not contain the model below them.
    let adapted = phases.last().is_some_and(|phase| phase.lora.rank > 0);
    if adapted && phases.len() > 1 {
        anyhow::bail!(
            "the last phase of stage 1 trains adapters of the model of the phase before, which is in no checkpoint: share {} with the machine of \
             stage 1",
            config.run_dir().display()
        );
    }
    let adapter = &config.stage1_adapter();
    let deadline = Instant::now() + wait;
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    }
    let export = async || -> checkpoint::Result<()> {
        let store = Store::open(url, unveil_config::environment(), Access::Read).await?;
        match adapted {
            false => checkpoint::export(&store, Some(step), dir, "model", "model").await.map(|_| ()),
            true if adapter.exists() => Ok(()),
            true => checkpoint::export(&store, Some(step), adapter, "adapter", "adapter_model").await.map(|_| ()),
        }
    };
    let merge = || -> anyhow::Result<()> {
        if adapted {
            unveil_model::export(&config.initial_model(), dir, None, Some(adapter))?;
        }
        Ok(())
    };
    run_role(false, 1, |token| async move {
        let mut last_reason = String::new();
        loop {
            let Err(e) = export().await else { return merge() };
            if Instant::now() >= deadline {
                return Err(e).with_context(|| format!("stage 1 has not ended: no model of step {step} in {url}"));
            }
            let reason = e.to_string();
            if reason != last_reason {
                stderr_line(&format!("waiting for stage 1: {reason}"));
                last_reason = reason;
            }
            tokio::select! {
                () = tokio::time::sleep(POLL_INTERVAL) => {}
                () = token.cancelled() => return Err(Stop::Interrupted.into()),
            }
        }
    })
}
