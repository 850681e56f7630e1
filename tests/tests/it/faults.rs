//! Killed and interrupted processes: what continues, what stops, and what the next start resumes.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use unveil_testkit::{Lineage, Process, Sandbox, committed_steps, events_of};

const SOON: Duration = Duration::from_secs(120);
const STOP: Duration = Duration::from_secs(5);

/// Starts the micro job.
fn start(s: &Sandbox) -> Process {
    start_with(s, &[])
}

fn start_with(s: &Sandbox, sets: &[&str]) -> Process {
    s.start_micro("train", sets)
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
fn killed_rollout_workers_are_replaced() {
    let s = Sandbox::new();
    let run = s.path("run");
    // A high temperature makes long responses, so that a kill soon after an update interrupts a group.
    let sets = ["rollout.temperature=4", "rollout.max_new_tokens=160", "rollout.n=8", "learner.steps=5"];
    let mut train = start_with(&s, &sets);
    for step in 1..=3 {
        train.until("an update", SOON, || (events_of(&run, "train").len() >= step).then_some(()));
        std::thread::sleep(Duration::from_millis(60));
        let worker = s.find_role("rollout").expect("a rollout worker runs");
        worker.kill();
        train.until("another worker", SOON, || s.find_role("rollout").filter(|w| w.pid != worker.pid));
    }
    let done = train.wait(SOON).ok();
    let logged = done.stderr.lines().find(|l| l.contains("rollout worker 0 ended"));
    assert!(logged.is_some_and(|l| l.contains("SIGKILL") && l.contains("restarting it")), "{}", done.stderr);
    let freed = events_of(&run, "experience").into_iter().filter(|e| e["event"] == "released" && e["lost"] == true);
    assert!(freed.count() >= 2, "no kill interrupted a group");
    Lineage::read(&run).assert_exactly_once(5, 2, 8);
    assert_eq!(s.processes(), []);
}

#[test]
fn killed_learners_end_the_run_and_it_resumes() {
    let s = Sandbox::new();
    let run = s.path("run");
    let mut train = start(&s);
    train.until("a checkpoint", SOON, || (!committed_steps(&run).is_empty()).then_some(()));
    s.find_role("learner").expect("the learner runs").kill();
    train.wait(SOON).fails_with(1, &["learner", "SIGKILL"]);
    assert_eq!(s.processes(), [], "nothing is left behind");
    assert!(!run.join("summary.json").exists());
    verified(&s);
    let newest = committed_steps(&run).last().copied().expect("a checkpoint");
    let before = Lineage::read(&run);

    start(&s).wait(SOON).ok();
    let after = Lineage::read(&run);
    assert_eq!(after.resumed, [newest], "it resumes from the newest checkpoint");
    after.assert_exactly_once(6, 2, 8);
    let kept = before.steps.iter().filter(|t| t.step <= newest);
    assert!(
        kept.zip(&after.steps).all(|(a, b)| a == b),
        "what was trained before the checkpoint stays\n{before:?}\n{after:?}"
    );
    assert_eq!(s.processes(), []);
    verified(&s);
}

#[test]
fn killed_supervisors_end_all_roles() {
    let s = Sandbox::new();
    let mut train = start(&s);
    after_first_update(&s, &mut train);
    for role in ["learner", "rollout", "serve"] {
        assert!(s.find_role(role).is_some(), "`{role}` runs: {:#?}", s.processes());
    }
    train.kill();
    s.assert_all_exit(STOP);
    verified_or_empty(&s);
}

/// The killed run may have no checkpoint yet; existing ones must be complete.
fn verified_or_empty(s: &Sandbox) {
    if !committed_steps(&s.path("run")).is_empty() {
        verified(s);
    }
}

#[test]
fn killed_supervisors_end_a_running_evaluation() {
    let s = Sandbox::new();
    let mut train = start_with(&s, &["sft.steps=2", "data.synth.test=600"]);
    train.until("the evaluation", SOON, || s.find_role("eval"));
    train.kill();
    s.assert_all_exit(STOP);
    assert!(!s.path("run/eval/before.json").exists(), "it was not finished yet");
}

#[test]
fn killed_reward_services_are_restarted() {
    let s = Sandbox::new();
    let mut train = start(&s);
    after_first_update(&s, &mut train);
    let service = s.find_role("serve").expect("the reward service runs");
    service.kill();
    let done = train.wait(SOON).ok();
    assert!(done.stderr.contains("reward service ended with signal: 9 (SIGKILL); restarting it"), "{}", done.stderr);
    Lineage::read(&s.path("run")).assert_exactly_once(6, 2, 8);
    assert_eq!(s.processes(), []);
}

#[test]
fn interrupts_during_data_synthesis() {
    let s = Sandbox::new();
    let mut train = start_with(&s, &["data.synth.train=50000"]);
    train.until("drawing", SOON, || s.path("run/data/images").exists().then_some(()));
    let signalled = Instant::now();
    train.interrupt();
    train.wait(SOON).fails_with(130, &["interrupted"]);
    assert!(signalled.elapsed() < STOP, "stopping took {:?}", signalled.elapsed());
    assert!(!s.path("run/data/records.jsonl").exists(), "records are written last: a partial data set has none");
}

#[test]
fn interrupts_save_a_checkpoint_and_stop_all_roles() {
    let s = Sandbox::new();
    let run = s.path("run");
    // Enough steps that the interrupt comes in the middle on any machine.
    let long = ["learner.steps=60"];
    let mut train = start_with(&s, &long);
    after_first_update(&s, &mut train);

    let other = s.run_micro("train", &[]);
    other.fails_with(1, &["in use by another", &run.to_string_lossy()]);

    let signalled = Instant::now();
    train.interrupt();
    let ended = train.wait(SOON);
    let took = signalled.elapsed();
    s.assert_all_exit(STOP.saturating_sub(took));
    assert!(took < STOP, "stopping took {took:?}");
    ended.fails_with(130, &["interrupted", "again to resume"]);
    verified(&s);
    let trained = events_of(&run, "train").len() as u64;
    assert_eq!(committed_steps(&run).last(), Some(&trained), "the checkpoint holds every update");

    start_with(&s, &long).wait(SOON).ok();
    let lineage = Lineage::read(&run);
    assert_eq!(lineage.resumed, [trained]);
    lineage.assert_exactly_once(60, 2, 8);
}

#[test]
fn terminations_in_stage_1_resume_there() {
    let s = Sandbox::new();
    let run = s.path("run");
    let sets = ["sft.steps=80", "learner.steps=0"];
    let mut train = start_with(&s, &sets);
    train.until("updates of stage 1", SOON, || (events_of(&run, "sft").len() >= 2).then_some(()));
    let signalled = Instant::now();
    // Like Slurm and Kubernetes.
    train.signal(Signal::SIGTERM);
    train.wait(SOON).fails_with(130, &["interrupted"]);
    assert!(signalled.elapsed() < STOP, "stopping took {:?}", signalled.elapsed());
    assert_eq!(s.processes(), []);
    let done = events_of(&run, "sft").len() as u64;
    let place = run.join("sft");
    assert_eq!(committed_steps(&place).last(), Some(&done));
    s.unveil(&["checkpoint", "verify", &place.to_string_lossy()]).ok();

    s.run_micro("train", &sets).ok();
    let steps: Vec<u64> = events_of(&run, "sft").iter().filter_map(|e| e["step"].as_u64()).collect();
    assert_eq!(steps, (1..=80).collect::<Vec<_>>(), "no update is done twice");
}
