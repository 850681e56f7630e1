//! Choices that cannot work together, one message each. Must not know: how a script is written.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use unveil_config::Config;

use super::SlurmOptions;
use super::script::Layout;

/// Options of sbatch that the script sets itself, or that would take it apart.
const OWN: [&str; 21] = [
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
/// Reward services that a job has ports for.
const REWARD_PORTS: usize = 14;

/// Every fault of the choices; empty when they can work.
pub(super) fn faults(config: &Config, options: &SlurmOptions, layout: &Layout) -> Vec<String> {
    let mut out = Vec::new();
    let mut need = |ok: bool, what: String| {
        if !ok {
            out.push(what);
        }
    };
    let (ranks, workers) = (config.learner.parallel.ranks, config.rollout.workers);
    let (learners, rollouts) = (options.learner_nodes, options.rollout_nodes);
    need(learners > 0, "--learner-nodes is 0: the learner needs a node".into());
    need(
        learners > 0 && ranks.is_multiple_of(learners),
        format!("learner.parallel.ranks is {ranks}, which cannot be spread evenly over --learner-nodes {learners}"),
    );
    let places = if rollouts == 0 { learners } else { rollouts };
    need(
        places > 0 && workers.is_multiple_of(places),
        format!(
            "rollout.workers is {workers}, which cannot be spread evenly over {places} nodes: set it to a multiple"
        ),
    );
    need(options.cpus > 0, "--cpus is 0: a process needs one".into());
    let (tasks, address) = (layout.reward_tasks, &config.reward.address);
    need(
        tasks > 0 || !address.is_empty(),
        "--reward-tasks is 0, but reward.address names no service: set one of them".into(),
    );
    need(
        tasks == 0 || address.is_empty(),
        format!("--reward-tasks is {tasks}, but reward.address is {address}: use --reward-tasks 0, or leave it empty"),
    );
    need(tasks <= REWARD_PORTS, format!("--reward-tasks is {tasks}: a job has ports for {REWARD_PORTS}"));
    need(config.learner.steps > 0, "learner.steps is 0: without stage 2 submit `unveil train` itself".into());
    need(
        config.run.resume == "auto",
        format!(
            "run.resume is `{}`: a job that is started again would not go on from where it was; use auto",
            config.run.resume
        ),
    );
    need(
        !config.run.device.contains(':'),
        format!("run.device is {}: each process sees its own GPU alone; use cuda", config.run.device),
    );
    need(
        !options.heterogeneous || options.seeds.is_none(),
        "--seeds and --heterogeneous: Slurm has no arrays of heterogeneous jobs; submit a job per seed (--set run.seed=N --set run.dir=DIR)".into(),
    );
    need(
        !options.heterogeneous || rollouts > 0,
        "--heterogeneous needs --rollout-nodes of 1 or more: its second part are the rollout nodes".into(),
    );
    need(
        options.heterogeneous || options.rollout_sbatch.is_empty(),
        "--rollout-sbatch needs --heterogeneous: the nodes of one allocation are all alike".into(),
    );
    if let Some(seeds) = &options.seeds {
        need(is_seeds(seeds), format!("--seeds is `{seeds}`: use numbers and ranges, such as 0-3 or 0,5,7%2"));
    }
    for more in options.sbatch.iter().chain(&options.rollout_sbatch) {
        sbatch(more, &mut need);
    }
    let fixed = [("working directory", &layout.directory), ("run directory", &layout.run)];
    for (what, path) in fixed.into_iter().chain(layout.mounts.iter().map(|m| ("mount", m))) {
        need(
            is_plain(path),
            format!(
                "the {what} {} holds a backslash, both kinds of quotes, or a line break: Slurm cannot be told such a path",
                path.display()
            ),
        );
    }
    for mount in &layout.mounts {
        let fine = !mount.display().to_string().contains([',', ':']);
        need(fine, format!("the container cannot see {}: its path holds a comma or a colon", mount.display()));
    }
    if let Some(file) = &layout.secrets {
        secrets(file, &mut need);
    }
    out
}

/// One `--sbatch KEY[=VALUE]`.
fn sbatch(more: &str, need: &mut impl FnMut(bool, String)) {
    let (key, value) = more.split_once('=').unwrap_or((more, ""));
    let word = key.starts_with(|c: char| c.is_ascii_lowercase())
        && key.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    need(word, format!("--sbatch `{more}`: write a long option without its dashes, such as partition=gpu"));
    need(
        !OWN.contains(&key),
        format!(
            "--sbatch `{more}`: the script sets {key} itself; use the other flags, or edit the script of --dry-run"
        ),
    );
    need(
        is_plain(Path::new(value)),
        format!("--sbatch `{more}`: the value holds a backslash, both kinds of quotes, or a line break"),
    );
}

/// Whether a directive can hold it.
fn is_plain(path: &Path) -> bool {
    let text = path.display().to_string();
    let both_quotes = text.contains('\'') && text.contains('"');
    !both_quotes && !text.contains(|c: char| c == '\\' || c.is_control())
}

/// `0-3`, `1,5,7`, `0-8:2`, each with `%N` for the number that run at once.
fn is_seeds(text: &str) -> bool {
    let number = |t: &str| !t.is_empty() && t.chars().all(|c| c.is_ascii_digit());
    let (seeds, at_once) = text.split_once('%').map_or((text, None), |(s, n)| (s, Some(n)));
    let part = |part: &str| {
        let (range, step) = part.split_once(':').map_or((part, None), |(r, s)| (r, Some(s)));
        let ends = range.split_once('-').map_or(number(range) && step.is_none(), |(a, b)| number(a) && number(b));
        ends && step.is_none_or(number)
    };
    seeds.split(',').all(part) && at_once.is_none_or(number)
}

fn secrets(file: &Path, need: &mut impl FnMut(bool, String)) {
    let shown = file.display();
    match std::fs::metadata(file) {
        Ok(found) => need(
            found.permissions().mode() & 0o077 == 0,
            format!("--secrets {shown} can be read by others: chmod 600 it"),
        ),
        Err(e) => need(false, format!("--secrets {shown}: {e}")),
    }
}
