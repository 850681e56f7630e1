//! Runs submitted to a real Slurm of four nodes on this machine. Needs root and Debian's Slurm, which `.ci/setup --tests` installs;
//! `make test-slurm` runs only this module.

use std::ffi::OsStr;
use std::fs::{Permissions, read_to_string, set_permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use unveil_testkit::{Lineage, MiniSlurm, Sandbox, StoreServer, binary, events_of, read_json};

const SOON: Duration = Duration::from_secs(120);
const STEPS: u64 = 60;

/// Submits a run and returns the job id.
fn submit(slurm: &MiniSlurm<'_>, s: &Sandbox, args: &[&str]) -> String {
    let args = [&["submit", "slurm"], args].concat();
    let done = s.start(&mut slurm.command(&binary("unveil"), &args)).wait(SOON).ok();
    let submitted = done.json().remove(0);
    assert!(read_to_string(submitted["script"].as_str().expect("a script")).is_ok(), "{submitted}");
    submitted["job"].as_u64().expect("a number").to_string()
}

/// Returns the step of the last event.
fn last_step(events: &[Value]) -> u64 {
    events.last().and_then(|e| e["step"].as_u64()).unwrap_or(0)
}

#[test]
fn slurm_runs_survive_a_hung_node_and_a_preemption() {
    let s = Sandbox::new();
    let s3 = StoreServer::start(&s);
    let place = s3.url("runs/a");
    let mut slurm = MiniSlurm::start(&s, 4);
    let mut known = Command::new("true");
    let known = s3.configure(&mut known, s3.endpoint()).get_envs();
    let line = |(name, value): (&OsStr, Option<&OsStr>)| {
        format!("{}={}\n", name.display(), value.unwrap_or_default().display())
    };
    let secrets = s.write("secrets", known.map(line).collect::<String>());
    set_permissions(&secrets, Permissions::from_mode(0o600)).expect("private secrets");
    let config = s.micro_config();
    let run = s.path("run");
    let secrets = secrets.to_string_lossy();
    let steps = format!("learner.steps={STEPS}");
    let flags = ["--config", &config, "--learner-nodes", "2", "--cpus", "1", "--secrets", &secrets];
    let to = format!("checkpoint.url={place}");
    let sets = ["learner.parallel.ranks=2", "learner.parallel.lost_s=5", "learner.checkpoint_every=4", &to, &steps];
    let sets: Vec<&str> = sets.into_iter().flat_map(|set| ["--set", set]).collect();
    let submitted = Instant::now();
    let job = submit(&slurm, &s, &[&flags[..], &sets].concat());
    slurm.until_step(&run, 1, SOON);
    println!("from submission to the first update: {:.1} s", submitted.elapsed().as_secs_f64());
    assert!(!run.join("summary.json").exists(), "preparing a run does not finish it");
    let mut args = s.processes_with("SLURM_JOB_ID", &job).into_iter().flat_map(|p| p.args).peekable();
    assert!(args.peek().is_some() && args.all(|a| !a.contains(s3.secret())), "a secret is an argument");

    // The node of rank 0 and of the batch script hangs: its learner is stopped, and its slurmd does not respond. Right after an update
    // the learner waits for responses, so it cannot append an event in progress later.
    slurm.until_step(&run, 5, SOON);
    let stage_2_events = |kind: &str| events_of(&run, kind).into_iter().filter(|e| e["stage"] == "rl").count();
    slurm.until("a checkpoint", SOON, || (stage_2_events("checkpoint") > 0).then_some(()));
    let rank_0 = || slurm.on_node(1).into_iter().find(|p| p.args.iter().any(|a| a == "learner.parallel.rank=0"));
    let old = rank_0().expect("rank 0 runs on n1");
    let start = Instant::now();
    let before = last_step(&events_of(&run, "train"));
    while last_step(&events_of(&run, "train")) == before {
        assert!(start.elapsed() < SOON, "no update after {before}");
        std::thread::sleep(Duration::from_millis(2));
    }
    old.pause();
    slurm.kill_slurmd(1);
    slurm.until("a restart on other nodes", SOON, || (stage_2_events("resumed") > 0).then_some(()));
    assert_eq!(slurm.job(&job, "Restarts"), "1");
    assert_eq!(slurm.job(&job, "NodeList"), "n[2-4]");
    // The old learner wakes up while the restarted run works, finds its ranks dead, and cannot change anything.
    let current = last_step(&events_of(&run, "train"));
    slurm.until_step(&run, current + 2, SOON);
    assert!(s.processes().contains(&old), "it still exists");
    old.resume();
    slurm.until("the end of the old learner", SOON, || (!s.processes().contains(&old)).then_some(()));
    assert_eq!(slurm.job(&job, "Restarts"), "1", "its script does not touch the job");

    // Preemption: a checkpoint with all updates, then a restart.
    slurm.until_step(&run, 12, SOON);
    let signalled = Instant::now();
    slurm.run("scancel", &["--signal=USR1", "--batch", &job]).ok();
    let mut count = events_of(&run, "checkpoint").len();
    let mut committed_after = Duration::ZERO;
    slurm.until("a job that waits", SOON, || {
        let now = events_of(&run, "checkpoint").len();
        if now > count {
            count = now;
            committed_after = signalled.elapsed();
        }
        (slurm.job(&job, "JobState") != "RUNNING").then_some(())
    });
    let saved = last_step(&events_of(&run, "train"));
    println!("from the signal to a checkpoint of update {saved}: {:.1} s", committed_after.as_secs_f64());
    assert_eq!(last_step(&events_of(&run, "checkpoint")), saved, "the checkpoint has every update");
    slurm.until("the end of the job", SOON, || (slurm.job(&job, "JobState") == "COMPLETED").then_some(()));

    assert_eq!(slurm.job(&job, "Restarts"), "2");
    let lineage = Lineage::read(&run);
    assert_eq!(lineage.resumed.len(), 2, "{lineage:?}");
    assert_eq!(lineage.resumed[1], saved, "it resumes where it was told to stop");
    lineage.assert_exactly_once(STEPS, 2, 8);
    let summary = read_json(&run.join("summary.json"));
    assert_eq!(summary["steps"], STEPS);
    let elapsed = submitted.elapsed().as_secs_f64();
    let reported = summary["wall_s"].as_f64().expect("seconds");
    assert!(reported > 5.0 && reported < elapsed, "{reported} of {elapsed} s");
    slurm.until("the end of all roles", SOON, || s.processes_with("SLURM_JOB_ID", &job).is_empty().then_some(()));
    let text = |name: &str| read_to_string(run.join("logs").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(text("rollout-0-0.log").contains("asked to stop"), "{}", text("rollout-0-0.log"));
    for name in ["prepare.log", "learner-0.log", "learner-1.log", "reward-0.log", "finish.log"] {
        assert!(!text(name).contains(s3.secret()), "{name}");
    }
    let script = text(&format!("slurm-{job}.out"));
    assert!(script.contains("received USR1, stopping") && !script.contains(s3.secret()), "{script}");
    let mut verify = s.command(&binary("unveil"), &["checkpoint", "verify", &place]);
    let checks = s.start(s3.configure(&mut verify, s3.endpoint())).wait(SOON).ok().json();
    assert!(!checks.is_empty() && checks.iter().all(|c| c["ok"] == true), "{checks:?}");
}

/// Fake roles: each records where it runs, and the run ends with its learner. The first start of a run in `…/long` hangs.
const ROLES: &str = r#"#!/bin/bash
run=$(printf '%s\n' "$@" | sed -n 's/^run.dir=//p' | tail -n 1)
echo "$1 on $SLURMD_NODENAME task $SLURM_PROCID: $*" >>"$run/calls"
case "$1 $*" in
  train*--prepare*) echo 1.0 >"$run/wall_s" ;;
  learner*) case "$run/${SLURM_RESTART_COUNT:-0}" in */long/0) sleep 300 ;; esac
    sleep 1; mkdir -p "$run/model"; echo >"$run/model/config.json" ;;
  train*) ;;
  *) while [ ! -e "$run/model/config.json" ]; do sleep 0.1; done ;;
esac
"#;

#[test]
fn slurm_accepts_arrays_heterogeneous_jobs_and_odd_paths() {
    let s = Sandbox::new();
    let slurm = MiniSlurm::start(&s, 4);
    let config = s.micro_config();
    let roles = s.write("roles", ROLES);
    set_permissions(&roles, Permissions::from_mode(0o755)).expect("a program");
    let roles = roles.to_string_lossy();
    let odd = s.path("it's 100% #1");
    let plain = ["--set", "tls.insecure=true", "--sbatch", "comment=two words"];
    let common = [&["--config", &config, "--program", &roles, "--cpus", "1"][..], &plain].concat();
    let dir = format!("run.dir={}", odd.display());
    let array = submit(&slurm, &s, &[&common[..], &["--seeds", "5,6", "--set", &dir]].concat());
    let other = format!("run.dir={}", s.path("het").display());
    let het = ["--heterogeneous", "--rollout-nodes", "2", "--set", "rollout.workers=2", "--set", &other];
    let het = submit(&slurm, &s, &[&common[..], &["--reward-tasks", "2"], &het].concat());
    let calls = |run: &std::path::Path| read_to_string(run.join("calls")).unwrap_or_default();
    let seeds = [odd.join("seed-5"), odd.join("seed-6")];
    let done = |run: &std::path::Path| calls(run).lines().filter(|l| l.starts_with("train")).count() == 2;
    slurm.until("two seeds and one more", SOON, || {
        (seeds.iter().all(|r| done(r)) && done(&s.path("het"))).then_some(())
    });
    for (seed, run) in [5, 6].into_iter().zip(&seeds) {
        let log = calls(run);
        assert!(log.lines().all(|l| l.contains(&format!("run.seed={seed} "))), "{log}");
        let output = read_to_string(odd.join(format!("logs/slurm-{array}_{seed}.out"))).expect("its log");
        assert!(output.contains("start 1"), "{output}");
    }
    let log = calls(&s.path("het"));
    assert_eq!(log.lines().filter(|l| l.starts_with("rollout")).count(), 2, "{log}");
    assert_eq!(log.lines().filter(|l| l.starts_with("reward")).count(), 2, "{log}");
    let nodes = |role: &str| -> Vec<String> {
        let nodes = log.lines().filter_map(|l| l.strip_prefix(&format!("{role} on "))?.split(' ').next());
        let mut all: Vec<String> = nodes.map(str::to_owned).collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    assert_eq!((nodes("learner").len(), nodes("rollout").len(), nodes("reward").len()), (1, 2, 2), "{log}");
    for job in [format!("{array}_5"), format!("{array}_6"), het] {
        slurm.until("the end of the jobs", SOON, || (slurm.job(&job, "JobState") == "COMPLETED").then_some(()));
    }
}

#[test]
fn slurm_restarts_runs_after_the_death_of_a_node() {
    let s = Sandbox::new();
    let mut slurm = MiniSlurm::start(&s, 4);
    let roles = s.write("roles", ROLES);
    set_permissions(&roles, Permissions::from_mode(0o755)).expect("a program");
    let config = s.micro_config();
    let roles = roles.to_string_lossy();
    let run = s.path("long");
    let dir = format!("run.dir={}", run.display());
    let flags =
        ["--config", &config, "--program", &roles, "--cpus", "1", "--learner-nodes", "2", "--rollout-nodes", "1"];
    let sets = ["--set", "tls.insecure=true", "--set", "learner.parallel.ranks=2", "--set", &dir];
    let job = submit(&slurm, &s, &[&flags[..], &sets].concat());
    let learners = || -> Vec<String> {
        let calls = read_to_string(run.join("calls")).unwrap_or_default();
        let nodes = calls.lines().filter_map(|l| l.strip_prefix("learner on ")?.split(' ').next().map(str::to_owned));
        nodes.collect()
    };
    slurm.until("learners", SOON, || (learners().len() == 2).then_some(()));
    let dead = learners().into_iter().max().expect("two nodes");
    assert_ne!(dead, "n1", "the batch script's node lives");
    slurm.kill_node(dead[1..].parse().expect("its number"));
    slurm.until("the end of the job", SOON, || (slurm.job(&job, "JobState") == "COMPLETED").then_some(()));
    assert_eq!(slurm.job(&job, "Restarts"), "1");
    let again = learners().split_off(2);
    assert!(again.len() == 2 && !again.contains(&dead), "{dead} is dead: {again:?}");
}
