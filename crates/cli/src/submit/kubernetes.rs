//! `unveil submit kubernetes`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use unveil_cli::ConfigArgs;
use unveil_config::{ConfigError, TrainingStage};
use unveil_launch::submit::kubernetes::{KubernetesError, Release, helm_values, shell_command};

use crate::preflight::check_learning_rates;

#[derive(Args)]
pub(crate) struct KubernetesArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Additional values that override those made from the configuration; repeatable, the last one wins.
    #[arg(long, value_name = "FILE")]
    values: Vec<PathBuf>,
    /// Namespace; defaults to the namespace of the current context.
    #[arg(long)]
    namespace: Option<String>,
    /// Name of the release.
    #[arg(long, default_value = "unveil")]
    release: String,
    /// Chart: a directory or a reference for helm.
    #[arg(long, default_value = "cluster/helm/unveil")]
    chart: String,
    /// File for the values; defaults to RELEASE.values.yaml.
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    write: Option<PathBuf>,
    /// Writes and installs nothing: prints the values, and the manifests if helm is installed.
    #[arg(long)]
    dry_run: bool,
}

/// Runs `unveil submit kubernetes`.
pub(super) fn run(args: &KubernetesArgs) -> anyhow::Result<()> {
    let loaded = args.config.load_with_origins()?;
    check_learning_rates(&loaded, &TrainingStage::ALL)?;
    let text = helm_values(&loaded.config).map_err(|e| match e {
        KubernetesError::Config(problems) => ConfigError::Invalid(problems).into(),
        e => anyhow::Error::from(e),
    })?;
    let release = Release {
        name: args.release.clone(),
        namespace: args.namespace.clone(),
        chart: args.chart.clone(),
        values: args.values.clone(),
        helm: "helm".into(),
    };
    if args.dry_run {
        print!("{text}");
        match release.manifests(&text)? {
            Some(manifests) => print!("---\n{}", manifests.trim_start_matches("---\n")),
            None => eprintln!("helm is not installed: printed the values only, without the manifests"),
        }
        return Ok(());
    }
    let file = args.write.clone().unwrap_or_else(|| format!("{}.values.yaml", args.release).into());
    let command = shell_command(&release.helm, &release.install_args(&file))?;
    let installed = release.install(&text, &file)?;
    if !installed {
        eprintln!("helm is not installed: nothing was started. On a machine with helm, run\n  {command}");
    }
    println!("{}", json!({ "release": args.release, "installed": installed, "values": file, "command": command }));
    Ok(())
}
