//! Stage 1: memorising four samples, skipping non-finite losses, and resuming bit for bit.

use crate::common::small_run::{SmallRun, StopAt};
use unveil_checkpoint::{Access, Store, list};
use unveil_config::schema::Optimizer;
use unveil_learner::{LearnerError, Progress, SilentProgress, ValidationResult, run_sft};
use unveil_service::CancellationToken;
use unveil_testkit_model::weights;
use unveil_trainer::{SftBatch, SftTrainer, TrainerError};

fn batch(small: &SmallRun) -> SftBatch {
    let data = small.data();
    let items: Vec<_> = (0..data.len()).map(|i| data.item(i, 0, false).unwrap()).collect();
    SftBatch {
        inputs: items.iter().map(|i| i.input.clone()).collect(),
        targets: items.iter().map(|i| i.target.clone()).collect(),
        pass: 0,
    }
}

fn trainer(small: &SmallRun, total: u64) -> SftTrainer {
    let vlm = unveil_model::Vlm::load(&small.model(), tch::Device::Cpu, tch::Kind::Float).unwrap();
    let options = Optimizer { lr: 3e-3, warmup: 5, weight_decay: 0.0, ..Default::default() };
    SftTrainer::new(vlm, &options, total).unwrap()
}

#[test]
fn four_samples_are_memorised() {
    let small = SmallRun::new(4);
    let batch = batch(&small);
    let mut trainer = trainer(&small, 60);
    let first = trainer.update(&batch).unwrap().loss;
    let last = (1..60).map(|_| trainer.update(&batch).unwrap().loss).last().unwrap();
    assert!(first > 5.0 && last < 0.1, "{first} -> {last}");
}

#[test]
fn non_finite_losses_are_skipped_then_fatal() {
    let small = SmallRun::new(4);
    let good = batch(&small);
    let mut invalid = good.clone();
    let mut damaged = (*invalid.inputs[0]).clone();
    damaged.patches[7] = f32::NAN;
    invalid.inputs[0] = damaged.into();
    let mut trainer = trainer(&small, 60);
    let before = weights(trainer.vlm());
    let report = trainer.update(&invalid).unwrap();
    assert_eq!(report.skipped.as_deref(), Some("the loss is not finite"));
    assert_eq!((trainer.step(), weights(trainer.vlm()) == before), (1, true));
    assert!(trainer.update(&good).unwrap().skipped.is_none());
    for _ in 0..4 {
        assert!(trainer.update(&invalid).unwrap().skipped.is_some());
    }
    assert!(matches!(trainer.update(&invalid), Err(TrainerError::Skipped { step: 7, in_a_row: 5, .. })));
}

fn small_sft() -> SmallRun {
    let mut small = SmallRun::new(7);
    small.config.sft.steps = 6;
    small.config.sft.batch = 3;
    small.config.data.augment.crop_min = 0.8;
    small.config.data.augment.flip_horizontal = true;
    small
}

/// Keeps the last number of images reported to the progress display.
struct LastProgress(u64);

impl Progress for LastProgress {
    fn update(&mut self, _: u64, done: u64, _: &[(&str, f64)]) {
        self.0 = done;
    }

    fn note(&mut self, _: &str) {}
}

fn run(small: &SmallRun, stop: u64) -> (unveil_learner::Outcome, Vec<serde_json::Value>) {
    let model = small.model();
    let out = small.dir.path().join("sft-out");
    let cancel = CancellationToken::new();
    let mut events = StopAt { kind: "sft", step: stop, cancel: cancel.clone(), seen: vec![] };
    let mut evaluator = |_: &mut unveil_model::Vlm, step: u64| {
        let metrics = serde_json::from_value(serde_json::json!({"mean_iou": 0.5})).unwrap();
        Ok(ValidationResult { metrics, score: step as f64 })
    };
    let mut last_progress = LastProgress(0);
    let mut stage = small.stage(&model, &out, &mut events, &mut last_progress, cancel);
    stage.evaluator = Some(&mut evaluator);
    let outcome = run_sft(stage, |_| ()).unwrap();
    let updates = events.seen.iter().filter(|e| e["kind"] == "sft").count() as u64;
    assert_eq!(last_progress.0, 3 * updates, "images of this process, from which the rate is last_progress");
    (outcome, events.seen)
}

/// Returns the error that ends the stage.
fn error_of(small: &SmallRun) -> LearnerError {
    let model = small.model();
    let out = small.dir.path().join("o");
    let mut events = Vec::new();
    let mut silent = SilentProgress;
    let stage = small.stage(&model, &out, &mut events, &mut silent, CancellationToken::new());
    run_sft(stage, |_| ()).unwrap_err()
}

/// A save is reported before the next one begins, and the last evaluation follows the last save.
#[test]
fn events_of_the_stage_have_a_fixed_order() {
    let mut small = small_sft();
    small.config.sft.steps = 3;
    small.config.sft.eval_every = 2;
    small.config.sft.checkpoint_every = 1;
    let (outcome, events) = run(&small, u64::MAX);
    let order: Vec<_> = events.iter().map(|e| (e["kind"].as_str().unwrap(), e["step"].as_u64().unwrap())).collect();
    let expected = [
        ("started", 0),
        ("sft", 1),
        ("sft", 2),
        ("eval", 2),
        ("checkpoint", 1),
        ("sft", 3),
        ("checkpoint", 2),
        ("checkpoint", 3),
        ("eval", 3),
    ];
    assert_eq!(order, expected);
    let best: Vec<_> = events.iter().filter_map(|e| e["best"].as_bool()).collect();
    assert_eq!(
        (best, outcome.exported),
        (vec![false; 3], Some(3)),
        "stage 1 exports the last checkpoint, not the best"
    );
}

/// The save of the last step must succeed; an earlier one may fail.
#[test]
fn a_failed_save_is_reported_and_the_last_must_succeed() {
    // A file blocks the directory of a checkpoint.
    let with_blocked_checkpoint = |step: u64| {
        let mut small = small_sft();
        small.config.sft.steps = 3;
        small.config.sft.checkpoint_every = 1;
        let folder = small.run().join("sft/checkpoints");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(format!("step-{step}")), "").unwrap();
        small
    };
    let (outcome, events) = run(&with_blocked_checkpoint(1), u64::MAX);
    let kinds = events.iter().map(|e| (e["kind"].as_str().unwrap(), e["step"].as_u64().unwrap()));
    let saves: Vec<_> = kinds.filter(|(kind, _)| kind.starts_with("checkpoint")).collect();
    assert_eq!(saves, [("checkpoint_failed", 1), ("checkpoint", 2), ("checkpoint", 3)]);
    assert_eq!(outcome.exported, Some(3));
    let e = error_of(&with_blocked_checkpoint(3));
    assert!(matches!(e, LearnerError::SavesFailed { step: 3, in_a_row: 1, .. }), "{e}");
}

#[test]
fn resumed_stage_reaches_the_same_weights() {
    let straight = small_sft();
    let broken = small_sft();
    let (outcome, events) = run(&straight, u64::MAX);
    assert_eq!((outcome.interrupted, outcome.step, outcome.exported), (false, 6, Some(6)));
    let kinds = |k: &str| events.iter().filter(|e| e["kind"] == k).count();
    assert_eq!((kinds("sft"), kinds("eval"), kinds("checkpoint")), (6, 1, 1));
    assert_eq!(outcome.last.unwrap().score, 6.0);

    let (outcome, _) = run(&broken, 3);
    assert_eq!((outcome.interrupted, outcome.step, outcome.exported), (true, 3, None));
    let (outcome, events) = run(&broken, u64::MAX);
    assert_eq!((outcome.interrupted, outcome.step), (false, 6));
    assert_eq!(events[0], serde_json::json!({"kind": "resumed", "stage": "sft", "step": 3}));
    let bytes = |s: &SmallRun| std::fs::read(s.dir.path().join("sft-out/model.safetensors")).unwrap();
    assert!(bytes(&straight) == bytes(&broken), "3 + 3 updates are not 6");
    // The model directory is complete, and a third run has nothing to do.
    unveil_preprocess::preprocessor::Preprocessor::load(&broken.dir.path().join("sft-out")).unwrap();
    let (outcome, events) = run(&broken, u64::MAX);
    assert_eq!((outcome.step, outcome.exported, events.len()), (6, Some(6), 1));
}

/// Cancellation does not wait for a batch that takes minutes to prepare.
#[test]
fn cancellation_interrupts_batch_preparation() {
    let mut small = small_sft();
    small.config.sft.batch = 200_000;
    let model = small.model();
    let out = small.dir.path().join("o");
    let cancel = CancellationToken::new();
    let stop = cancel.clone();
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        stop.cancel();
    });
    let mut events = Vec::new();
    let mut silent = SilentProgress;
    let started = std::time::Instant::now();
    let outcome = run_sft(small.stage(&model, &out, &mut events, &mut silent, cancel), |_| ()).unwrap();
    assert_eq!((outcome.interrupted, outcome.step), (true, 0));
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
}

/// A record that is too long is refused before it takes memory.
#[test]
fn items_over_the_context_are_refused_by_id() {
    let small = small_sft();
    let limits = unveil_preprocess::context_fit::TokenLimits { context: 50, new_tokens: 0 };
    let e = small.data_with_limits(limits).item(2, 0, false).err().unwrap().to_string();
    assert!(e.contains("context of 50") && e.contains("record \""), "{e}");
}

#[test]
fn retention_keeps_newest_and_milestones_with_timings() {
    let mut small = small_sft();
    small.config.sft.steps = 5;
    small.config.sft.checkpoint_every = 1;
    small.config.checkpoint.keep = 1;
    small.config.checkpoint.keep_every = 2;
    let (_, events) = run(&small, u64::MAX);
    let saved: Vec<_> = events.iter().filter(|e| e["kind"] == "checkpoint").collect();
    assert_eq!(saved.iter().filter_map(|e| e["step"].as_u64()).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    for e in saved {
        let seconds = ["wait_s", "copy_s", "upload_s"].map(|k| e[k].as_f64().unwrap());
        assert!(seconds.iter().all(|s| (0.0..60.0).contains(s)) && seconds[1] > 0.0 && seconds[2] > 0.0, "{e}");
        assert!(e["bytes"].as_u64() > Some(3 * 4 * 1_000_000), "weights and two moments: {e}");
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let kept = runtime.block_on(async {
        let place = small.run().join("sft");
        let none: [(&str, &str); 0] = [];
        let store = Store::open(&place.to_string_lossy(), none, Access::Read).await.unwrap();
        list(&store).await.unwrap()
    });
    assert_eq!(kept.iter().map(|c| c.step).collect::<Vec<_>>(), [2, 4, 5]);
}

#[test]
fn resuming_with_another_seed_is_refused() {
    let mut small = small_sft();
    small.config.sft.steps = 1;
    run(&small, u64::MAX);
    small.config.run.seed = 9;
    let e = error_of(&small).to_string();
    assert!(e.contains("run.seed 0, now 9"), "{e}");
}

#[test]
fn corrupt_image_ends_the_stage_and_is_named() {
    let small = small_sft();
    let path = small.dir.path().join("data/images/synth-3-000002.png");
    std::fs::write(&path, b"no image").unwrap();
    let e = error_of(&small).to_string();
    assert!(e.contains("synth-3-000002") && e.contains("decoded"), "{e}");
}
