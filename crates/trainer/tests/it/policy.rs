//! The policy update: it learns, skips unusable batches, stops if rollout and learner disagree, and micro-batches add
//! up.

use tch::{Device, Kind};
use unveil_config::schema::{self, Freeze};
use unveil_core::{Algorithm, LossReduction, TrainGroup};
use unveil_model::Vlm;
use unveil_testkit_model::{breakdown, configured, low_tokens, model, rollout, weights, write_model};
use unveil_trainer::{Freezing, PolicyTrainer, StepSettings, TrainerError};

fn settings(vlm: &Vlm, algorithm: Algorithm, steps: u64) -> StepSettings {
    configured(vlm, steps, |l| l.algorithm = algorithm)
}

fn frozen(what: &[String]) -> Freezing {
    Freezing::new(&schema::Learner { frozen: what.to_vec(), ..Default::default() })
}

fn learn(algorithm: Algorithm, updates: u64, change: impl Fn(&mut StepSettings)) -> (f64, f64, PolicyTrainer) {
    let vlm = model(3);
    let mut s = settings(&vlm, algorithm, updates);
    change(&mut s);
    let mut learner = PolicyTrainer::new(vlm, None, s).unwrap();
    let mut means = Vec::new();
    for step in 0..updates {
        let batch = rollout(learner.vlm(), 4, 8, step, &low_tokens);
        let report = learner.update(&batch).unwrap();
        assert_eq!(report.skipped, None);
        assert!(report.agreement.is_some_and(|a| a < 1e-5), "{:?}", report.agreement);
        means.push(report.reward["total"]);
    }
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    (mean(&means[..3]), mean(&means[means.len() - 3..]), learner)
}

#[test]
fn grpo_raises_a_toy_reward() {
    let (before, after, learner) = learn(Algorithm::Grpo, 20, |_| {});
    assert!(after > before + 0.25, "{before} -> {after}");
    assert_eq!(learner.step(), 20);
}

#[test]
fn ppo_raises_a_toy_reward() {
    let (before, after, _) = learn(Algorithm::Ppo, 20, |s| {
        s.inner_epochs = 2;
        s.minibatches = 2;
    });
    assert!(after > before + 0.2, "{before} -> {after}");
}

#[test]
fn attention_entropy_and_kl_enter_the_loss() {
    let vlm = model(5);
    let mut s = settings(&vlm, Algorithm::Grpo, 10);
    s.objective.attention_coef = 0.5;
    s.objective.entropy_coef = 0.01;
    s.objective.kl_coef = 0.1;
    let mut learner = PolicyTrainer::new(vlm, Some(model(5)), s).unwrap();
    // The class is called "x", which tokens 46 (`o`) never read as: name a letter that comes up often instead.
    let mut attention = Vec::new();
    for step in 0..6 {
        let mut batch = rollout(learner.vlm(), 4, 8, step, &low_tokens);
        for g in &mut batch {
            for r in &mut g.responses {
                r.text = "x".repeat(r.tokens.len());
            }
        }
        let report = learner.update(&batch).unwrap();
        assert!(report.entropy > 1.0 && report.kl_reference >= 0.0);
        if step == 0 {
            assert!(report.kl_reference < 1e-6, "{}", report.kl_reference);
        } else {
            assert!(report.kl_reference > 0.0);
        }
        attention.push(report.loss["attention"]);
    }
    assert!(attention[5] > attention[0] + 0.02, "{attention:?}");
}

#[test]
fn micro_batches_equal_one_batch() {
    let batch = rollout(&model(7), 4, 4, 0, &low_tokens);
    let run = |budget: usize, algorithm, loss_mean| {
        let vlm = model(7);
        let mut s = configured(&vlm, 5, |l| (l.algorithm, l.loss_mean) = (algorithm, loss_mean));
        s.token_budget = budget;
        let mut learner = PolicyTrainer::new(vlm, None, s).unwrap();
        let report = learner.update(&batch).unwrap();
        (report, weights(learner.vlm()))
    };
    let all = [
        (Algorithm::Grpo, LossReduction::Token),
        (Algorithm::Ppo, LossReduction::GroupTokenMean),
        (Algorithm::Rloo, LossReduction::SequenceTokenMean),
        (Algorithm::ReinforcePlusPlus, LossReduction::SequenceTokenSum),
        (Algorithm::ReinforcePlusPlusBaseline, LossReduction::SequenceMaxLength),
    ];
    for (algorithm, loss_mean) in all {
        let (whole, w) = run(usize::MAX, algorithm, loss_mean);
        let (split, v) = run(1, algorithm, loss_mean);
        assert!((whole.loss["loss"] - split.loss["loss"]).abs() < 1e-5);
        assert!((whole.grad_norm - split.grad_norm).abs() < 1e-4 * whole.grad_norm, "{whole:?} {split:?}");
        for ((name, a), (_, b)) in w.iter().zip(&v) {
            // Adam's first step is the sign of the gradient times the learning rate, which may differ if the gradient
            // is rounding noise.
            let far = a.iter().zip(b).filter(|(x, y)| (*x - *y).abs() > 1e-5).count();
            assert!(far * 20 <= a.len(), "{name}: {far} of {}", a.len());
        }
    }
}

#[test]
fn non_finite_values_are_skipped_then_fatal() {
    let vlm = model(9);
    let s = settings(&vlm, Algorithm::Grpo, 20);
    let mut learner = PolicyTrainer::new(vlm, None, s).unwrap();
    let good = |learner: &PolicyTrainer| rollout(learner.vlm(), 2, 4, learner.step(), &low_tokens);
    let before = weights(learner.vlm());
    let mut invalid = good(&learner);
    invalid[1].breakdowns[2] = breakdown("r1", 2, Some(f64::NAN));
    let report = learner.update(&invalid).unwrap();
    assert!(report.skipped.is_some_and(|w| w.contains("reward of response 2 of record `r1`")));
    assert_eq!((report.version, report.skipped_total, &weights(learner.vlm())), (1, 1, &before));
    let mut invalid = good(&learner);
    invalid[0].responses[1].logprobs[0] = f32::NAN;
    assert!(learner.update(&invalid).unwrap().skipped.is_some_and(|w| w.contains("log-probability")));
    let mut masked = good(&learner);
    masked.iter_mut().flat_map(|g| &mut g.breakdowns).for_each(|b| b.total = None);
    assert!(learner.update(&masked).unwrap().skipped.is_some_and(|w| w.contains("masked")));
    assert_eq!(weights(learner.vlm()), before);
    let fine = good(&learner);
    assert_eq!(learner.update(&fine).unwrap().skipped, None, "a good step ends the row");
    for k in 0..5 {
        let mut invalid = good(&learner);
        invalid[0].breakdowns[0].total = Some(f64::INFINITY);
        match learner.update(&invalid) {
            Ok(r) => assert!(k < 4 && r.skipped.is_some()),
            Err(TrainerError::Skipped { in_a_row: 5, .. }) => assert_eq!(k, 4),
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn groups_without_reward_are_excluded() {
    let vlm = model(9);
    let s = settings(&vlm, Algorithm::Grpo, 20);
    let mut learner = PolicyTrainer::new(vlm, None, s).unwrap();
    let mut batch = rollout(learner.vlm(), 3, 4, 0, &low_tokens);
    batch[1].breakdowns.iter_mut().for_each(|b| b.total = None);
    batch[2].breakdowns.iter_mut().for_each(|b| b.total = Some(0.5));
    let report = learner.update(&batch).unwrap();
    assert_eq!((report.wholly_masked.len(), report.flat_groups, report.skipped), (1, 1, None));
    assert_eq!(report.wholly_masked, [batch[1].id.record.clone()]);
    assert_eq!(report.masked["total"], 4);
    let want: usize = [0, 2].iter().flat_map(|g: &usize| &batch[*g].responses).map(|r| r.tokens.len()).sum();
    assert_eq!(report.tokens, want);
}

#[test]
fn disagreement_stops_the_run_and_names_the_worst() {
    let vlm = model(9);
    let s = settings(&vlm, Algorithm::Grpo, 20);
    let mut learner = PolicyTrainer::new(vlm, None, s).unwrap();
    let mut batch = rollout(learner.vlm(), 2, 4, 0, &low_tokens);
    batch[1].responses[3].logprobs.iter_mut().for_each(|v| *v += 0.1);
    let e = learner.update(&batch).unwrap_err();
    assert!(matches!(e, TrainerError::Agreement { step: 1, .. }));
    assert!(e.to_string().contains("worst: record `r1` response 3"), "{e}");
    assert!(e.to_string().contains("worker `w` ("), "{e}");
    // One of many workers drifts too far: the mean over all workers hides it, the mean per worker does not.
    let mut batch = rollout(learner.vlm(), 8, 4, 0, &low_tokens);
    for (k, g) in batch.iter_mut().enumerate() {
        g.worker = format!("w{k}");
    }
    batch[5].responses.iter_mut().flat_map(|r| &mut r.logprobs).for_each(|v| *v += 3e-5);
    let e = learner.update(&batch).unwrap_err();
    assert!(matches!(e, TrainerError::Agreement { mean, .. } if mean > 1e-5));
    let text = e.to_string();
    assert!(text.contains("worker `w5` (") && !text.contains("worker `w4`"), "{text}");
    batch.iter_mut().for_each(|g| g.worker = "one".into());
    let report = learner.update(&batch).unwrap();
    assert!(report.agreement.is_some_and(|a| a < 1e-5) && report.agreement_by_worker.is_empty());
    // Differences on tokens of an older version are drift, not disagreement.
    let mut stale: Vec<TrainGroup> = rollout(learner.vlm(), 2, 4, 1, &low_tokens);
    learner.update(&stale).unwrap();
    stale.truncate(2);
    let report = learner.update(&stale).unwrap();
    assert!(report.agreement.is_none() && report.drift.is_some_and(|d| d > 1e-5) && report.staleness == 1);
}

#[test]
fn invalid_settings_are_named() {
    let refuse = |change: &dyn Fn(&mut StepSettings)| {
        let vlm = model(1);
        let mut s = settings(&vlm, Algorithm::Grpo, 5);
        change(&mut s);
        PolicyTrainer::new(vlm, None, s).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(refuse(&|s| s.freezing = frozen(&["vision.".into()])).contains("`vision.`"));
    assert!(refuse(&|s| s.attention = unveil_model::AttentionSet::layer(99)).contains("layer 99"));
    assert!(refuse(&|s| s.objective.kl_coef = 0.1).contains("reference"));
    assert!(refuse(&|s| s.freezing = frozen(&["visual".into(), "model".into()])).contains("frozen"));
    assert_eq!(refuse(&|s| s.freezing = frozen(&["visual".into()])), "");
}

#[test]
fn frozen_parameters_do_not_change() {
    let vlm = model(2);
    let mut s = settings(&vlm, Algorithm::Grpo, 5);
    s.freezing = frozen(&["visual".into()]);
    let mut learner = PolicyTrainer::new(vlm, None, s).unwrap();
    let before = weights(learner.vlm());
    let batch = rollout(learner.vlm(), 2, 4, 0, &low_tokens);
    learner.update(&batch).unwrap();
    let changed = before.iter().zip(weights(learner.vlm())).filter(|((_, a), (_, b))| a != b).map(|((n, _), _)| n);
    let changed: Vec<&String> = changed.collect();
    assert!(!changed.is_empty() && changed.iter().all(|n| !n.starts_with("visual")), "{changed:?}");
}

#[test]
fn bf16_weights_are_trained_with_fp32_masters() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), 3);
    let load = || Vlm::load(dir.path(), Device::Cpu, Kind::BFloat16).unwrap();
    let vlm = load();
    let s = settings(&vlm, Algorithm::Grpo, 20);
    assert_eq!(s.agreement_limit, 1e-3, "the limit of bf16");
    let mut learner = PolicyTrainer::new(vlm, None, s).unwrap();
    let before = learner.state().unwrap().0;
    for step in 0..3 {
        let batch = rollout(learner.vlm(), 2, 4, step, &low_tokens);
        let report = learner.update(&batch).unwrap();
        assert_eq!(report.skipped, None);
        assert!(report.agreement.is_some_and(|a| a > 0.0 && a < 1e-3), "{:?}", report.agreement);
    }
    let (master, _) = learner.state().unwrap();
    let mut between = 0;
    for (name, precise) in &master {
        let rounded = learner.vlm().parameter(name).unwrap();
        assert_eq!((rounded.kind(), precise.kind()), (Kind::BFloat16, Kind::Float));
        assert_eq!(*rounded, precise.to_kind(Kind::BFloat16), "{name}");
        between += precise.ne_tensor(&rounded.to_kind(Kind::Float)).any().int64_value(&[]);
    }
    assert!(between > 10, "masters have values that bf16 cannot represent");
    // Steps have the size of the learning rate, which is below the resolution of bf16 near 1.
    let norm = "model.norm.weight";
    let norm_weight = |all: &[(String, tch::Tensor)]| all.iter().find(|(n, _)| n == norm).unwrap().1.copy();
    let moved = (norm_weight(&master) - norm_weight(&before)).abs().max().double_value(&[]);
    assert!(moved > 0.0 && moved < 2f64.powi(-8), "{moved}");
}

#[test]
fn freeze_schedules_are_followed() {
    let vlm = model(3);
    let part =
        |name: &str| if name.starts_with("visual.merger.") { 1 } else { usize::from(!name.starts_with("visual.")) * 2 };
    let s = configured(&vlm, 6, |l| {
        l.frozen = vec!["vision_tower".into()];
        l.freeze = vec![Freeze { parameters: vec!["language_model".into()], from: 0, until: 2 }];
    });
    let mut learner = PolicyTrainer::new(vlm, None, s).unwrap();
    for step in 0..4 {
        let before = weights(learner.vlm());
        let batch = rollout(learner.vlm(), 3, 6, step, &low_tokens);
        assert_eq!(learner.update(&batch).unwrap().skipped, None);
        let after = weights(learner.vlm());
        let moved = |which: usize| {
            let selected = before.iter().zip(&after).filter(|((n, _), _)| part(n) == which);
            selected.filter(|(b, a)| b.1 != a.1).count()
        };
        assert_eq!(moved(0), 0, "the vision tower is frozen");
        assert!(moved(1) > 0, "the merger is trained");
        assert_eq!(moved(2) > 0, step >= 2, "the language model is trained from update 2 on");
    }
    let (_, moments) = learner.state().unwrap();
    let counts: Vec<f64> =
        moments.iter().filter(|(n, _)| n.starts_with("step.model.")).map(|(_, t)| t.double_value(&[0])).collect();
    assert!(!counts.is_empty() && counts.iter().all(|c| *c == 2.0), "{counts:?}");
}
