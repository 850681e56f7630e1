//! `unveil submit …`: runs on a cluster.

use clap::Subcommand;

mod kubernetes;
mod slurm;

#[derive(Subcommand)]
pub(crate) enum SubmitCommand {
    /// Installs the Helm chart with the configuration of a run, or prints the command if helm is not installed.
    Kubernetes(kubernetes::KubernetesArgs),
    /// Submits one Slurm job, which saves and restarts automatically when it is preempted.
    Slurm(slurm::SlurmArgs),
}

/// Runs `unveil submit …`.
pub(crate) fn run(command: &SubmitCommand) -> anyhow::Result<()> {
    match command {
        SubmitCommand::Kubernetes(args) => kubernetes::run(args),
        SubmitCommand::Slurm(args) => slurm::run(args),
    }
}
