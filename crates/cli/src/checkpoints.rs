//! `unveil checkpoint …` for checkpoints at a path or URL.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, Subcommand};
use unveil_checkpoint::{self as checkpoint, Access, Retention, Store};

#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    /// Path or URL, e.g. runs/quickstart or s3://bucket/prefix.
    url: String,
    /// A single step instead of the newest (show, export) or all (verify).
    #[arg(long)]
    step: Option<u64>,
}

#[derive(Subcommand)]
pub(crate) enum CheckpointCommand {
    /// Prints one JSON line per checkpoint, oldest first.
    List {
        /// Path or URL.
        url: String,
    },
    /// Prints the manifest of a checkpoint, its lineage, and the accounting of stage 2: groups trained per pass, and groups trained twice,
    /// lost, dropped (with records and reasons), skipped or wholly masked.
    Show(CheckpointArgs),
    /// Reads every object and compares its checksum; exits with 1 if one is damaged.
    Verify(CheckpointArgs),
    /// Writes the Hugging Face model directory of a checkpoint, or its adapters in peft format if it has only adapters.
    Export {
        #[command(flatten)]
        checkpoint: CheckpointArgs,
        /// Directory to create.
        #[arg(long)]
        out: PathBuf,
    },
    /// Deletes old checkpoints.
    Prune {
        /// Path or URL.
        url: String,
        /// Number of newest checkpoints to keep (the best one is kept in addition).
        #[arg(long, default_value_t = 2)]
        keep: usize,
        /// Also keeps checkpoints whose step is a multiple of this (0: none).
        #[arg(long, default_value_t = 0)]
        keep_every: u64,
        /// Also deletes the remains of aborted saves.
        #[arg(long)]
        orphans: bool,
    },
}

/// Returns a checkpoint with its lineage and accounting; the latter is null for stage 1, which has no groups.
async fn with_accounting(store: &Store, shown: checkpoint::CheckpointDetails) -> anyhow::Result<serde_json::Value> {
    let experience = shown.manifest.meta.get("experience").filter(|e| !e.is_null()).cloned();
    let snapshot: Option<unveil_experience::ExperienceSnapshot> = experience.map(serde_json::from_value).transpose()?;
    let checkpoints = checkpoint::list(store).await?.into_iter().filter(|c| c.current == shown.info.current);
    let lineage: Vec<_> = checkpoints
        .filter(|c| c.seq <= shown.info.seq)
        .map(|c| serde_json::json!({"step": c.step, "term": c.term}))
        .collect();
    let mut out = serde_json::to_value(&shown)?;
    out["lineage"] = lineage.into();
    out["accounting"] = serde_json::to_value(snapshot.map(|s| s.accounting()))?;
    Ok(out)
}

/// Runs `unveil checkpoint …`.
pub(crate) fn run(command: &CheckpointCommand) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(execute(command))
}

async fn open(url: &str, access: Access) -> anyhow::Result<Store> {
    Ok(Store::open(url, unveil_config::environment(), access).await?)
}

async fn execute(command: &CheckpointCommand) -> anyhow::Result<()> {
    match command {
        CheckpointCommand::List { url } => {
            for info in checkpoint::list(&open(url, Access::Read).await?).await? {
                println!("{}", serde_json::to_string(&info)?);
            }
        }
        CheckpointCommand::Show(args) => {
            let store = open(&args.url, Access::Read).await?;
            let shown = checkpoint::show(&store, args.step).await?;
            println!("{}", with_accounting(&store, shown).await?);
        }
        CheckpointCommand::Verify(args) => {
            let checks = checkpoint::verify(&open(&args.url, Access::Read).await?, args.step).await?;
            for check in &checks {
                println!("{}", serde_json::to_string(check)?);
            }
            let damaged = checks.iter().filter(|c| !c.ok).count();
            if damaged > 0 {
                bail!("{damaged} of {} objects are damaged", checks.len());
            }
        }
        CheckpointCommand::Export { checkpoint: args, out } => {
            let store = open(&args.url, Access::Read).await?;
            let shown = checkpoint::show(&store, args.step).await?;
            let has_model = shown.manifest.tensors.iter().any(|t| t.artifact == "model");
            let (artifact, stem) = if has_model { ("model", "model") } else { ("adapter", "adapter_model") };
            let files = checkpoint::export(&store, Some(shown.info.step), out, artifact, stem).await?;
            println!("{}", serde_json::json!({ "out": out, "files": files }));
        }
        CheckpointCommand::Prune { url, keep, keep_every, orphans } => {
            let store = open(url, Access::Write).await?;
            let retention = Retention { keep: *keep, keep_best: true, keep_every: *keep_every };
            let pruned = checkpoint::prune(&store, retention, *orphans).await?;
            println!("{}", serde_json::to_string(&pruned)?);
        }
    }
    Ok(())
}
