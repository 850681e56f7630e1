//! The text of the batch script: directives and settings in front of the fixed part. Must not know: what may be combined.

use std::path::{Path, PathBuf};

use unveil_config::Config;
use unveil_config::schema::Auth;

use super::{Place, Runtime, SlurmOptions, absolute};

/// The script with settings for use by hand; what follows the mark is the same in every job.
pub(super) const TEMPLATE: &str = include_str!("../../../../../cluster/slurm/unveil.sbatch");
const BEGIN: &str = "# --- settings ---\n";
const END: &str = "# --- end of settings ---\n";

/// Where everything lies and how much of it there is.
pub(super) struct Layout {
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

impl Layout {
    pub fn new(config: &Config, options: &SlurmOptions, place: &Place) -> Self {
        let directory = absolute(&place.directory, Path::new(""));
        let at = |path: &Path| absolute(&directory, path);
        let (run, file) = (at(&config.run_dir()), at(&place.config));
        let mut mounts = Vec::new();
        if options.container.is_some() {
            let own = [Some(directory.as_path()), Some(run.as_path()), file.parent()];
            for dir in own.into_iter().flatten().map(Path::to_owned).chain(options.mount.iter().map(|m| at(m))) {
                if !mounts.iter().any(|m| dir.starts_with(m)) {
                    mounts.push(dir);
                }
            }
        }
        let program = match (&options.program, &options.container) {
            // A name alone is looked for by the shell.
            (Some(program), _) if program.components().count() == 1 => program.clone(),
            (Some(program), _) => at(program),
            (None, Some(_)) => PathBuf::from("unveil"),
            (None, None) => place.program.clone(),
        };
        let secrets = options.secrets.as_deref().map(at);
        Self {
            directory,
            config: file,
            sets: place.sets.clone(),
            program,
            run,
            secrets,
            mounts,
            reward_tasks: options.reward_tasks.unwrap_or(usize::from(config.reward.address.is_empty())),
            gpus: usize::from(config.run.device != "cpu"),
        }
    }

    pub fn logs(&self) -> PathBuf {
        self.run.join("logs")
    }
}

/// Processes and GPUs of one node.
#[derive(Clone, Copy, Default)]
struct Share {
    tasks: usize,
    gpus: usize,
}

impl Share {
    fn of(tasks: usize, gpus: usize) -> Self {
        Self { tasks, gpus: tasks * gpus }
    }

    fn beside(self, other: Self) -> Self {
        Self { tasks: self.tasks + other.tasks, gpus: self.gpus + other.gpus }
    }

    fn or(self, other: Self) -> Self {
        Self { tasks: self.tasks.max(other.tasks), gpus: self.gpus.max(other.gpus) }
    }
}

/// The whole script. The options have been checked.
pub(super) fn render(config: &Config, options: &SlurmOptions, layout: &Layout) -> String {
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

fn directives(config: &Config, options: &SlurmOptions, layout: &Layout) -> Vec<String> {
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
    let learner = Share::of(config.learner.parallel.ranks / options.learner_nodes, layout.gpus);
    let places = if options.rollout_nodes == 0 { options.learner_nodes } else { options.rollout_nodes };
    let rollout = Share::of(config.rollout.workers / places, layout.gpus)
        .beside(Share::of(layout.reward_tasks.div_ceil(places), 0));
    let block = |nodes: usize, share: Share, more: &[String]| {
        let mut block = vec![
            format!("--nodes={nodes}"),
            format!("--ntasks-per-node={}", share.tasks),
            format!("--cpus-per-task={}", options.cpus),
        ];
        block.extend((share.gpus > 0).then(|| format!("--gpus-per-node={}", share.gpus)));
        block.extend(more.iter().map(|m| m.split_once('=').map_or_else(|| format!("--{m}"), |(k, v)| directive(k, v))));
        block
    };
    if options.heterogeneous {
        out.extend(block(options.learner_nodes, learner, &options.sbatch));
        out.push("hetjob".into());
        out.extend(block(options.rollout_nodes, rollout, &options.rollout_sbatch));
    } else {
        let share = if options.rollout_nodes == 0 { learner.beside(rollout) } else { learner.or(rollout) };
        out.extend(block(options.learner_nodes + options.rollout_nodes, share, &options.sbatch));
    }
    out
}

/// Names and values, as the shell reads them.
pub(super) fn settings(config: &Config, options: &SlurmOptions, layout: &Layout) -> Vec<(&'static str, String)> {
    let path = |p: &Path| word(&p.display().to_string());
    let maybe = |text: Option<String>| text.map_or_else(String::new, |t| word(&t));
    let list = |all: Vec<String>| format!("({})", all.join(" "));
    let checkpoints = &config.checkpoint.url;
    // A URL stays as it is; a directory does not depend on where the job starts.
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
        ("SETS", list(layout.sets.iter().map(|s| word(s)).collect())),
        ("RUN_DIR", path(&layout.run)),
        ("CHECKPOINTS", maybe(Some(checkpoints).filter(|c| !c.is_empty()))),
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
        ("RUNTIME", maybe(runtime)),
        ("IMAGE", maybe(options.container.clone())),
        ("MOUNTS", list(layout.mounts.iter().map(|m| path(m)).collect())),
    ]
}

/// A word of the shell: as it is where that is safe, else in single quotes.
pub(super) fn word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// A directive with a value, as sbatch reads it: quotes keep blanks and `#`, and nothing else is special within them.
fn directive(key: &str, value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+*[]&|".contains(c);
    match value.chars().all(plain) {
        true => format!("--{key}={value}"),
        false if value.contains('\'') => format!("--{key}=\"{value}\""),
        false => format!("--{key}='{value}'"),
    }
}
