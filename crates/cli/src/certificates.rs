//! `unveil tls …`: certificates for the roles of a run.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use unveil_service::issue::{Existing, IssueOptions, issue};

#[derive(Subcommand)]
pub enum TlsCommand {
    /// Makes an authority and a certificate and key per role; `tls.dir` of a configuration names the directory. One JSON object.
    Init(InitArgs),
}

#[derive(Args)]
pub struct InitArgs {
    /// Directory to make: ca.crt and ca.key, and a folder per role with tls.crt, tls.key and ca.crt.
    #[arg(long)]
    out: PathBuf,
    /// Names and addresses by which learner and reward service are reached; loopback and the roles' names are always among them.
    #[arg(long, value_delimiter = ',', value_name = "HOST,…")]
    hosts: Vec<String>,
    /// Days that the certificates of the roles last.
    #[arg(long, default_value_t = 365)]
    days: u32,
    /// Makes new certificates and keys of the roles by the authority that is there.
    #[arg(long, conflicts_with = "force")]
    renew: bool,
    /// Replaces what is there, the authority too.
    #[arg(long)]
    force: bool,
}

/// Runs one command.
pub fn run(command: &TlsCommand) -> anyhow::Result<()> {
    let TlsCommand::Init(args) = command;
    let existing = match (args.renew, args.force) {
        (true, _) => Existing::Renew,
        (_, true) => Existing::Replace,
        _ => Existing::Refuse,
    };
    let made = issue(&args.out, &IssueOptions { hosts: args.hosts.clone(), days: args.days, existing })?;
    println!("{}", serde_json::to_string(&made)?);
    Ok(())
}
