//! A run as one Slurm job: options become settings of the batch script `cluster/slurm/unveil.sbatch`, which does the rest.
//!
//! Flags, and not the configuration, say how a run is spread over a cluster: the configuration describes the training and is the same on a
//! laptop and on any cluster. The written script records the chosen flags.

mod check;
mod script;

use std::path::{Path, PathBuf};
use std::process::Command;

use unveil_config::{Config, ConfigError};

use crate::io;

/// Options that spread a run over a cluster.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct SlurmOptions {
    /// Nodes of the learner, over which learner.parallel.ranks are spread.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub learner_nodes: usize,
    /// Nodes of rollout workers, over which rollout.workers are spread. 0: workers run on the learner's nodes.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub rollout_nodes: usize,
    /// Reward services, which run on the workers' nodes [default: 1, or 0 if reward.address names one].
    #[arg(long, value_name = "N")]
    pub reward_tasks: Option<usize>,
    /// CPUs of each rank, worker and service. Each rank and worker also gets a GPU unless run.device is "cpu".
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub cpus: usize,
    /// Additional option of sbatch, such as `partition=gpu` or `time=04:00:00`; may be repeated.
    #[arg(long, value_name = "KEY[=VALUE]")]
    pub sbatch: Vec<String>,
    /// Submits a heterogeneous job, which requests learner nodes and rollout nodes separately.
    #[arg(long)]
    pub heterogeneous: bool,
    /// Like --sbatch, for the rollout nodes of a heterogeneous job.
    #[arg(long, value_name = "KEY[=VALUE]")]
    pub rollout_sbatch: Vec<String>,
    /// Submits a job array with one run per seed, such as `0-3` or `0,5,7%2`; each has its run directory and checkpoints under `seed-N`.
    #[arg(long, value_name = "SEEDS")]
    pub seeds: Option<String>,
    /// Seconds before the time limit at which the learner is signalled to save.
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    pub grace: u32,
    /// Maximum number of restarts of the job, after preemption, a node failure or an error.
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub max_restarts: u32,
    /// File of NAME=value lines that the roles get as environment variables; no other user may have read access to it.
    #[arg(long, value_name = "FILE")]
    pub secrets: Option<PathBuf>,
    /// Runs the roles in a container of this image.
    #[arg(long, value_name = "IMAGE")]
    pub container: Option<String>,
    /// Container runtime.
    #[arg(long, value_enum, default_value_t = Runtime::Pyxis, requires = "container")]
    pub runtime: Runtime,
    /// Additional directory to mount into the container at the same path; may be repeated. The working directory, the run directory and
    /// the directory of the configuration are always mounted.
    #[arg(long, value_name = "DIR", requires = "container")]
    pub mount: Vec<PathBuf>,
    /// Path of `unveil` on the nodes [default: this program; in a container `unveil`].
    #[arg(long, value_name = "PATH")]
    pub program: Option<PathBuf>,
}

/// Container runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Runtime {
    /// srun itself, with the Pyxis plugin.
    Pyxis,
    /// The command `apptainer`.
    Apptainer,
}

/// Where and with which configuration a run is submitted.
#[derive(Debug, Clone)]
pub struct SubmitContext {
    /// The working directory, shared with the job.
    pub directory: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
    /// Overrides of the configuration, `section.key=value`.
    pub sets: Vec<String>,
    /// The running program.
    pub program: PathBuf,
}

/// A job ready to be submitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlurmJob {
    /// The batch script.
    pub script: String,
    /// Path of the script.
    pub path: PathBuf,
    /// Directory for the logs of the job and its roles (for a job array, of the job only).
    pub logs: PathBuf,
}

/// Errors of a submission to Slurm.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// A file cannot be written.
    #[error(transparent)]
    Io(#[from] crate::LaunchError),
    /// sbatch cannot be started.
    #[error(
        "cannot start sbatch ({0}): run this on a machine that submits jobs, or copy the script of --dry-run to one"
    )]
    NoSlurm(std::io::Error),
    /// Slurm rejected the job.
    #[error("sbatch rejected {path}: {message}")]
    Refused {
        /// Path of the script.
        path: PathBuf,
        /// Message of sbatch.
        message: String,
    },
}

impl SlurmJob {
    /// Creates the batch script of a run.
    ///
    /// # Errors
    /// Returns [`ConfigError::Invalid`] with a message for every option that cannot work.
    pub fn new(config: &Config, options: &SlurmOptions, context: &SubmitContext) -> Result<Self, ConfigError> {
        let layout = script::JobLayout::new(config, options, context);
        let mut problems = check::problems(config, options, &layout);
        let settings = script::settings(config, options, &layout).unwrap_or_else(|more| {
            problems.extend(more);
            Vec::new()
        });
        if !problems.is_empty() {
            return Err(ConfigError::Invalid(problems));
        }
        Ok(Self {
            script: script::render(config, options, &layout, &settings),
            path: layout.run.join("slurm.sbatch"),
            logs: layout.logs(),
        })
    }

    /// Writes the script, submits it with sbatch and returns the job id.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn submit(&self) -> Result<u64, SubmitError> {
        std::fs::create_dir_all(&self.logs).map_err(io("cannot create", &self.logs))?;
        unveil_core::write_atomic(&self.path, self.script.as_bytes()).map_err(io("cannot write", &self.path))?;
        let output = Command::new("sbatch").arg("--parsable").arg(&self.path).output().map_err(SubmitError::NoSlurm)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        let refused = |message: String| SubmitError::Refused { path: self.path.clone(), message };
        if !output.status.success() {
            return Err(refused(text(&output.stderr)));
        }
        // The output is JOB or JOB;CLUSTER.
        let output = text(&output.stdout);
        let id = output.split(';').next().and_then(|n| n.parse().ok());
        id.ok_or_else(|| refused(format!("it printed no job id: {output}")))
    }
}

/// Returns an absolute path without accessing the file system.
fn absolute(directory: &Path, path: &Path) -> PathBuf {
    directory.join(path).components().filter(|c| !matches!(c, std::path::Component::CurDir)).collect()
}
