//! Behaviour of the script, with small programs in place of `srun`, `scontrol` and the roles; they record how they were called.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use unveil_testkit::{Finished, Process, Sandbox};

use crate::job;

const SOON: Duration = Duration::from_secs(60);

/// Runs the command of a step as its first task, and records its options.
const SRUN: &str = r#"#!/bin/bash
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
printf '%s\n' "${options[*]}" >>"$PLAY/steps"
export SLURM_PROCID=0
# As the job was submitted, unless the step says otherwise.
export=${SLURM_EXPORT_ENV:-ALL} run=()
for o in "${options[@]}"; do [[ $o != --export=* ]] || export=${o#--export=}; done
[ "$export" = ALL ] || run=(env -i PATH="$PATH" PLAY="$PLAY" SLURM_PROCID=0)
"${run[@]}" "$@" &
for s in USR1 TERM; do trap "kill -$s $!" $s; done
while :; do
  wait $!; code=$?
  kill -0 $! 2>/dev/null || exit $code
done
"#;

/// Describes nodes by their names and the job by `$PLAY/job`; requeueing a job ends the calling script.
const SCONTROL: &str = r#"#!/bin/bash
case "$1 $2" in
  "show hostnames") tr , '\n' <<<"$3" ;;
  "show node") echo "NodeName=$4 Arch=x CoresPerSocket=1 NodeAddr=addr-$4 NodeHostName=$4" ;;
  "show job") echo "JobId=$4 $(cat "$PLAY/job")" ;;
  requeue*) echo "$2" >>"$PLAY/requeued"; kill -TERM $PPID ;;
esac
"#;

/// The roles: each call is recorded, and `$PLAY/ROLE`, if it exists, is shell code that replaces the role's behaviour.
const ROLES: &str = r#"#!/bin/bash
printf '%s\n' "$*" >>"$PLAY/calls"
run=$(printf '%s\n' "$@" | sed -n 's/^run.dir=//p')
role=$1
[[ " $* " != *" --prepare "* ]] || role=prepare
trap 'echo "$role told" >>"$PLAY/calls"; exit 130' USR1
[ ! -e "$PLAY/$role" ] || . "$PLAY/$role"
case $role in
  tls) mkdir -p "$4"; echo >"$4/ca.key" ;;
  prepare) echo 10.0 >"$run/wall_s" ;;
  learner) mkdir -p "$run/model"; echo >"$run/model/config.json" ;;
  train) ;;
  *) while [ ! -e "$run/model/config.json" ]; do sleep 0.05; done ;;
esac
"#;

struct Play {
    sandbox: Sandbox,
}

impl Play {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        fs::create_dir(sandbox.path("bin")).unwrap();
        for (name, text) in [
            ("srun", SRUN),
            ("scontrol", SCONTROL),
            ("unveil", ROLES),
            (
                "apptainer",
                "#!/bin/bash\nwhile [ \"$1\" != image.sif ]; do echo \"apptainer $1\" >>\"$PLAY/calls\"; shift; done\nshift\nexec \"$@\"\n",
            ),
        ] {
            let path = sandbox.write(&format!("bin/{name}"), text);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let play = Self { sandbox };
        play.write("job", "JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1 ");
        play
    }

    fn write(&self, file: &str, text: &str) {
        self.sandbox.write(file, text);
    }

    fn lines(&self, file: &str) -> Vec<String> {
        let text = fs::read_to_string(self.sandbox.path(file)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn calls(&self) -> String {
        self.lines("calls").join("\n")
    }

    /// Starts the script of a run without TLS, with one learner node and two worker nodes.
    fn start(&self, flags: &[&str], variables: &[(&str, &str)]) -> Process {
        self.start_with("tls.insecure=true", flags, variables)
    }

    fn start_with(&self, set: &str, flags: &[&str], variables: &[(&str, &str)]) -> Process {
        let program = self.sandbox.path("bin/unveil");
        let program = program.to_string_lossy();
        let flags = [&["--rollout-nodes", "2", "--program", &program], flags].concat();
        let sets = ["rollout.workers=2", "run.device=cpu", "checkpoint.url=s3://bucket/a", set];
        let job = job(&self.sandbox.path("").to_string_lossy(), &flags, &sets).unwrap_or_else(|e| panic!("{e}"));
        let script = self.sandbox.write("script", job.script);
        let mut command = self.sandbox.command(Path::new("bash"), &[&script.to_string_lossy()]);
        let path = format!("{}:/usr/bin:/bin", self.sandbox.path("bin").display());
        command.env("PATH", path).env("PLAY", self.sandbox.path(""));
        command.env("SLURM_JOB_ID", "77").env("SLURM_JOB_NODELIST", "n1,n2,n3").env("SLURM_CPUS_PER_TASK", "9");
        command.envs(variables.iter().copied());
        self.sandbox.start(&mut command)
    }

    fn run(&self, flags: &[&str], variables: &[(&str, &str)]) -> Finished {
        self.start(flags, variables).wait(SOON)
    }
}

#[test]
fn secrets_reach_steps_without_exported_environment() {
    let play = Play::new();
    let file = play.sandbox.write("secrets", "AWS_SECRET_ACCESS_KEY=marked\n");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    play.write("learner", "echo \"learner sees $AWS_SECRET_ACCESS_KEY\" >>\"$PLAY/calls\"");
    let file = file.to_string_lossy();
    let flags = ["--secrets", &file, "--sbatch", "export=NONE"];
    play.run(&flags, &[("SLURM_EXPORT_ENV", "NONE")]).ok();
    assert!(play.calls().contains("learner sees marked"), "{}", play.calls());
}

#[test]
fn steps_of_a_run_are_in_order() {
    let play = Play::new();
    play.write("learner", "sleep 1.2");
    let done = play.run(&[], &[]).ok();
    assert!(done.stderr.contains("start 1, learner http://addr-n1:11233, ports from 11232"), "{}", done.stderr);
    let calls = play.lines("calls");
    let named = |part: &str| -> Vec<&String> { calls.iter().filter(|c| c.starts_with(part)).collect() };
    assert!(calls[0].starts_with("train ") && calls[0].ends_with(" --prepare"), "{calls:#?}");
    assert!(calls.last().is_some_and(|c| c.starts_with("train ") && !c.contains("--prepare")), "{calls:#?}");
    let learner = named("learner ")[0];
    let run = play.sandbox.path("runs/run").display().to_string();
    for part in [
        &format!("--set run.dir={run} "),
        "--set learner.parallel.ranks=1 ",
        "--set checkpoint.url=s3://bucket/a ",
        "--set learner.parallel.rendezvous=addr-n1:11232 ",
        "--set learner.listen=addr-n1:11233 ",
        "--set learner.parallel.rank=0",
    ] {
        assert!(learner.contains(part), "{part}: {learner}");
    }
    assert!(named("reward serve ")[0].ends_with("--set reward.listen=addr-n2:11234"), "{calls:#?}");
    let workers = named("rollout ");
    assert_eq!(workers.len(), 2);
    for node in 0..2 {
        let wanted = format!(
            "--set learner.address=http://addr-n1:11233 --set reward.address=http://addr-n2:11234 --worker rollout-{node}-0#0"
        );
        assert!(workers.iter().any(|w| w.ends_with(&wanted)), "{wanted}: {workers:#?}");
    }
    let steps = play.lines("steps");
    let learner = steps.iter().find(|s| s.contains("--job-name=learner ")).expect("the learner's step");
    for option in
        ["--exact", "--cpus-per-task=4", "--kill-on-bad-exit=1", "--nodelist=n1", "--gres=none", "/logs/learner-%t.log"]
    {
        assert!(learner.contains(option), "{option}: {learner}");
    }
    let seconds: f64 = play.lines("runs/run/wall_s")[0].parse().unwrap();
    assert!((11.0..40.0).contains(&seconds), "10 s of preparation, and what the roles took: {seconds}");
    assert_eq!(play.lines("requeued"), Vec::<String>::new());
}

#[test]
fn signal_saves_and_requeues() {
    let play = Play::new();
    play.write("learner", "touch \"$PLAY/up\"; while :; do sleep 0.05; done");
    let mut script = play.start(&[], &[]);
    script.until("the learner", SOON, || play.sandbox.path("up").exists().then_some(()));
    script.until("all roles", SOON, || (play.calls().matches("rollout-").count() >= 2).then_some(()));
    std::thread::sleep(Duration::from_millis(300));
    script.signal(Signal::SIGUSR1);
    let done = script.wait(SOON).ok();
    assert!(
        done.stderr.contains("received USR1, stopping") && done.stderr.contains("requeuing the job"),
        "{}",
        done.stderr
    );
    assert_eq!(play.lines("requeued"), ["77"]);
    let calls = play.calls();
    for role in ["learner told", "rollout told", "reward told"] {
        assert!(calls.contains(role), "{role}\n{calls}");
    }
    let started = |role: &str| calls.lines().filter(|c| c.starts_with(&format!("{role} --config"))).count();
    assert_eq!((started("learner"), started("rollout")), (1, 2), "the script itself restarts nothing: {calls}");
    assert!(!calls.lines().last().is_some_and(|c| c.starts_with("train ")), "the run is not finished: {calls}");
}

#[test]
fn failure_is_requeued_unless_repeated_at_one_update() {
    let play = Play::new();
    play.write(
        "learner",
        "echo '{\"kind\":\"train\",\"step\":'$SLURM_RESTART_COUNT',\"pass\":0}' >>\"$run/events.jsonl\"; sleep 0.7; exit 1",
    );
    let start = |count: &str| {
        play.write("job", &format!("JobState=RUNNING Requeue=1 Restarts={count} "));
        play.run(&[], &[("SLURM_RESTART_COUNT", count)])
    };
    start("0").ok();
    start("1").ok();
    assert_eq!(play.lines("requeued"), ["77", "77"], "there is an update between the two");
    play.write("learner", "sleep 0.7; exit 1");
    let done = start("2").exits(1);
    assert!(
        done.stderr.contains("learner ended with code 1") && done.stderr.contains("no update in between"),
        "{}",
        done.stderr
    );
    assert_eq!(play.lines("requeued").len(), 2);
}

#[test]
fn restart_limit_is_respected() {
    let play = Play::new();
    play.write("learner", "sleep 0.7; exit 1");
    play.write("job", "JobState=RUNNING Requeue=1 Restarts=2 ");
    let done = play.run(&["--max-restarts", "2"], &[("SLURM_RESTART_COUNT", "2")]).exits(1);
    assert!(done.stderr.contains("the limit of 2 is reached"), "{}", done.stderr);
    // Slurm itself requeues a job after a node failure, without regard to the limit.
    let done = play.run(&["--max-restarts", "2"], &[("SLURM_RESTART_COUNT", "3")]).exits(1);
    assert!(done.stderr.contains("restarted 3 times; the limit is 2"), "{}", done.stderr);
    assert_eq!(play.lines("requeued"), Vec::<String>::new());
}

#[test]
fn finished_start_does_not_requeue_the_job() {
    for state in ["JobState=RUNNING Restarts=1 ", "JobState=CANCELLED Restarts=0 ", "JobState=PENDING Restarts=1 "] {
        let play = Play::new();
        play.write("learner", "sleep 0.7; exit 1");
        play.write("job", state);
        let done = play.run(&[], &[]).exits(1);
        assert!(done.stderr.contains("this start of job 77 is over"), "{state}: {}", done.stderr);
        assert_eq!(play.lines("requeued"), Vec::<String>::new(), "{state}");
    }
}

#[test]
fn rejected_configuration_ends_the_job() {
    for (role, code) in [("prepare", 2), ("learner", 2), ("rollout", 2)] {
        let play = Play::new();
        play.write(role, "exit 2");
        let slow = if role == "learner" { "sleep 0.7; exit 2" } else { "while :; do sleep 0.05; done" };
        play.write("learner", slow);
        let done = play.run(&[], &[]).exits(code);
        assert!(
            done.stderr.contains(role) && done.stderr.contains("refuses its configuration"),
            "{role}: {}",
            done.stderr
        );
        assert_eq!(play.lines("requeued"), Vec::<String>::new(), "{role}");
    }
}

#[test]
fn failed_worker_is_restarted_under_another_name() {
    let play = Play::new();
    play.write("rollout", "[[ $* != *rollout-1-0#0 ]] || exit 7");
    play.write("learner", "until grep -q 'rollout-1-0#1' \"$PLAY/calls\"; do sleep 0.05; done");
    let done = play.run(&[], &[]).ok();
    assert!(done.stderr.contains("rollout-1 ended with code 7; restarting it"), "{}", done.stderr);
    assert!(!play.calls().contains("rollout-0-0#1"), "{}", play.calls());
}

#[test]
fn each_seed_of_an_array_is_a_separate_run() {
    let play = Play::new();
    play.write("learner", "sleep 0.7; exit 1");
    let array = [("SLURM_ARRAY_JOB_ID", "77"), ("SLURM_ARRAY_TASK_ID", "3")];
    play.run(&["--seeds", "0-3"], &array).ok();
    assert_eq!(play.lines("requeued"), ["77_3"], "the other seeds continue");
    let calls = play.calls();
    let run = play.sandbox.path("runs/run/seed-3");
    for part in [&format!("run.dir={} ", run.display()), "run.seed=3 ", "checkpoint.url=s3://bucket/a/seed-3 "] {
        assert!(calls.lines().filter(|c| !c.ends_with(" told")).all(|c| c.contains(part)), "{part}: {calls}");
    }
    assert!(run.join("logs/failed-at").exists());
}

#[test]
fn heterogeneous_job_names_its_parts() {
    let play = Play::new();
    let lists = [("SLURM_JOB_NODELIST_HET_GROUP_0", "n1"), ("SLURM_JOB_NODELIST_HET_GROUP_1", "m1,m2")];
    play.run(&["--heterogeneous"], &lists).ok();
    let steps = play.lines("steps");
    for (name, group) in [("prepare", 0), ("learner", 0), ("reward-0", 1), ("rollout-0", 1), ("rollout-1", 1)] {
        let step = steps.iter().find(|s| s.contains(&format!("--job-name={name} "))).expect(name);
        assert!(step.contains(&format!("--het-group={group}")), "{step}");
    }
    // The nodes of the job do not match the settings.
    let done = play.run(&["--heterogeneous"], &[lists[0], ("SLURM_JOB_NODELIST_HET_GROUP_1", "m1")]).exits(2);
    assert!(
        done.stderr.contains("the job has 1 + 1 nodes, but LEARNER_NODES is 1 and ROLLOUT_NODES 2"),
        "{}",
        done.stderr
    );
}

#[test]
fn secrets_reach_the_roles_but_no_argument() {
    let play = Play::new();
    play.write("secrets", "KEY='very secret $x'\n");
    let path = play.sandbox.path("secrets");
    let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o600);
    play.write("learner", "[ \"$KEY\" = 'very secret $x' ] || exit 2");
    let flags = ["--secrets", &path.to_string_lossy()];
    play.run(&flags, &[]).ok();
    let all = play.calls() + &play.lines("steps").join("\n");
    assert!(!all.contains("very secret"), "{all}");
    // A file that became readable after the submission is not used.
    let script = play.sandbox.path("script");
    mode(0o644);
    let mut again = play.sandbox.command(Path::new("bash"), &[&script.to_string_lossy()]);
    let path = format!("{}:/usr/bin:/bin", play.sandbox.path("bin").display());
    again
        .env("PATH", path)
        .env("PLAY", play.sandbox.path(""))
        .env("SLURM_JOB_ID", "77")
        .env("SLURM_JOB_NODELIST", "n1,n2,n3");
    let done = play.sandbox.start(&mut again).wait(SOON).exits(2);
    assert!(done.stderr.contains("can be read by others"), "{}", done.stderr);
}

#[test]
fn containers_use_the_chosen_runtime() {
    let play = Play::new();
    let flags = ["--container", "image.sif", "--mount", "/scratch"];
    play.run(&flags, &[]).ok();
    let here = play.sandbox.path("").display().to_string();
    let here = here.trim_end_matches('/');
    let wanted = format!(
        "--container-image=image.sif --container-workdir={here} --container-mounts={here}:{here},/scratch:/scratch "
    );
    let steps = play.lines("steps");
    assert!(steps.len() >= 5 && steps.iter().all(|s| s.contains(&wanted)), "{wanted}: {steps:#?}");

    let play = Play::new();
    play.run(&[&flags[..], &["--runtime", "apptainer"]].concat(), &[]).ok();
    let calls = play.calls();
    for part in ["apptainer exec", "apptainer --pwd", "apptainer --bind", "apptainer /scratch", "learner --config"] {
        assert!(calls.contains(part), "{part}: {calls}");
    }
    assert!(!play.lines("steps").iter().any(|s| s.contains("container")), "srun gets no container options");
}

#[test]
fn certificates_and_token_belong_to_the_run() {
    let play = Play::new();
    let run = play.sandbox.path("runs/run");
    let start = || {
        play.start_with("run.seed=1", &[], &[]).wait(SOON).ok();
        let calls = play.lines("calls");
        let tls = calls.iter().rfind(|c| c.starts_with("tls init")).expect("certificates").clone();
        let token = fs::read_to_string(run.join("tls/token")).expect("a token");
        (calls.join("\n"), tls, token)
    };
    let (calls, tls, token) = start();
    let wanted = format!("tls init --out {}/tls --hosts n1,addr-n1,n2,addr-n2,n3,addr-n3", run.display());
    assert_eq!(tls, wanted);
    assert!(token.len() == 64 && !calls.contains(&token), "{token}");
    let mode = fs::metadata(run.join("tls/token")).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    for part in [format!("tls.dir={}/tls ", run.display()), format!("auth.token_file={}/tls/token ", run.display())] {
        assert!(calls.lines().skip(1).all(|c| format!("{c} ").contains(&part)), "{part}: {calls}");
    }
    assert!(calls.contains("learner.address=https://addr-n1:11233 "), "{calls}");
    // Another start keeps the authority and the token.
    fs::remove_dir_all(run.join("model")).unwrap();
    let (_, tls, again) = start();
    assert_eq!((tls, again), (format!("{wanted} --renew"), token));
}
