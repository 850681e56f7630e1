//! `unveil submit kubernetes`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use unveil_cli::ConfigArgs;
use unveil_config::{ConfigError, Stage};
use unveil_launch::submit::kubernetes::{KubernetesError, Release, shell, values};

use crate::before::rates;

#[derive(Args)]
pub struct KubernetesArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Values of your own, over those made of the configuration; may be repeated, the last one wins.
    #[arg(long, value_name = "FILE")]
    values: Vec<PathBuf>,
    /// Namespace; that of the current context without it.
    #[arg(long)]
    namespace: Option<String>,
    /// Name of the release.
    #[arg(long, default_value = "unveil")]
    release: String,
    /// Chart: a directory or a reference that helm understands.
    #[arg(long, default_value = "cluster/helm/unveil")]
    chart: String,
    /// Where the values go; RELEASE.values.yaml without it.
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    write: Option<PathBuf>,
    /// Writes and installs nothing: prints the values, then the manifests where helm is installed.
    #[arg(long)]
    dry_run: bool,
}

/// Installs the chart, or says how.
pub fn run(args: &KubernetesArgs) -> anyhow::Result<()> {
    let loaded = args.config.loaded()?;
    rates(&loaded, &Stage::ALL)?;
    let text = values(&loaded.config).map_err(|e| match e {
        KubernetesError::Config(faults) => ConfigError::Invalid(faults).into(),
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
            None => eprintln!("helm is not installed: these are the values alone, without the manifests"),
        }
        return Ok(());
    }
    let file = args.write.clone().unwrap_or_else(|| format!("{}.values.yaml", args.release).into());
    let installed = release.install(&text, &file)?;
    let command = shell(&release.helm, &release.install_args(&file));
    if !installed {
        eprintln!("helm is not installed: nothing was started. Where it is, run\n  {command}");
    }
    println!("{}", json!({ "release": args.release, "installed": installed, "values": file, "command": command }));
    Ok(())
}
