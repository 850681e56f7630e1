//! `unveil submit …`: a run on a cluster.

use clap::Subcommand;

mod kubernetes;

#[derive(Subcommand)]
pub enum SubmitCommand {
    /// Installs the Helm chart with a run's configuration, or says how where helm is not installed.
    Kubernetes(kubernetes::KubernetesArgs),
}

/// `unveil submit …`
pub fn run(command: &SubmitCommand) -> anyhow::Result<()> {
    match command {
        SubmitCommand::Kubernetes(args) => kubernetes::run(args),
    }
}
