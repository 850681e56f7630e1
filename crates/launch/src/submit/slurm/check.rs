//! Checks the options of a Slurm job and reports one message per problem.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use unveil_config::Config;

use super::SlurmOptions;
use super::script::JobLayout;

/// Options of sbatch that the script sets itself, or that would break it.
const RESERVED_OPTIONS: [&str; 21] = [
    "array",
    "chdir",
    "cpus-per-task",
    "error",
    "gpus",
    "gpus-per-node",
    "gpus-per-task",
    "hetjob",
    "no-kill",
    "no-requeue",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "requeue",
    "signal",
    "test-only",
    "wait",
    "wrap",
];
/// Maximum number of reward services: a job has ports for that many.
const MAX_REWARD_TASKS: usize = 14;

/// Returns one message per option that cannot work.
pub(super) fn problems(config: &Config, options: &SlurmOptions, layout: &JobLayout) -> Vec<String> {
    let mut out = Vec::new();
    let mut require = |ok: bool, problem: String| {
        if !ok {
            out.push(problem);
        }
    };
    let ranks = config.learner.parallel.ranks;
    let workers = config.rollout.workers;
    let learner_nodes = options.learner_nodes;
    let rollout_nodes = options.rollout_nodes;
    require(learner_nodes > 0, "--learner-nodes is 0: the learner needs a node".into());
    require(
        learner_nodes > 0 && ranks.is_multiple_of(learner_nodes),
        format!(
            "learner.parallel.ranks is {ranks}, which cannot be spread evenly over --learner-nodes {learner_nodes}"
        ),
    );
    let worker_nodes = if rollout_nodes == 0 { learner_nodes } else { rollout_nodes };
    require(
        worker_nodes > 0 && workers.is_multiple_of(worker_nodes),
        format!(
            "rollout.workers is {workers}, which cannot be spread evenly over {worker_nodes} nodes: set it to a multiple"
        ),
    );
    require(options.cpus > 0, "--cpus is 0: a process needs one".into());
    let tasks = layout.reward_tasks;
    let address = &config.reward.address;
    require(
        tasks > 0 || !address.is_empty(),
        "--reward-tasks is 0, but reward.address names no service: set one of them".into(),
    );
    require(
        tasks == 0 || address.is_empty(),
        format!("--reward-tasks is {tasks}, but reward.address is {address}: use --reward-tasks 0, or leave it empty"),
    );
    require(tasks <= MAX_REWARD_TASKS, format!("--reward-tasks is {tasks}: a job has ports for {MAX_REWARD_TASKS}"));
    require(config.learner.steps > 0, "learner.steps is 0: without stage 2 submit `unveil train` itself".into());
    require(
        config.run.resume == "auto",
        format!("run.resume is `{}`: a restarted job would not resume; use auto", config.run.resume),
    );
    require(
        !config.run.device.contains(':'),
        format!("run.device is {}: each process sees only its own GPU; use cuda", config.run.device),
    );
    require(
        !options.heterogeneous || options.seeds.is_none(),
        "--seeds and --heterogeneous: Slurm has no arrays of heterogeneous jobs; submit a job per seed (--set run.seed=N --set run.dir=DIR)".into(),
    );
    require(
        !options.heterogeneous || rollout_nodes > 0,
        "--heterogeneous needs --rollout-nodes of 1 or more: the rollout nodes are its second part".into(),
    );
    require(
        options.heterogeneous || options.rollout_sbatch.is_empty(),
        "--rollout-sbatch needs --heterogeneous: all nodes of one allocation have the same options".into(),
    );
    if let Some(seeds) = &options.seeds {
        require(is_seeds(seeds), format!("--seeds is `{seeds}`: use numbers and ranges, such as 0-3 or 0,5,7%2"));
    }
    for more in options.sbatch.iter().chain(&options.rollout_sbatch) {
        check_sbatch_option(more, &mut require);
    }
    let fixed = [("working directory", &layout.directory), ("run directory", &layout.run)];
    for (what, path) in fixed.into_iter().chain(layout.mounts.iter().map(|m| ("mount", m))) {
        require(
            path.to_str().is_some_and(is_plain),
            format!(
                "the {what} {} contains a backslash, both kinds of quotes, or a line break, or is not UTF-8, which cannot be passed to Slurm",
                path.display()
            ),
        );
    }
    for mount in &layout.mounts {
        let has_no_separator = !mount.display().to_string().contains([',', ':']);
        require(
            has_no_separator,
            format!("{} cannot be mounted into the container: its path contains a comma or a colon", mount.display()),
        );
    }
    if let Some(file) = &layout.secrets {
        check_secrets(file, &mut require);
    }
    out
}

/// Checks one `--sbatch KEY[=VALUE]`.
fn check_sbatch_option(more: &str, require: &mut impl FnMut(bool, String)) {
    let (key, value) = more.split_once('=').unwrap_or((more, ""));
    let is_long_option = key.starts_with(|c: char| c.is_ascii_lowercase())
        && key.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    require(
        is_long_option,
        format!("--sbatch `{more}`: write a long option without its dashes, such as partition=gpu"),
    );
    require(
        !RESERVED_OPTIONS.contains(&key),
        format!(
            "--sbatch `{more}`: the script sets {key} itself; use the other flags, or edit the script of --dry-run"
        ),
    );
    require(
        is_plain(value),
        format!("--sbatch `{more}`: the value contains a backslash, both kinds of quotes, or a line break"),
    );
}

/// Returns whether a directive can contain the text.
fn is_plain(text: &str) -> bool {
    let both_quotes = text.contains('\'') && text.contains('"');
    !both_quotes && !text.contains(|c: char| c == '\\' || c.is_control())
}

/// Returns whether `text` is a list of seeds: `0-3`, `1,5,7` or `0-8:2`, optionally with `%N` for the number of concurrent runs.
fn is_seeds(text: &str) -> bool {
    let number = |t: &str| !t.is_empty() && t.chars().all(|c| c.is_ascii_digit());
    let (seeds, concurrent) = text.split_once('%').map_or((text, None), |(s, n)| (s, Some(n)));
    let is_range = |item: &str| {
        let (range, step) = item.split_once(':').map_or((item, None), |(r, s)| (r, Some(s)));
        let has_valid_ends =
            range.split_once('-').map_or(number(range) && step.is_none(), |(a, b)| number(a) && number(b));
        has_valid_ends && step.is_none_or(number)
    };
    seeds.split(',').all(is_range) && concurrent.is_none_or(number)
}

/// Checks that no other user can read the file of secrets.
fn check_secrets(file: &Path, require: &mut impl FnMut(bool, String)) {
    let shown = file.display();
    match std::fs::metadata(file) {
        Ok(metadata) => require(
            metadata.permissions().mode() & 0o077 == 0,
            format!("--secrets {shown} can be read by others: chmod 600 it"),
        ),
        Err(e) => require(false, format!("--secrets {shown}: {e}")),
    }
}
