//! `unveil prepare`: what a role must find on its machine before it starts, where roles share no disk. What is there already stays.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde_json::json;
use unveil_checkpoint::{self as checkpoint, Access, Store};
use unveil_cli::{ConfigArgs, Stop, run_role};
use unveil_config::Config;
use unveil_core::tell;

use crate::before::model_directory;
use crate::models::{ModelCommand, model};

/// How often stage 1's checkpoint is looked for.
const LOOK: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum For {
    /// Data, and the model that stage 1 starts from.
    Sft,
    /// Data, and the model that stage 2 starts from.
    Learner,
    /// The model that stage 2 starts from.
    Rollout,
}

#[derive(Args)]
pub struct PrepareArgs {
    /// The role that starts here next.
    role: For,
    #[command(flatten)]
    config: ConfigArgs,
    /// Seconds to wait for the end of stage 1, whose model comes from its checkpoint.
    #[arg(long, default_value_t = 0)]
    wait: u64,
}

/// `unveil prepare ROLE`
pub fn run(args: &PrepareArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    if args.role != For::Rollout {
        unveil_launch::prepare_data(&config, &|line| _ = tell(line))?;
    }
    let fetched = args.role != For::Sft && config.sft.steps > 0;
    let dir = if fetched { config.stage1_model() } else { config.initial_model() };
    if !dir.join("config.json").exists() {
        if fetched {
            fetch(&config, &dir, Duration::from_secs(args.wait))?;
        } else if config.model.dir.is_empty() {
            let (m, seed) = (&config.model, config.run.seed);
            let (family, preset) = (m.family.clone(), m.preset.clone());
            model(&ModelCommand::Init { family, preset, out: dir, seed, yes: false })?;
            return Ok(());
        } else {
            model_directory("model.dir", &dir)?;
        }
    }
    println!("{}", json!({ "dir": dir }));
    Ok(())
}

/// Stage 1's model of its last step from the object store.
fn fetch(config: &Config, dir: &Path, wait: Duration) -> anyhow::Result<()> {
    let (url, step) = (&config.sft_checkpoint_url(), config.sft.steps);
    let until = Instant::now() + wait;
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    }
    let export = async || -> checkpoint::Result<()> {
        let store = Store::open(url, unveil_config::environment(), Access::Read).await?;
        checkpoint::export(&store, Some(step), dir, "model", "model").await.map(|_| ())
    };
    run_role(false, 1, |token| async move {
        let mut said = String::new();
        loop {
            let Err(e) = export().await else { return Ok(()) };
            if Instant::now() >= until {
                return Err(e).with_context(|| format!("stage 1 has not ended: no model of step {step} in {url}"));
            }
            let why = e.to_string();
            if why != said {
                tell(&format!("waiting for stage 1: {why}"));
                said = why;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = token.cancelled() => return Err(Stop::Interrupted.into()),
            }
        }
    })
}
