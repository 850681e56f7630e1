//! A run as one Slurm job: options become the settings of the batch script `cluster/slurm/unveil.sbatch`, which does the rest.
//!
//! How a run is spread over a cluster is said by flags, not in the configuration: the configuration stays what is trained, the same
//! on a laptop and on any cluster, and the script that is written says what was chosen. Must not know: what the script does.

mod check;
mod script;

use std::path::{Path, PathBuf};
use std::process::Command;

use unveil_config::{Config, ConfigError};

use crate::io;

/// How a run is spread over a cluster.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct SlurmOptions {
    /// Nodes of the learner; learner.parallel.ranks is spread over them.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub learner_nodes: usize,
    /// Nodes of rollout workers; rollout.workers is spread over them. 0: workers run on the learner's nodes.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub rollout_nodes: usize,
    /// Reward services, which run beside the workers [default: 1, or 0 where reward.address names one].
    #[arg(long, value_name = "N")]
    pub reward_tasks: Option<usize>,
    /// CPUs of each rank, worker and service. Each rank and worker also gets a GPU, unless run.device is "cpu".
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub cpus: usize,
    /// One more option of sbatch, such as `partition=gpu` or `time=04:00:00`; may be repeated.
    #[arg(long, value_name = "KEY[=VALUE]")]
    pub sbatch: Vec<String>,
    /// A heterogeneous job: learner nodes and rollout nodes are asked for separately.
    #[arg(long)]
    pub heterogeneous: bool,
    /// As --sbatch, for the rollout nodes of a heterogeneous job.
    #[arg(long, value_name = "KEY[=VALUE]")]
    pub rollout_sbatch: Vec<String>,
    /// A job array, one run per seed, such as `0-3` or `0,5,7%2`; each has its run directory and checkpoints under `seed-N`.
    #[arg(long, value_name = "SEEDS")]
    pub seeds: Option<String>,
    /// Seconds before the time limit at which the learner is told to save.
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    pub grace: u32,
    /// Times that the job may be started again, after preemption, a dead node or an error.
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub max_restarts: u32,
    /// File of NAME=value lines that the roles get as environment variables; only you may be able to read it.
    #[arg(long, value_name = "FILE")]
    pub secrets: Option<PathBuf>,
    /// Runs the roles in a container of this image.
    #[arg(long, value_name = "IMAGE")]
    pub container: Option<String>,
    /// What starts the container.
    #[arg(long, value_enum, default_value_t = Runtime::Pyxis, requires = "container")]
    pub runtime: Runtime,
    /// One more directory that the container sees, at the same path; may be repeated. It sees the working directory, the run
    /// directory and that of the configuration.
    #[arg(long, value_name = "DIR", requires = "container")]
    pub mount: Vec<PathBuf>,
    /// The program on the nodes [default: this one; in a container `unveil`].
    #[arg(long, value_name = "PATH")]
    pub program: Option<PathBuf>,
}

/// What starts a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Runtime {
    /// srun itself, by the plugin Pyxis.
    Pyxis,
    /// The command `apptainer`.
    Apptainer,
}

/// From where a run is submitted.
#[derive(Debug, Clone)]
pub struct Place {
    /// The working directory, which the job shares.
    pub directory: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
    /// Keys that are set beside it, `section.key=value`.
    pub sets: Vec<String>,
    /// The running program.
    pub program: PathBuf,
}

/// A job that can be submitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// The batch script.
    pub script: String,
    /// Where it is written.
    pub path: PathBuf,
    /// Directory of the logs of the job and its roles (for a job array: of the job).
    pub logs: PathBuf,
}

/// Why a job was not submitted.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// A file cannot be written.
    #[error(transparent)]
    Io(#[from] crate::LaunchError),
    /// There is no Slurm here.
    #[error(
        "sbatch cannot be started ({0}): run this where jobs are submitted, or take the script of --dry-run to such a place"
    )]
    NoSlurm(std::io::Error),
    /// Slurm refused the job.
    #[error("sbatch refused {path}: {said}")]
    Refused {
        /// The script.
        path: PathBuf,
        /// What sbatch said.
        said: String,
    },
}

impl Job {
    /// Makes the batch script of a run.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with every choice that cannot work.
    pub fn new(config: &Config, options: &SlurmOptions, place: &Place) -> Result<Self, ConfigError> {
        let layout = script::Layout::new(config, options, place);
        let faults = check::faults(config, options, &layout);
        if !faults.is_empty() {
            return Err(ConfigError::Invalid(faults));
        }
        Ok(Self {
            script: script::render(config, options, &layout),
            path: layout.run.join("slurm.sbatch"),
            logs: layout.logs(),
        })
    }

    /// Writes the script and hands it to sbatch; gives the job's number.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn submit(&self) -> Result<u64, SubmitError> {
        std::fs::create_dir_all(&self.logs).map_err(io("cannot create", &self.logs))?;
        unveil_core::write_atomic(&self.path, self.script.as_bytes()).map_err(io("cannot write", &self.path))?;
        let output = Command::new("sbatch").arg("--parsable").arg(&self.path).output().map_err(SubmitError::NoSlurm)?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        let refused = |said: String| SubmitError::Refused { path: self.path.clone(), said };
        if !output.status.success() {
            return Err(refused(said(&output.stderr)));
        }
        // JOB, or JOB;CLUSTER.
        let number = said(&output.stdout);
        number.split(';').next().and_then(|n| n.parse().ok()).ok_or_else(|| refused(format!("no job number: {number}")))
    }
}

/// An absolute path, with nothing looked up.
fn absolute(directory: &Path, path: &Path) -> PathBuf {
    directory.join(path).components().filter(|c| !matches!(c, std::path::Component::CurDir)).collect()
}
