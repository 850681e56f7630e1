//! Directives and settings of the script for various options.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::{job, settings};

/// Runs a script through a checker that reads stdin, and returns the checker's messages if it fails.
fn check_script(program: &str, args: &[&str], script: &str) -> Option<String> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    child.stdin.take().expect("a pipe").write_all(script.as_bytes()).expect("the checker reads stdin");
    let done = child.wait_with_output().expect("the checker ends");
    let messages = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    (!done.status.success()).then(|| messages.into_owned())
}

fn written(flags: &[&str], sets: &[&str]) -> String {
    let script = job("/home/me", flags, sets).unwrap_or_else(|e| panic!("{flags:?}: {e}")).script;
    assert_eq!(check_script("bash", &["-n"], &script), None);
    if Command::new("shellcheck").arg("--version").output().is_ok() {
        assert_eq!(check_script("shellcheck", &["-"], &script), None);
    }
    settings(&script).to_owned()
}

const COMMON_DIRECTIVES: &str = "#SBATCH --job-name=unveil
#SBATCH --chdir=/home/me
#SBATCH --output=/home/me/runs/run/logs/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
";

#[test]
fn learner_and_rollout_nodes_of_one_allocation() {
    let flags = ["--learner-nodes", "2", "--rollout-nodes", "3", "--reward-tasks", "2", "--cpus", "8"];
    let more = ["--sbatch", "partition=gpu", "--sbatch", "time=04:00:00", "--sbatch", "exclusive", "--grace", "300"];
    let sets = ["learner.parallel.ranks=8", "rollout.workers=6", "checkpoint.url=s3://bucket/runs/a", "run.seed=5"];
    let wanted = "#SBATCH --signal=B:USR1@300
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --partition=gpu
#SBATCH --time=04:00:00
#SBATCH --exclusive
UNVEIL=/opt/unveil/bin/unveil
CONFIG=/home/me/run.toml
SETS=('learner.parallel.ranks=8' 'rollout.workers=6' 'checkpoint.url=s3://bucket/runs/a' 'run.seed=5')
RUN_DIR=/home/me/runs/run
CHECKPOINTS=s3://bucket/runs/a
RANKS=8
LEARNER_NODES=2
WORKERS=6
ROLLOUT_NODES=3
REWARD_TASKS=2
TLS=new
TOKEN=new
CPUS=8
GPUS=1
MAX_RESTARTS=20
SECRETS=
RUNTIME=
IMAGE=
MOUNTS=()
";
    assert_eq!(written(&[&flags[..], &more].concat(), &sets), format!("{COMMON_DIRECTIVES}{wanted}"));
}

#[test]
fn all_roles_share_the_learner_nodes() {
    let text =
        written(&["--rollout-nodes", "0", "--max-restarts", "3"], &["learner.parallel.ranks=2", "rollout.workers=2"]);
    for line in ["--nodes=1", "--ntasks-per-node=5", "--cpus-per-task=4", "--gpus-per-node=4"] {
        assert!(text.contains(&format!("#SBATCH {line}\n")), "{line}\n{text}");
    }
    assert!(text.contains("\nROLLOUT_NODES=0\n") && text.contains("\nMAX_RESTARTS=3\n"), "{text}");
    // A job on CPUs requests no GPUs, and an external reward service takes no task.
    let text = written(&[], &["run.device=cpu", "reward.address=https://rewards:9000"]);
    assert!(!text.contains("gpus") && text.contains("\nGPUS=0\n") && text.contains("\nREWARD_TASKS=0\n"), "{text}");
    assert!(text.contains("#SBATCH --ntasks-per-node=1\n"), "{text}");
}

#[test]
fn heterogeneous_job_has_two_parts() {
    let flags = ["--heterogeneous", "--learner-nodes", "1", "--rollout-nodes", "4", "--sbatch", "partition=a"];
    let flags = [&flags[..], &["--rollout-sbatch", "partition=b", "--rollout-sbatch", "comment=it's b"]].concat();
    let text = written(
        &flags,
        &["learner.parallel.ranks=8", "rollout.workers=4", "tls.dir=certificates", "auth.token_env=UNVEIL_TOKEN"],
    );
    let wanted = "#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=8
#SBATCH --partition=a
#SBATCH hetjob
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=1
#SBATCH --partition=b
#SBATCH --comment=\"it's b\"
UNVEIL=";
    assert!(text.contains(wanted), "{text}");
    assert!(text.contains("\nTLS=own\nTOKEN=own\n"), "{text}");
}

#[test]
fn seeds_become_a_job_array() {
    let text = written(&["--seeds", "0,5,7-9%2"], &["checkpoint.url=saved"]);
    assert!(text.contains("#SBATCH --array=0,5,7-9%2\n"), "{text}");
    assert!(text.contains("/logs/slurm-%A_%a.out\n") && text.contains("\nCHECKPOINTS=/home/me/saved\n"), "{text}");
}

#[test]
fn containers_mount_the_directories_of_the_run() {
    let flags = ["--container", "registry#unveil:1", "--mount", "/scratch/data", "--mount", "/home/me/models"];
    let text = written(&flags, &["run.dir=/scratch/runs/a"]);
    // A directory below a mounted one is not mounted again.
    let wanted = "RUNTIME=pyxis\nIMAGE='registry#unveil:1'\nMOUNTS=(/home/me /scratch/runs/a /scratch/data)\n";
    assert!(text.contains(wanted) && text.contains("\nUNVEIL=unveil\n"), "{text}");
    let text = written(&[&flags[..2], &["--runtime", "apptainer", "--program", "bin/unveil"]].concat(), &[]);
    assert!(text.contains("\nRUNTIME=apptainer\n") && text.contains("UNVEIL=/home/me/bin/unveil\n"), "{text}");
}

#[test]
fn template_has_the_same_settings() {
    let names = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|l| !l.starts_with('#'));
        lines.filter_map(|l| l.split_once('=')).map(|(name, _)| name.to_owned()).collect()
    };
    let template = include_str!("../../../../cluster/slurm/unveil.sbatch");
    assert_eq!(names(settings(template)), names(&written(&[], &[])));
    assert_eq!(check_script("bash", &["-n"], template), None);
    let script = job("/home/me", &[], &[]).unwrap().script;
    let end = |text: &str| text.split_once("# --- end of settings ---").expect("an end").1.to_owned();
    assert_eq!(end(template), end(&script), "everything after the settings is the same");
}

#[test]
fn unusual_paths_reach_the_shell_unchanged() {
    let odd = ["/a b/#c", "/it's/a run", "/$HOME/`id`/$(id)", "/say \"so\"/*?[x]", "/100%/~me/!!", "/ünïcode/é;&|<>"];
    for (i, dir) in odd.into_iter().enumerate() {
        let sets = ["data.question=Who's there? $HOME \"you\" `id`", &format!("run.dir={dir}")].map(str::to_owned);
        let sets = sets.iter().map(String::as_str).collect::<Vec<_>>();
        let job = job("/home/me", &[], &sets).unwrap_or_else(|e| panic!("{dir}: {e}"));
        let print = "printf '%s\\0' \"$RUN_DIR\" \"$CONFIG\" \"${SETS[@]}\"";
        let shell = Command::new("bash").args(["-c", &format!("{}\n{print}", settings(&job.script))]).output().unwrap();
        assert!(shell.status.success(), "{dir}: {}", String::from_utf8_lossy(&shell.stderr));
        let values: Vec<&[u8]> = shell.stdout.split(|b| *b == 0).collect();
        let wanted = [dir, "/home/me/run.toml", sets[0], sets[1], ""];
        assert_eq!(values, wanted.map(str::as_bytes), "number {i}");
        assert_eq!(job.logs, std::path::Path::new(dir).join("logs"));
    }
}
