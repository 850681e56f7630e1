//! An update without enough memory: the error contains the memory plan and advice, and the process ends without a
//! panic.

use nix::sys::resource::{Resource, setrlimit};
use unveil_core::{Algorithm, TrainGroup};
use unveil_testkit::ignored_test;
use unveil_testkit_model::{configured, low_tokens, model, rollout};
use unveil_trainer::{PolicyTrainer, TrainerError};

const CHILD: &str = "UNVEIL_TEST_MEMORY";

/// Returns the virtual memory of this process in bytes.
fn virtual_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
#[ignore = "started in its own process by another test"]
fn update_with_little_memory() {
    assert!(std::env::var_os(CHILD).is_some(), "started by another test");
    let vlm = model(3);
    let settings = configured(&vlm, 4, |l| l.algorithm = Algorithm::Grpo);
    let mut learner = PolicyTrainer::new(vlm, None, settings).unwrap();
    let small = rollout(learner.vlm(), 2, 4, 0, &low_tokens);
    learner.update(&small).unwrap();
    let some = rollout(learner.vlm(), 8, 8, 1, &low_tokens);
    let many: Vec<TrainGroup> = some.iter().cycle().take(400).cloned().collect();
    let plan = learner.memory_plan(&many);
    let limit = virtual_memory() + (96 << 20);
    assert!(plan.activations > 4 * (96 << 20), "{plan}");
    setrlimit(Resource::RLIMIT_AS, limit, limit).unwrap();
    match learner.update(&many) {
        Err(e @ TrainerError::OutOfMemory { .. }) => println!("error: {e}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn out_of_memory_error_contains_the_plan() {
    let output = ignored_test("memory::update_with_little_memory").env(CHILD, "1").output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{out}{err}");
    let error = out.lines().find(|l| l.contains("error: ")).unwrap_or_default();
    for part in
        ["not enough memory", "optimiser", "activations", "learner.token_budget (now 65536", "learner.recompute = true"]
    {
        assert!(error.contains(part), "{part}: {out}");
    }
    assert!(!err.contains("panicked"), "{err}");
}
