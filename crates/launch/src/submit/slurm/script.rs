//! Text of the batch script: directives and settings, followed by the fixed part.

use std::path::{Path, PathBuf};

use unveil_config::Config;
use unveil_config::schema::Auth;

use super::{Runtime, SlurmOptions, SubmitContext, absolute};

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
    pub fn new(config: &Config, options: &SlurmOptions, context: &SubmitContext) -> Self {
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
    pub fn logs(&self) -> PathBuf {
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

/// Renders the script; the options must have been checked.
pub(super) fn render(config: &Config, options: &SlurmOptions, layout: &JobLayout) -> String {
    let (head, rest) = TEMPLATE.split_once(BEGIN).unwrap_or_default();
    let body = rest.split_once(END).unwrap_or_default().1;
    let mut out = format!("{head}{BEGIN}");
    for line in directives(config, options, layout) {
        out.push_str(&format!("#SBATCH {line}\n"));
    }
    for (name, value) in settings(config, options, layout) {
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

/// Returns the settings as names and values in shell syntax.
pub(super) fn settings(config: &Config, options: &SlurmOptions, layout: &JobLayout) -> Vec<(&'static str, String)> {
    let path = |p: &Path| shell_word(&p.display().to_string());
    let optional = |text: Option<String>| text.map_or_else(String::new, |t| shell_word(&t));
    let list = |all: Vec<String>| format!("({})", all.join(" "));
    let checkpoints = &config.checkpoint.url;
    // A URL is kept; a directory is made independent of where the job starts.
    let checkpoints = match checkpoints.contains("://") || checkpoints.is_empty() {
        true => checkpoints.clone(),
        false => absolute(&layout.directory, Path::new(checkpoints)).display().to_string(),
    };
    let runtime = options.container.as_ref().map(|_| match options.runtime {
        Runtime::Pyxis => "pyxis".to_owned(),
        Runtime::Apptainer => "apptainer".to_owned(),
    });
    let tls = match (config.tls.dir.is_empty(), config.tls.insecure) {
        (false, _) => "own",
        (true, false) => "new",
        (true, true) => "none",
    };
    let token = if config.auth == Auth::default() { "new" } else { "own" };
    vec![
        ("UNVEIL", path(&layout.program)),
        ("CONFIG", path(&layout.config)),
        ("SETS", list(layout.sets.iter().map(|s| shell_word(s)).collect())),
        ("RUN_DIR", path(&layout.run)),
        ("CHECKPOINTS", optional(Some(checkpoints).filter(|c| !c.is_empty()))),
        ("RANKS", config.learner.parallel.ranks.to_string()),
        ("LEARNER_NODES", options.learner_nodes.to_string()),
        ("WORKERS", config.rollout.workers.to_string()),
        ("ROLLOUT_NODES", options.rollout_nodes.to_string()),
        ("REWARD_TASKS", layout.reward_tasks.to_string()),
        ("TLS", tls.to_owned()),
        ("TOKEN", token.to_owned()),
        ("CPUS", options.cpus.to_string()),
        ("GPUS", layout.gpus.to_string()),
        ("MAX_RESTARTS", options.max_restarts.to_string()),
        ("SECRETS", layout.secrets.as_deref().map_or_else(String::new, path)),
        ("RUNTIME", optional(runtime)),
        ("IMAGE", optional(options.container.clone())),
        ("MOUNTS", list(layout.mounts.iter().map(|m| path(m)).collect())),
    ]
}

/// Returns a word in shell syntax, in single quotes if necessary.
pub(super) fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
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
