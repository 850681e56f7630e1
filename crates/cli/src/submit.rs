//! `unveil submit …`: a run on a cluster.

use clap::Subcommand;

mod kubernetes;
mod slurm;

#[derive(Subcommand)]
pub enum SubmitCommand {
    /// Installs the Helm chart with a run's configuration, or says how where helm is not installed.
    Kubernetes(kubernetes::KubernetesArgs),
    /// As one Slurm job, which saves and starts again by itself when it is preempted.
    Slurm(slurm::SlurmArgs),
}

/// `unveil submit …`
pub fn run(command: &SubmitCommand) -> anyhow::Result<()> {
    match command {
        SubmitCommand::Kubernetes(args) => kubernetes::run(args),
        SubmitCommand::Slurm(args) => slurm::run(args),
    }
}
