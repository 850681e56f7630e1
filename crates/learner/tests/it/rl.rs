//! Stage 2 with a worker over real gRPC: training, resuming bit for bit, checkpoints, and errors that end the run.

use std::path::Path;

use crate::common::small_run::{BLIND, PICKY, SmallRun, StopAt, experience, work};
use serde_json::Value;
use unveil_checkpoint::{Access, Store};
use unveil_core::Algorithm;
use unveil_learner::{LearnerError, Outcome, SilentProgress, ValidationResult, run_rl};
use unveil_service::CancellationToken;

fn run(small: &SmallRun, stop: u64, evaluate: Option<fn(u64) -> f64>) -> (Outcome, Vec<Value>, u64) {
    let model = small.model();
    let out = small.dir.path().join("rl-out");
    let cancel = CancellationToken::new();
    let mut events = StopAt { kind: "train", step: stop, cancel: cancel.clone(), seen: vec![] };
    let mut silent = SilentProgress;
    let mut evaluator = |_: &mut unveil_model::Vlm, step: u64| {
        Ok(ValidationResult { metrics: serde_json::Map::new(), score: evaluate.map_or(0.0, |f| f(step)) })
    };
    let mut stage = small.stage(&model, &out, &mut events, &mut silent, cancel);
    if evaluate.is_some() {
        stage.evaluator = Some(&mut evaluator);
    }
    let mut worker = None;
    let outcome = run_rl(stage, |ready| worker = Some(work(experience(ready), small.model(), "w1"))).unwrap();
    (outcome, events.seen, worker.map_or(0, |w| w.join().unwrap()))
}

fn small(algorithm: Algorithm, steps: u64) -> SmallRun {
    let mut small = SmallRun::new(5);
    small.config.learner.algorithm = algorithm;
    small.config.learner.steps = steps;
    small.config.learner.checkpoint_every = 0;
    small
}

fn of<'a>(events: &'a [Value], kind: &str) -> Vec<&'a Value> {
    events.iter().filter(|e| e["kind"] == kind).collect()
}

#[test]
fn resumed_run_reaches_the_same_weights() {
    for algorithm in [Algorithm::Grpo, Algorithm::Ppo] {
        // The KL coefficient changes with every update and must be restored, too.
        let steered = || {
            let mut small = small(algorithm, 4);
            small.config.learner.kl_coef = 0.1;
            small.config.learner.kl_target = 50.0;
            small
        };
        let straight = steered();
        let broken = steered();
        let (outcome, events, accepted) = run(&straight, u64::MAX, None);
        assert_eq!((outcome.interrupted, outcome.step, outcome.exported, accepted), (false, 4, Some(4), 8));
        let trained = of(&events, "train");
        assert_eq!(trained.len(), 4);
        assert!(trained.iter().all(|e| e["agreement"].as_f64().is_some_and(|a| a < 1e-5)), "{trained:?}");
        let coefs: Vec<f64> = trained.iter().map(|e| e["kl_coef"].as_f64().unwrap()).collect();
        assert!(coefs.windows(2).all(|w| w[1] < w[0]), "KL below its target lowers its weight: {coefs:?}");
        let (first, _, _) = run(&broken, 2, None);
        assert_eq!((first.interrupted, first.step, first.exported), (true, 2, None));
        let (second, events, _) = run(&broken, u64::MAX, None);
        assert_eq!((second.interrupted, second.step), (false, 4));
        assert_eq!(of(&events, "resumed")[0]["step"], 2);
        let bytes = |s: &SmallRun| std::fs::read(s.dir.path().join("rl-out/model.safetensors")).unwrap();
        assert!(bytes(&straight) == bytes(&broken), "2 + 2 updates are not 4 with {algorithm:?}");
        // Each record of the first pass was trained once over both processes.
        let ids: Vec<&str> =
            trained.iter().flat_map(|e| e["groups"].as_array().unwrap()).map(|v| v.as_str().unwrap()).collect();
        let distinct: std::collections::BTreeSet<&&str> = ids[..5].iter().collect();
        assert_eq!((ids.len(), distinct.len()), (8, 5));
    }
}

#[test]
fn the_best_checkpoint_is_exported() {
    let mut small = small(Algorithm::Grpo, 4);
    small.config.learner.eval_every = 1;
    small.config.checkpoint.keep = 1;
    let peak = |step: u64| -(step as f64 - 2.0).abs();
    let (outcome, events, _) = run(&small, u64::MAX, Some(peak));
    assert_eq!((outcome.step, outcome.exported, outcome.last.map(|e| e.score)), (4, Some(2), Some(-2.0)));
    assert_eq!(of(&events, "eval").len(), 5);
    let best: Vec<_> =
        of(&events, "checkpoint").iter().map(|e| (e["step"].as_u64().unwrap(), e["best"] == true)).collect();
    assert_eq!(best, vec![(1, true), (2, true), (4, false)]);
    let place = |kind: &str| events.iter().position(|e| e["kind"] == kind && e["step"] == 4).unwrap();
    assert!(
        place("train") < place("eval") && place("eval") < place("checkpoint"),
        "a save knows its score: {events:?}"
    );
    let exported = std::fs::read(small.dir.path().join("rl-out/model.safetensors")).unwrap();
    let saved = |step: u64| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let out = small.dir.path().join(format!("saved-{step}"));
        runtime.block_on(async {
            let none: [(&str, &str); 0] = [];
            let store = Store::open(&small.config.run.dir, none, Access::Read).await.unwrap();
            unveil_checkpoint::export(&store, Some(step), &out, "model", "model").await.unwrap();
        });
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    assert!(exported == saved(2) && exported != saved(4));
    for event in of(&events, "checkpoint") {
        let seconds = ["wait_s", "copy_s", "upload_s"].map(|k| event[k].as_f64().unwrap());
        assert!(seconds.iter().all(|s| (0.0..60.0).contains(s)) && seconds[2] > 0.0, "{event}");
    }
    unveil_preprocess::preprocessor::Preprocessor::load(&small.dir.path().join("rl-out")).unwrap();
    let samples = std::fs::read_to_string(small.run().join("rollouts/step-3.jsonl")).unwrap();
    assert_eq!(samples.lines().count(), 8);
    let line: Value = serde_json::from_str(samples.lines().next().unwrap()).unwrap();
    assert!(line["components"]["toy"]["value"].is_number() && line["text"].is_string(), "{line}");
}

/// Runs training with checkpoints of `steps` that cannot be written, because a file blocks their directory.
fn run_with_failing_saves(
    steps: &[u64],
    change: impl FnOnce(&mut SmallRun),
) -> (Result<Outcome, LearnerError>, Vec<Value>) {
    let mut small = small(Algorithm::Grpo, 4);
    small.config.learner.checkpoint_every = 1;
    change(&mut small);
    let folder = small.run().join("checkpoints");
    std::fs::create_dir_all(&folder).unwrap();
    steps.iter().for_each(|step| std::fs::write(folder.join(format!("step-{step}")), "").unwrap());
    let model = small.model();
    let out = small.dir.path().join("rl-out");
    let mut events = Vec::new();
    let mut silent = SilentProgress;
    let mut evaluator = |_: &mut unveil_model::Vlm, step: u64| {
        Ok(ValidationResult { metrics: serde_json::Map::new(), score: -(step as f64 - 2.0).abs() })
    };
    let mut stage = small.stage(&model, &out, &mut events, &mut silent, CancellationToken::new());
    stage.evaluator = Some(&mut evaluator);
    let mut worker = None;
    let outcome = run_rl(stage, |ready| worker = Some(work(experience(ready), small.model(), "w1")));
    worker.unwrap().join().unwrap();
    (outcome, events)
}

/// Returns `(step, whether it was saved)` in order.
fn saves(events: &[Value]) -> Vec<(u64, bool)> {
    let outcome_of = |e: &Value| match e["kind"].as_str() {
        Some("checkpoint") => Some((e["step"].as_u64()?, true)),
        Some("checkpoint_failed") => Some((e["step"].as_u64()?, false)),
        _ => None,
    };
    events.iter().filter_map(outcome_of).collect()
}

#[test]
fn training_continues_after_a_failed_save() {
    let (outcome, events) = run_with_failing_saves(&[2], |s| s.config.learner.eval_every = 1);
    let outcome = outcome.unwrap();
    assert_eq!(saves(&events), [(1, true), (2, false), (3, true), (4, true)]);
    let failed = of(&events, "checkpoint_failed")[0];
    assert_eq!((&failed["newest"], &failed["in_a_row"]), (&1.into(), &1.into()));
    assert!(failed["why"].as_str().unwrap().contains("step-2"), "{failed}");
    // Step 2 was the best, but has no checkpoint.
    assert_eq!((outcome.step, outcome.exported), (4, Some(1)));
}

#[test]
fn repeated_save_failures_end_the_run() {
    let (outcome, events) = run_with_failing_saves(&[2, 3], |s| s.config.checkpoint.max_failures = 2);
    let e = outcome.unwrap_err();
    assert!(matches!(e, LearnerError::SavesFailed { step: 3, in_a_row: 2, .. }), "{e}");
    assert!(e.to_string().contains("checkpoint.max_failures") && e.to_string().contains("step-3"), "{e}");
    assert_eq!(saves(&events), [(1, true), (2, false)]);
    // A successful save resets the count.
    let (outcome, events) = run_with_failing_saves(&[1, 3], |s| s.config.checkpoint.max_failures = 2);
    assert_eq!((outcome.unwrap().step, saves(&events)), (4, vec![(1, false), (2, true), (3, false), (4, true)]));
}

#[test]
fn the_last_save_must_succeed() {
    let (outcome, events) = run_with_failing_saves(&[4], |_| ());
    let e = outcome.unwrap_err();
    assert!(matches!(e, LearnerError::SavesFailed { step: 4, .. }), "{e}");
    assert!(saves(&events).starts_with(&[(1, true), (2, true), (3, true)]), "{events:?}");
}

/// Returns the error that ends a run with this worker.
fn run_error(small: &SmallRun, worker: &'static str) -> LearnerError {
    let model = small.model();
    let out = small.dir.path().join("rl-out");
    let mut events: Vec<Value> = Vec::new();
    let mut silent = SilentProgress;
    let stage = small.stage(&model, &out, &mut events, &mut silent, CancellationToken::new());
    let mut at_work = None;
    let ended = run_rl(stage, |ready| at_work = Some(work(experience(ready), small.model(), worker)));
    // The worker may fail if a call is interrupted.
    let _whatever = at_work.unwrap().join();
    ended.expect_err("the run ends without rewards")
}

#[test]
fn mostly_masked_rewards_end_the_run() {
    let mut blind = small(Algorithm::Grpo, 10);
    blind.config.learner.groups = 16;
    blind.config.learner.max_masked = 0.5;
    let e = run_error(&blind, BLIND);
    let names_format =
        matches!(&e, LearnerError::Masked { step: 4, component, masked: 64, groups: 64, .. } if component == "format");
    assert!(names_format, "{e}");
    // Four of five records are set aside; the remaining one trains well.
    let mut picky = small(Algorithm::Grpo, 40);
    picky.config.rollout.max_losses = 1;
    picky.config.learner.max_masked = 0.5;
    let e = run_error(&picky, PICKY);
    assert!(matches!(&e, LearnerError::Masked { component, .. } if component == "total"), "{e}");
    assert!(e.to_string().contains("it cannot be made"), "{e}");
}

#[test]
fn rollout_may_be_one_version_ahead() {
    let mut small = small(Algorithm::Grpo, 4);
    small.config.rollout.max_staleness = 1;
    let (outcome, events, _) = run(&small, u64::MAX, None);
    assert_eq!(outcome.step, 4);
    assert!(of(&events, "train").iter().all(|e| e["staleness"].as_u64().is_some_and(|s| s <= 1)));
}

#[test]
fn missing_image_ends_the_run_and_is_named() {
    let small = small(Algorithm::Grpo, 2);
    for k in 0..5 {
        std::fs::remove_file(small.dir.path().join(format!("data/images/synth-3-{k:06}.png"))).unwrap();
    }
    let model = small.model();
    let out = small.dir.path().join("o");
    let mut events = Vec::new();
    let mut silent = SilentProgress;
    let stage = small.stage(&model, &out, &mut events, &mut silent, CancellationToken::new());
    let mut worker = None;
    let e = run_rl(stage, |ready| worker = Some(work(experience(ready), small.model(), "w1"))).unwrap_err().to_string();
    assert!(e.contains("synth-3-00000") && e.contains(".png"), "{e}");
    assert_eq!(worker.unwrap().join().unwrap(), 0);
    assert!(!Path::new(&out).exists());
}
