//! `unveil tls …`: certificates for the roles of a run.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use unveil_service::issue::{Existing, IssueOptions, issue};

#[derive(Subcommand)]
pub(crate) enum TlsCommand {
    /// Creates an authority, and a certificate and key per role; set `tls.dir` to the directory. Prints one JSON object.
    Init(InitArgs),
}

#[derive(Args)]
pub(crate) struct InitArgs {
    /// Directory to create: ca.crt and ca.key, and a subdirectory per role with tls.crt, tls.key and ca.crt.
    #[arg(long)]
    out: PathBuf,
    /// Additional names and addresses of learner and reward service; loopback and the role names are always included.
    #[arg(long, value_delimiter = ',', value_name = "HOST,…")]
    hosts: Vec<String>,
    /// Validity of the role certificates in days.
    #[arg(long, default_value_t = 365)]
    days: u32,
    /// Renews certificates and keys of the roles with the existing authority.
    #[arg(long, conflicts_with = "force")]
    renew: bool,
    /// Replaces existing files, including the authority.
    #[arg(long)]
    force: bool,
}

/// Runs `unveil tls …`.
pub(crate) fn run(command: &TlsCommand) -> anyhow::Result<()> {
    let TlsCommand::Init(args) = command;
    let existing = match (args.renew, args.force) {
        (true, _) => Existing::Renew,
        (_, true) => Existing::Replace,
        _ => Existing::Refuse,
    };
    let issued = issue(&args.out, &IssueOptions { hosts: args.hosts.clone(), days: args.days, existing })?;
    println!("{}", serde_json::to_string(&issued)?);
    Ok(())
}
