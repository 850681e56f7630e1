//! Processes that are killed or interrupted: what goes on, what stops, and what the next start finds.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use unveil_testkit::{Lineage, Process, Sandbox, committed, events_of};

const SOON: Duration = Duration::from_secs(120);
const STOP: Duration = Duration::from_secs(5);

/// Starts the micro job.
fn start(s: &Sandbox) -> Process {
    start_with(s, &[])
}

fn start_with(s: &Sandbox, sets: &[&str]) -> Process {
    let config = s.micro_config();
    let config = config.to_string_lossy();
    let mut args = vec!["train", "--config", &config];
    args.extend(sets.iter().flat_map(|set| ["--set", *set]));
    s.spawn(&args)
}

fn after_first_update(s: &Sandbox, train: &mut Process) {
    let run = s.path("run");
    train.until("the first update", SOON, || (!events_of(&run, "train").is_empty()).then_some(()));
    // The worker is in the middle of its next groups.
    std::thread::sleep(Duration::from_millis(100));
}

fn verified(s: &Sandbox) {
    let checks = s.unveil(&["checkpoint", "verify", &s.path("run").to_string_lossy()]).ok().json();
    assert!(!checks.is_empty() && checks.iter().all(|c| c["ok"] == true), "{checks:?}");
}

#[test]
fn a_killed_rollout_worker_is_replaced_and_no_group_is_lost() {
    let s = Sandbox::new();
    let run = s.path("run");
    // Hot sampling makes long responses, so that a kill soon after an update falls into the middle of a group.
    let sets = ["rollout.temperature=4", "rollout.max_new_tokens=160", "rollout.n=8", "learner.steps=5"];
    let mut train = start_with(&s, &sets);
    for step in 1..=3 {
        train.until("an update", SOON, || (events_of(&run, "train").len() >= step).then_some(()));
        std::thread::sleep(Duration::from_millis(60));
        let worker = s.role("rollout").expect("a rollout worker runs");
        worker.kill();
        train.until("another worker", SOON, || s.role("rollout").filter(|w| w.pid != worker.pid));
    }
    let done = train.wait(SOON).ok();
    let told = done.stderr.lines().find(|l| l.contains("rollout worker 0 ended"));
    assert!(told.is_some_and(|l| l.contains("SIGKILL") && l.contains("starting it again")), "{}", done.stderr);
    let freed = events_of(&run, "experience").into_iter().filter(|e| e["event"] == "released" && e["lost"] == true);
    assert!(freed.count() >= 2, "no kill fell into the middle of a group");
    Lineage::read(&run).is_exactly_once(5, 2, 8);
    assert_eq!(s.processes(), []);
}

#[test]
fn a_killed_learner_ends_the_run_and_the_next_start_resumes() {
    let s = Sandbox::new();
    let run = s.path("run");
    let mut train = start(&s);
    train.until("a checkpoint", SOON, || (!committed(&run).is_empty()).then_some(()));
    s.role("learner").expect("the learner runs").kill();
    train.wait(SOON).says(1, &["learner", "SIGKILL"]);
    assert_eq!(s.processes(), [], "nothing is left behind");
    assert!(!run.join("summary.json").exists());
    verified(&s);
    let newest = committed(&run).last().copied().expect("a checkpoint");
    let before = Lineage::read(&run);

    start(&s).wait(SOON).ok();
    let after = Lineage::read(&run);
    assert_eq!(after.resumed, [newest], "it goes on from the newest checkpoint");
    after.is_exactly_once(6, 2, 8);
    let kept = before.steps.iter().filter(|t| t.step <= newest);
    assert!(
        kept.zip(&after.steps).all(|(a, b)| a == b),
        "what was trained before the checkpoint stays\n{before:?}\n{after:?}"
    );
    assert_eq!(s.processes(), []);
    verified(&s);
}

#[test]
fn a_killed_supervisor_takes_all_roles_with_it() {
    let s = Sandbox::new();
    let mut train = start(&s);
    after_first_update(&s, &mut train);
    for role in ["learner", "rollout", "serve"] {
        assert!(s.role(role).is_some(), "`{role}` runs: {:#?}", s.processes());
    }
    train.kill();
    s.all_gone(STOP);
    verified_or_empty(&s);
}

/// Killed as it was, the run may have no checkpoint yet; one that is there must be whole.
fn verified_or_empty(s: &Sandbox) {
    if !committed(&s.path("run")).is_empty() {
        verified(s);
    }
}

#[test]
fn a_supervisor_that_is_killed_in_an_evaluation_takes_it_along() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let config = config.to_string_lossy();
    let mut train = s.spawn(&["train", "--config", &config, "--set", "sft.steps=2", "--set", "data.synth.test=600"]);
    train.until("the evaluation", SOON, || s.role("eval"));
    train.kill();
    s.all_gone(STOP);
    assert!(!s.path("run/eval/before.json").exists(), "it was not over yet");
}

#[test]
fn a_killed_reward_service_is_started_again() {
    let s = Sandbox::new();
    let mut train = start(&s);
    after_first_update(&s, &mut train);
    let service = s.role("serve").expect("the reward service runs");
    service.kill();
    let done = train.wait(SOON).ok();
    assert!(
        done.stderr.contains("reward service ended with signal: 9 (SIGKILL); starting it again"),
        "{}",
        done.stderr
    );
    Lineage::read(&s.path("run")).is_exactly_once(6, 2, 8);
    assert_eq!(s.processes(), []);
}

#[test]
fn an_interrupt_while_data_is_drawn() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let config = config.to_string_lossy();
    let mut train = s.spawn(&["train", "--config", &config, "--set", "data.synth.train=50000"]);
    train.until("drawing", SOON, || s.path("run/data/images").exists().then_some(()));
    let asked = Instant::now();
    train.interrupt();
    train.wait(SOON).says(130, &["interrupted"]);
    assert!(asked.elapsed() < STOP, "stopping took {:?}", asked.elapsed());
    assert!(!s.path("run/data/records.jsonl").exists(), "records come last: half a data set is none");
}

#[test]
fn an_interrupt_stops_everything_and_leaves_a_whole_checkpoint() {
    let s = Sandbox::new();
    let run = s.path("run");
    // Long enough that the interrupt comes in the middle, however slow the machine is.
    let long = ["learner.steps=60"];
    let mut train = start_with(&s, &long);
    after_first_update(&s, &mut train);

    let config = s.micro_config();
    let other = s.unveil(&["train", "--config", &config.to_string_lossy()]);
    other.says(1, &["in use by another", &run.to_string_lossy()]);

    let asked = Instant::now();
    train.interrupt();
    let ended = train.wait(SOON);
    let took = asked.elapsed();
    s.all_gone(STOP.saturating_sub(took));
    assert!(took < STOP, "stopping took {took:?}");
    ended.says(130, &["interrupted", "again to resume"]);
    verified(&s);
    let trained = events_of(&run, "train").len() as u64;
    assert_eq!(committed(&run).last(), Some(&trained), "the checkpoint holds every update");

    start_with(&s, &long).wait(SOON).ok();
    let lineage = Lineage::read(&run);
    assert_eq!(lineage.resumed, [trained]);
    lineage.is_exactly_once(60, 2, 8);
}

#[test]
fn a_termination_in_stage_1_resumes_there() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let (config, run) = (config.to_string_lossy(), s.path("run"));
    let args = ["train", "--config", &config, "--set", "sft.steps=80", "--set", "learner.steps=0"];
    let mut train = s.spawn(&args);
    train.until("updates of stage 1", SOON, || (events_of(&run, "sft").len() >= 2).then_some(()));
    let asked = Instant::now();
    // As Slurm and Kubernetes do it.
    train.signal(Signal::SIGTERM);
    train.wait(SOON).says(130, &["interrupted"]);
    assert!(asked.elapsed() < STOP, "stopping took {:?}", asked.elapsed());
    assert_eq!(s.processes(), []);
    let done = events_of(&run, "sft").len() as u64;
    let place = run.join("sft");
    assert_eq!(committed(&place).last(), Some(&done));
    s.unveil(&["checkpoint", "verify", &place.to_string_lossy()]).ok();

    s.unveil(&args).ok();
    let steps: Vec<u64> = events_of(&run, "sft").iter().filter_map(|e| e["step"].as_u64()).collect();
    assert_eq!(steps, (1..=80).collect::<Vec<_>>(), "no update is done twice");
}
