//! Text of the batch script: directives and settings, followed by the fixed part.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use unveil_config::Config;
use unveil_config::schema::Auth;

use super::{Runtime, SlurmOptions, SubmitContext, absolute};
use crate::submit::quote::{QuoteError, shell_word};

/// The script with settings for manual use; everything after the settings is the same in every job.
pub(super) const TEMPLATE: &str = include_str!("../../../../../cluster/slurm/unveil.sbatch");
const BEGIN: &str = "# --- settings ---\n";
const END: &str = "# --- end of settings ---\n";

/// Paths and task counts of a job.
pub(super) struct JobLayout {
    pub directory: PathBuf,
    pub config: PathBuf,
    pub sets: Vec<String>,
    pub program: PathBuf,
    pub run: PathBuf,
    pub secrets: Option<PathBuf>,
    pub mounts: Vec<PathBuf>,
    pub reward_tasks: usize,
    /// GPUs of each rank and worker.
    pub gpus: usize,
}

impl JobLayout {
    /// Resolves the paths of a job against the working directory.
    pub(super) fn new(config: &Config, options: &SlurmOptions, context: &SubmitContext) -> Self {
        let directory = absolute(&context.directory, Path::new(""));
        let resolve = |path: &Path| absolute(&directory, path);
        let run = resolve(&config.run_dir());
        let file = resolve(&context.config);
        let mut mounts = Vec::new();
        if options.container.is_some() {
            let required = [Some(directory.as_path()), Some(run.as_path()), file.parent()];
            let chosen = options.mount.iter().map(|m| resolve(m));
            for dir in required.into_iter().flatten().map(Path::to_owned).chain(chosen) {
                if !mounts.iter().any(|m| dir.starts_with(m)) {
                    mounts.push(dir);
                }
            }
        }
        let program = match (&options.program, &options.container) {
            // A bare name is looked up by the shell.
            (Some(program), _) if program.components().count() == 1 => program.clone(),
            (Some(program), _) => resolve(program),
            (None, Some(_)) => PathBuf::from("unveil"),
            (None, None) => context.program.clone(),
        };
        let secrets = options.secrets.as_deref().map(resolve);
        Self {
            directory,
            config: file,
            sets: context.sets.clone(),
            program,
            run,
            secrets,
            mounts,
            reward_tasks: options.reward_tasks.unwrap_or(usize::from(config.reward.address.is_empty())),
            gpus: usize::from(config.run.device != "cpu"),
        }
    }

    /// Returns the directory of logs.
    pub(super) fn logs(&self) -> PathBuf {
        self.run.join("logs")
    }
}

/// Processes and GPUs of one node.
#[derive(Clone, Copy, Default)]
struct NodeResources {
    tasks: usize,
    gpus: usize,
}

impl NodeResources {
    fn new(tasks: usize, gpus_per_task: usize) -> Self {
        Self { tasks, gpus: tasks * gpus_per_task }
    }

    fn plus(self, other: Self) -> Self {
        Self { tasks: self.tasks + other.tasks, gpus: self.gpus + other.gpus }
    }

    fn max(self, other: Self) -> Self {
        Self { tasks: self.tasks.max(other.tasks), gpus: self.gpus.max(other.gpus) }
    }
}

/// Renders the script with its [`settings`]; the options must have been checked.
pub(super) fn render(
    config: &Config,
    options: &SlurmOptions,
    layout: &JobLayout,
    settings: &[(&'static str, String)],
) -> String {
    let (head, rest) = TEMPLATE.split_once(BEGIN).unwrap_or_default();
    let body = rest.split_once(END).unwrap_or_default().1;
    let mut out = format!("{head}{BEGIN}");
    for line in directives(config, options, layout) {
        out.push_str(&format!("#SBATCH {line}\n"));
    }
    for (name, value) in settings {
        out.push_str(&format!("{name}={value}\n"));
    }
    out + END + body
}

fn directives(config: &Config, options: &SlurmOptions, layout: &JobLayout) -> Vec<String> {
    let output = if options.seeds.is_some() { "slurm-%A_%a.out" } else { "slurm-%j.out" };
    let logs = layout.logs().display().to_string().replace('%', "%%");
    let mut out = vec![
        "--job-name=unveil".to_owned(),
        directive("chdir", &layout.directory.display().to_string()),
        directive("output", &format!("{logs}/{output}")),
        "--open-mode=append".into(),
        "--requeue".into(),
        format!("--signal=B:USR1@{}", options.grace),
    ];
    out.extend(options.seeds.as_ref().map(|seeds| format!("--array={seeds}")));
    let learner = NodeResources::new(config.learner.parallel.ranks / options.learner_nodes, layout.gpus);
    let worker_nodes = if options.rollout_nodes == 0 { options.learner_nodes } else { options.rollout_nodes };
    let rollout = NodeResources::new(config.rollout.workers / worker_nodes, layout.gpus)
        .plus(NodeResources::new(layout.reward_tasks.div_ceil(worker_nodes), 0));
    let allocation = |nodes: usize, resources: NodeResources, more: &[String]| {
        let mut lines = vec![
            format!("--nodes={nodes}"),
            format!("--ntasks-per-node={}", resources.tasks),
            format!("--cpus-per-task={}", options.cpus),
        ];
        lines.extend((resources.gpus > 0).then(|| format!("--gpus-per-node={}", resources.gpus)));
        lines.extend(more.iter().map(|m| m.split_once('=').map_or_else(|| format!("--{m}"), |(k, v)| directive(k, v))));
        lines
    };
    if options.heterogeneous {
        out.extend(allocation(options.learner_nodes, learner, &options.sbatch));
        out.push("hetjob".into());
        out.extend(allocation(options.rollout_nodes, rollout, &options.rollout_sbatch));
    } else {
        let resources = if options.rollout_nodes == 0 { learner.plus(rollout) } else { learner.max(rollout) };
        out.extend(allocation(options.learner_nodes + options.rollout_nodes, resources, &options.sbatch));
    }
    out
}

/// Returns the settings as names and values in shell syntax, or one message per value that a shell cannot receive.
pub(super) fn settings(
    config: &Config,
    options: &SlurmOptions,
    layout: &JobLayout,
) -> Result<Vec<(&'static str, String)>, Vec<String>> {
    let checkpoints = &config.checkpoint.url;
    // A URL is kept; a directory is made independent of where the job starts.
    let checkpoints = match checkpoints.contains("://") || checkpoints.is_empty() {
        true => PathBuf::from(checkpoints),
        false => absolute(&layout.directory, Path::new(checkpoints)),
    };
    let runtime = match (&options.container, options.runtime) {
        (None, _) => "",
        (Some(_), Runtime::Pyxis) => "pyxis",
        (Some(_), Runtime::Apptainer) => "apptainer",
    };
    let tls = match (config.tls.dir.is_empty(), config.tls.insecure) {
        (false, _) => "own",
        (true, false) => "new",
        (true, true) => "none",
    };
    let token = if config.auth == Auth::default() { "new" } else { "own" };
    let mut settings = Vec::new();
    let mut problems = Vec::new();
    let mut set = |name: &'static str, value: Result<String, QuoteError>| match value {
        Ok(value) => settings.push((name, value)),
        Err(e) => problems.push(format!("{name} of the batch script: {e}")),
    };
    set("UNVEIL", shell_word(&layout.program));
    set("CONFIG", shell_word(&layout.config));
    set("SETS", array(&layout.sets));
    set("RUN_DIR", shell_word(&layout.run));
    set("CHECKPOINTS", optional(&checkpoints));
    set("RANKS", Ok(config.learner.parallel.ranks.to_string()));
    set("LEARNER_NODES", Ok(options.learner_nodes.to_string()));
    set("WORKERS", Ok(config.rollout.workers.to_string()));
    set("ROLLOUT_NODES", Ok(options.rollout_nodes.to_string()));
    set("REWARD_TASKS", Ok(layout.reward_tasks.to_string()));
    set("TLS", Ok(tls.to_owned()));
    set("TOKEN", Ok(token.to_owned()));
    set("CPUS", Ok(options.cpus.to_string()));
    set("GPUS", Ok(layout.gpus.to_string()));
    set("MAX_RESTARTS", Ok(options.max_restarts.to_string()));
    set("SECRETS", optional(layout.secrets.as_deref().unwrap_or(Path::new(""))));
    set("RUNTIME", optional(runtime));
    set("IMAGE", optional(options.container.as_deref().unwrap_or_default()));
    set("MOUNTS", array(&layout.mounts));
    if problems.is_empty() { Ok(settings) } else { Err(problems) }
}

/// Returns an array of the shell.
fn array<T: AsRef<OsStr>>(values: &[T]) -> Result<String, QuoteError> {
    let words = values.iter().map(shell_word).collect::<Result<Vec<_>, _>>()?;
    Ok(format!("({})", words.join(" ")))
}

/// Returns the word for a value, and nothing for an empty value.
fn optional(value: impl AsRef<OsStr>) -> Result<String, QuoteError> {
    if value.as_ref().is_empty() { Ok(String::new()) } else { shell_word(value) }
}

/// Returns a directive with a value in the syntax of sbatch: quotes protect blanks and `#`, and nothing else is special within them.
fn directive(key: &str, value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+*[]&|".contains(c);
    match value.chars().all(plain) {
        true => format!("--{key}={value}"),
        false if value.contains('\'') => format!("--{key}=\"{value}\""),
        false => format!("--{key}='{value}'"),
    }
}
