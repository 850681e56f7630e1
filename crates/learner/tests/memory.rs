//! An update for which there is not enough memory: the error says what it takes and what to lower, and the process ends in order.

mod common;

use std::process::Command;

use common::{configured, low_tokens, model, rollout};
use nix::sys::resource::{Resource, setrlimit};
use unveil_config::schema::Algorithm;
use unveil_learner::{Learner, LearnerError, TrainGroup};

const TOLD: &str = "UNVEIL_TEST_MEMORY";

/// Virtual memory of this process in bytes.
fn held() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
#[ignore = "started by another test, in a process of its own"]
fn short() {
    assert!(std::env::var_os(TOLD).is_some(), "started by another test");
    let vlm = model(3);
    let settings = configured(&vlm, 4, |l| l.algorithm = Algorithm::Grpo);
    let mut learner = Learner::new(vlm, None, settings).unwrap();
    let small = rollout(learner.vlm(), 2, 4, 0, &low_tokens);
    learner.update(&small).unwrap();
    let some = rollout(learner.vlm(), 8, 8, 1, &low_tokens);
    let many: Vec<TrainGroup> = some.iter().cycle().take(400).cloned().collect();
    let plan = learner.memory_plan(&many);
    let limit = held() + (96 << 20);
    assert!(plan.activations > 4 * (96 << 20), "{plan}");
    setrlimit(Resource::RLIMIT_AS, limit, limit).unwrap();
    match learner.update(&many) {
        Err(e @ LearnerError::OutOfMemory { .. }) => println!("told: {e}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn too_little_memory_is_told_with_the_plan() {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["short", "--exact", "--ignored", "--nocapture"]).env(TOLD, "1").env("OMP_NUM_THREADS", "1");
    let ended = child.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success(), "{out}{err}");
    let told = out.lines().find(|l| l.contains("told: ")).unwrap_or_default();
    for part in
        ["not enough memory", "optimiser", "activations", "learner.token_budget (now 65536", "learner.recompute = true"]
    {
        assert!(told.contains(part), "{part}: {out}");
    }
    assert!(!err.contains("panicked"), "{err}");
}
