//! Groups that teach nothing are replaced in a run with a worker over real gRPC.

use serde_json::Value;
use unveil_learner::{LearnerError, Outcome, SilentProgress, run_rl};
use unveil_service::CancellationToken;

use crate::common::small_run::{FLAT, PARTLY_FLAT, SmallRun, StopAt, experience, work};

fn small(steps: u64, max_replaced: usize) -> SmallRun {
    let mut small = SmallRun::new(5);
    small.config.learner.steps = steps;
    small.config.learner.checkpoint_every = 0;
    small.config.learner.max_replaced = max_replaced;
    small
}

/// Runs stage 2 with one worker until it ends, or until the event of update `stop`.
fn run(small: &SmallRun, worker: &'static str, stop: u64) -> (Result<Outcome, LearnerError>, Vec<Value>) {
    let model = small.model();
    let out = small.dir.path().join("rl-out");
    let cancel = CancellationToken::new();
    let mut events = StopAt { kind: "train", step: stop, cancel: cancel.clone(), seen: vec![] };
    let mut silent = SilentProgress;
    let stage = small.stage(&model, &out, &mut events, &mut silent, cancel);
    let mut at_work = None;
    let outcome = run_rl(stage, |ready| at_work = Some(work(experience(ready), small.model(), worker)));
    // The worker may fail if a call is interrupted.
    let _whatever = at_work.unwrap().join();
    (outcome, events.seen)
}

/// Returns the trained and the replaced records of each update.
fn updates(events: &[Value]) -> Vec<(Vec<String>, Vec<String>)> {
    let ids = |v: &Value| -> Vec<String> {
        v.as_array().into_iter().flatten().map(|id| id.as_str().unwrap().to_owned()).collect()
    };
    let train = events.iter().filter(|e| e["kind"] == "train");
    train
        .map(|e| {
            let update = (ids(&e["groups"]), ids(&e["replaced_groups"]));
            assert_eq!(e["replaced"], update.1.len(), "{e}");
            update
        })
        .collect()
}

#[test]
fn replaced_groups_are_the_same_after_a_resume() {
    let straight = small(4, 6);
    let (outcome, events) = run(&straight, PARTLY_FLAT, u64::MAX);
    assert_eq!(outcome.unwrap().step, 4);
    let whole = updates(&events);
    let number = |id: &String| id.chars().last().unwrap().to_digit(10).unwrap();
    for (trained, replaced) in &whole {
        assert_eq!(trained.len(), 2);
        assert!(trained.iter().all(|id| number(id) % 2 == 1) && replaced.iter().all(|id| number(id) % 2 == 0));
    }
    // Each pass has three groups that teach nothing and two others.
    let replaced: usize = whole.iter().map(|(_, replaced)| replaced.len()).sum();
    assert!((9..=12).contains(&replaced), "{whole:?}");
    let noted = events.iter().filter(|e| e["kind"] == "experience" && e["event"] == "replaced").count();
    assert_eq!(noted, replaced);

    let broken = small(4, 6);
    let (first, mut events) = run(&broken, PARTLY_FLAT, 2);
    assert_eq!(first.unwrap().step, 2);
    let (second, rest) = run(&broken, PARTLY_FLAT, u64::MAX);
    assert_eq!(second.unwrap().step, 4);
    events.extend(rest);
    assert_eq!(updates(&events), whole);
}

#[test]
fn limits_of_staleness_hold_with_replaced_groups() {
    let mut ahead = small(6, 6);
    ahead.config.rollout.max_staleness = 1;
    let (outcome, events) = run(&ahead, PARTLY_FLAT, u64::MAX);
    assert_eq!(outcome.unwrap().step, 6);
    let trained: Vec<&Value> = events.iter().filter(|e| e["kind"] == "train").collect();
    assert!(trained.iter().all(|e| e["staleness"].as_u64().is_some_and(|versions| versions <= 1)), "{trained:?}");
    assert!(updates(&events).iter().any(|(_, replaced)| !replaced.is_empty()));
}

#[test]
fn equal_rewards_end_the_run_with_the_reason() {
    let flat = small(4, 3);
    let (outcome, events) = run(&flat, FLAT, u64::MAX);
    let e = outcome.expect_err("there is nothing to learn");
    assert!(matches!(e, LearnerError::NothingToLearn { step: 1, groups: 2, replaced: 3 }), "{e}");
    assert_eq!(updates(&events), []);
    let samples = std::fs::read_to_string(flat.run().join("rollouts/step-1.jsonl")).unwrap();
    assert_eq!(samples.lines().count(), 8, "the responses are kept for a look at them");
    // Without dynamic sampling, such batches are trained.
    let (outcome, events) = run(&small(2, 0), FLAT, u64::MAX);
    assert_eq!((outcome.unwrap().step, updates(&events).len()), (2, 2));
}
