//! Runs submitted to a real Slurm of four nodes on this machine, as a user submits them. Needs root and Debian's Slurm, which
//! `.ci/setup --tests` installs; `make test-slurm` runs this file alone.

use std::ffi::OsStr;
use std::fs::{Permissions, read_to_string, set_permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use unveil_testkit::{Lineage, MiniSlurm, Sandbox, StoreServer, binary, events_of, read_json};

const SOON: Duration = Duration::from_secs(120);
const STEPS: u64 = 60;

/// Submits a run and returns the job's number.
fn submit(slurm: &MiniSlurm<'_>, s: &Sandbox, args: &[&str]) -> String {
    let args = [&["submit", "slurm"], args].concat();
    let done = s.start(&mut slurm.command(&binary("unveil"), &args)).wait(SOON).ok();
    let said = done.json().remove(0);
    assert!(read_to_string(said["script"].as_str().expect("a script")).is_ok(), "{said}");
    said["job"].as_u64().expect("a number").to_string()
}

fn last(events: &[Value]) -> u64 {
    events.last().and_then(|e| e["step"].as_u64()).unwrap_or(0)
}

#[test]
fn slurm_run_outlives_a_hung_node_and_a_preemption() {
    let s = Sandbox::new();
    let s3 = StoreServer::start(&s);
    let place = s3.url("runs/a");
    let mut slurm = MiniSlurm::start(&s, 4);
    let mut known = Command::new("true");
    let known = s3.tell(&mut known, s3.endpoint()).get_envs();
    let line = |(name, value): (&OsStr, Option<&OsStr>)| {
        format!("{}={}\n", name.display(), value.unwrap_or_default().display())
    };
    let secrets = s.write("secrets", known.map(line).collect::<String>());
    set_permissions(&secrets, Permissions::from_mode(0o600)).expect("private secrets");
    let (config, run) = (s.micro_config(), s.path("run"));
    let (config, secrets, steps) =
        (config.to_string_lossy(), secrets.to_string_lossy(), format!("learner.steps={STEPS}"));
    let flags = ["--config", &config, "--learner-nodes", "2", "--cpus", "1", "--secrets", &secrets];
    let to = format!("checkpoint.url={place}");
    let sets = ["learner.parallel.ranks=2", "learner.parallel.lost_s=5", "learner.checkpoint_every=4", &to, &steps];
    let sets: Vec<&str> = sets.into_iter().flat_map(|set| ["--set", set]).collect();
    let submitted = Instant::now();
    let job = submit(&slurm, &s, &[&flags[..], &sets].concat());
    slurm.until_step(&run, 1, SOON);
    println!("from submission to the first update: {:.1} s", submitted.elapsed().as_secs_f64());
    assert!(!run.join("summary.json").exists(), "what prepares a run does not end it");
    let mut args = s.processes_with("SLURM_JOB_ID", &job).into_iter().flat_map(|p| p.args).peekable();
    assert!(args.peek().is_some() && args.all(|a| !a.contains(s3.secret())), "a secret is an argument");

    // The node of rank 0 and of the batch script hangs: its learner stands still, and Slurm does not hear from it. Right after an
    // update it waits for answers: no event of its own is under way that it could add later.
    slurm.until_step(&run, 5, SOON);
    let of_stage_2 = |kind: &str| events_of(&run, kind).into_iter().filter(|e| e["stage"] == "rl").count();
    slurm.until("a checkpoint", SOON, || (of_stage_2("checkpoint") > 0).then_some(()));
    let rank_0 = || slurm.on_node(1).into_iter().find(|p| p.args.iter().any(|a| a == "learner.parallel.rank=0"));
    let old = rank_0().expect("rank 0 runs on n1");
    let (begun, seen) = (Instant::now(), last(&events_of(&run, "train")));
    while last(&events_of(&run, "train")) == seen {
        assert!(begun.elapsed() < SOON, "no update after {seen}");
        std::thread::sleep(Duration::from_millis(2));
    }
    old.pause();
    slurm.cut_off(1);
    slurm.until("another start on other nodes", SOON, || (of_stage_2("resumed") > 0).then_some(()));
    assert_eq!(slurm.job(&job, "Restarts"), "1");
    assert_eq!(slurm.job(&job, "NodeList"), "n[2-4]");
    // It wakes up while the other start is at work, finds its ranks gone, and can change nothing.
    let at = last(&events_of(&run, "train"));
    slurm.until_step(&run, at + 2, SOON);
    assert!(s.processes().contains(&old), "it is still there");
    old.go_on();
    slurm.until("the end of the old learner", SOON, || (!s.processes().contains(&old)).then_some(()));
    assert_eq!(slurm.job(&job, "Restarts"), "1", "its script does not touch the job");

    // Preempted: a checkpoint of all that was trained, then another start.
    slurm.until_step(&run, 12, SOON);
    let asked = Instant::now();
    slurm.run("scancel", &["--signal=USR1", "--batch", &job]).ok();
    let (mut count, mut committed) = (events_of(&run, "checkpoint").len(), Duration::ZERO);
    slurm.until("a job that waits", SOON, || {
        let now = events_of(&run, "checkpoint").len();
        if now > count {
            (count, committed) = (now, asked.elapsed());
        }
        (slurm.job(&job, "JobState") != "RUNNING").then_some(())
    });
    let saved = last(&events_of(&run, "train"));
    println!("from the signal to a checkpoint of update {saved}: {:.1} s", committed.as_secs_f64());
    assert_eq!(last(&events_of(&run, "checkpoint")), saved, "the checkpoint holds every update");
    slurm.until("the end of the job", SOON, || (slurm.job(&job, "JobState") == "COMPLETED").then_some(()));

    assert_eq!(slurm.job(&job, "Restarts"), "2");
    let lineage = Lineage::read(&run);
    assert_eq!(lineage.resumed.len(), 2, "{lineage:?}");
    assert_eq!(lineage.resumed[1], saved, "it goes on from where it was told to stop");
    lineage.is_exactly_once(STEPS, 2, 8);
    let summary = read_json(&run.join("summary.json"));
    assert_eq!(summary["steps"], STEPS);
    let spent = submitted.elapsed().as_secs_f64();
    let told = summary["wall_s"].as_f64().expect("seconds");
    assert!(told > 5.0 && told < spent, "{told} of {spent} s");
    slurm.until("the end of all roles", SOON, || s.processes_with("SLURM_JOB_ID", &job).is_empty().then_some(()));
    let text = |name: &str| read_to_string(run.join("logs").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(text("rollout-0-0.log").contains("asked to stop"), "{}", text("rollout-0-0.log"));
    for name in ["prepare.log", "learner-0.log", "learner-1.log", "reward-0.log", "finish.log"] {
        assert!(!text(name).contains(s3.secret()), "{name}");
    }
    let script = text(&format!("slurm-{job}.out"));
    assert!(script.contains("told to stop by USR1") && !script.contains(s3.secret()), "{script}");
    let mut verify = s.command(&binary("unveil"), &["checkpoint", "verify", &place]);
    let checks = s.start(s3.tell(&mut verify, s3.endpoint())).wait(SOON).ok().json();
    assert!(!checks.is_empty() && checks.iter().all(|c| c["ok"] == true), "{checks:?}");
}

/// Stands for the roles: each writes down where it runs; the run is over when its learner is, which a first start in `…/long` does not see.
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
fn slurm_takes_arrays_heterogeneous_jobs_and_odd_paths() {
    let s = Sandbox::new();
    let slurm = MiniSlurm::start(&s, 4);
    let config = s.micro_config();
    let roles = s.write("roles", ROLES);
    set_permissions(&roles, Permissions::from_mode(0o755)).expect("a program");
    let (config, roles) = (config.to_string_lossy(), roles.to_string_lossy());
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
        let said = calls(run);
        assert!(said.lines().all(|l| l.contains(&format!("run.seed={seed} "))), "{said}");
        let log = read_to_string(odd.join(format!("logs/slurm-{array}_{seed}.out"))).expect("its log");
        assert!(log.contains("start 1"), "{log}");
    }
    let said = calls(&s.path("het"));
    assert_eq!(said.lines().filter(|l| l.starts_with("rollout")).count(), 2, "{said}");
    assert_eq!(said.lines().filter(|l| l.starts_with("reward")).count(), 2, "{said}");
    let nodes = |role: &str| -> Vec<String> {
        let of = said.lines().filter_map(|l| l.strip_prefix(&format!("{role} on "))?.split(' ').next());
        let mut all: Vec<String> = of.map(str::to_owned).collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    assert_eq!((nodes("learner").len(), nodes("rollout").len(), nodes("reward").len()), (1, 2, 2), "{said}");
    for job in [format!("{array}_5"), format!("{array}_6"), het] {
        slurm.until("the end of the jobs", SOON, || (slurm.job(&job, "JobState") == "COMPLETED").then_some(()));
    }
}

#[test]
fn slurm_starts_a_run_again_when_a_node_dies() {
    let s = Sandbox::new();
    let mut slurm = MiniSlurm::start(&s, 4);
    let roles = s.write("roles", ROLES);
    set_permissions(&roles, Permissions::from_mode(0o755)).expect("a program");
    let (config, roles, run) = (s.micro_config(), roles.to_string_lossy(), s.path("long"));
    let (config, dir) = (config.to_string_lossy(), format!("run.dir={}", run.display()));
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
