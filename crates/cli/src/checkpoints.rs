//! `unveil checkpoint …` on any path or URL.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, Subcommand};
use unveil_checkpoint::{self as checkpoint, Access, Retention, Store};

#[derive(Debug, Args)]
pub struct Place {
    /// Path or URL, e.g. runs/quickstart or s3://bucket/prefix.
    url: String,
    /// One step instead of the newest (show, export) or all (verify).
    #[arg(long)]
    step: Option<u64>,
}

#[derive(Subcommand)]
pub enum CheckpointCommand {
    /// One JSON line per checkpoint, oldest first.
    List {
        /// Path or URL.
        url: String,
    },
    /// Manifest of one checkpoint, the checkpoints before it in its lineage, and the accounting of stage 2: groups trained per
    /// pass, how many came twice, and how many were lost, dropped (with their records and why), skipped or wholly masked.
    Show(Place),
    /// Reads every object and compares its checksum; exit code 1 when one is damaged.
    Verify(Place),
    /// Writes the Hugging Face model directory of a checkpoint, or its adapters as peft reads them where it has those alone.
    Export {
        #[command(flatten)]
        place: Place,
        /// Directory to make.
        #[arg(long)]
        out: PathBuf,
    },
    /// Deletes old checkpoints.
    Prune {
        /// Path or URL.
        url: String,
        /// Newest ones that stay (the best stays besides).
        #[arg(long, default_value_t = 2)]
        keep: usize,
        /// Those whose step is a multiple of this stay besides (0 = none).
        #[arg(long, default_value_t = 0)]
        keep_every: u64,
        /// Also deletes what aborted saves left.
        #[arg(long)]
        orphans: bool,
    },
}

/// A checkpoint with its lineage and its accounting; the latter is null for stage 1, which has no groups.
async fn with_accounting(store: &Store, shown: checkpoint::Shown) -> anyhow::Result<serde_json::Value> {
    let position = shown.manifest.meta.get("experience").filter(|e| !e.is_null()).cloned();
    let snapshot: Option<unveil_experience::Snapshot> = position.map(serde_json::from_value).transpose()?;
    let before = checkpoint::list(store).await?.into_iter().filter(|c| c.current == shown.info.current);
    let lineage: Vec<_> = before
        .filter(|c| c.seq <= shown.info.seq)
        .map(|c| serde_json::json!({"step": c.step, "term": c.term}))
        .collect();
    let mut out = serde_json::to_value(&shown)?;
    out["lineage"] = lineage.into();
    out["accounting"] = serde_json::to_value(snapshot.map(|s| s.accounting()))?;
    Ok(out)
}

/// Runs one command.
pub fn run(command: &CheckpointCommand) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(act(command))
}

async fn open(url: &str, access: Access) -> anyhow::Result<Store> {
    Ok(Store::open(url, unveil_config::environment(), access).await?)
}

async fn act(command: &CheckpointCommand) -> anyhow::Result<()> {
    match command {
        CheckpointCommand::List { url } => {
            for info in checkpoint::list(&open(url, Access::Read).await?).await? {
                println!("{}", serde_json::to_string(&info)?);
            }
        }
        CheckpointCommand::Show(p) => {
            let store = open(&p.url, Access::Read).await?;
            let shown = checkpoint::show(&store, p.step).await?;
            println!("{}", with_accounting(&store, shown).await?);
        }
        CheckpointCommand::Verify(p) => {
            let checks = checkpoint::verify(&open(&p.url, Access::Read).await?, p.step).await?;
            for check in &checks {
                println!("{}", serde_json::to_string(check)?);
            }
            let bad = checks.iter().filter(|c| !c.ok).count();
            if bad > 0 {
                bail!("{bad} of {} objects are damaged", checks.len());
            }
        }
        CheckpointCommand::Export { place, out } => {
            let store = open(&place.url, Access::Read).await?;
            let shown = checkpoint::show(&store, place.step).await?;
            let whole = shown.manifest.tensors.iter().any(|t| t.part == "model");
            let (part, stem) = if whole { ("model", "model") } else { ("adapter", "adapter_model") };
            let files = checkpoint::export(&store, Some(shown.info.step), out, part, stem).await?;
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
