//! Every algorithm option of the configuration takes effect in the update.

use unveil_config::schema::{self, KlPlacement, RatioBase};
use unveil_core::{Algorithm, Finish, Importance, KlForm, LossReduction, RatioLevel, Surrogate, TrainGroup};
use unveil_testkit_model::{MAX_TOKENS, configured, low_tokens, model, rollout};
use unveil_trainer::{PolicyTrainer, UpdateReport};

fn learner(seed: u64, change: impl FnOnce(&mut schema::Learner)) -> PolicyTrainer {
    let vlm = model(seed);
    let s = configured(&vlm, 20, change);
    let reference = (s.objective.kl_coef > 0.0).then(|| model(seed + 1));
    PolicyTrainer::new(vlm, reference, s).unwrap()
}

/// Performs one update of fresh weights on a batch.
fn update(batch: &[TrainGroup], change: impl FnOnce(&mut schema::Learner)) -> UpdateReport {
    let report = learner(3, change).update(batch).unwrap();
    assert_eq!(report.skipped, None);
    report
}

fn near(a: f64, b: f64, tolerance: f64) -> bool {
    (a - b).abs() <= tolerance * b.abs().max(1e-3)
}

#[test]
fn algorithms_without_a_value_head_raise_a_toy_reward() {
    for algorithm in [Algorithm::Rloo, Algorithm::ReinforcePlusPlus, Algorithm::ReinforcePlusPlusBaseline] {
        let mut l = learner(3, |c| c.algorithm = algorithm);
        let mut means = Vec::new();
        for step in 0..20 {
            let batch = rollout(l.vlm(), 4, 8, step, &low_tokens);
            means.push(l.update(&batch).unwrap().reward["total"]);
        }
        let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
        let before = mean(&means[..3]);
        let after = mean(&means[17..]);
        assert!(after > before + 0.2, "{algorithm:?}: {before} -> {after}");
    }
}

#[test]
fn critic_warm_up_trains_only_the_value_loss() {
    let mut l = learner(3, |c| {
        c.algorithm = Algorithm::Ppo;
        c.critic_warmup = 2;
        c.kl_coef = 0.1;
        c.entropy_coef = 0.1;
    });
    for step in 0..3 {
        let batch = rollout(l.vlm(), 2, 4, step, &low_tokens);
        let report = l.update(&batch).unwrap();
        let value = 0.5 * report.loss["value"];
        assert!(value > 0.0 && report.kl_reference > 0.0);
        assert_eq!(near(report.loss["loss"], value, 1e-6), step < 2, "step {step}: {report:?}");
    }
}

#[test]
fn ratio_to_the_learner_uses_importance_weights() {
    let vlm = model(3);
    let batch = rollout(&vlm, 3, 4, 0, &low_tokens);
    let plain = update(&batch, |_| {});
    assert_eq!((plain.importance, plain.importance_bounded), (None, None));
    let same = update(&batch, |c| (c.ratio_to, c.importance) = (RatioBase::Learner, Importance::Truncate));
    assert!(near(same.importance.unwrap(), 1.0, 1e-5) && same.importance_bounded == Some(0.0), "{same:?}");
    assert!(near(same.grad_norm, plain.grad_norm, 1e-4), "the same policy: {} and {}", same.grad_norm, plain.grad_norm);
    // Tokens of older weights whose recorded log-probabilities are 1 too low: w = e, above the cap.
    let mut stale = batch;
    for r in stale.iter_mut().flat_map(|g| &mut g.responses) {
        r.versions.iter_mut().for_each(|v| *v = 7);
        r.logprobs.iter_mut().for_each(|v| *v -= 1.0);
    }
    let with = |importance| update(&stale, |c| (c.ratio_to, c.importance) = (RatioBase::Learner, importance));
    let (none, full, cut, masked) =
        (with(Importance::None), with(Importance::Full), with(Importance::Truncate), with(Importance::Mask));
    let e = std::f64::consts::E;
    assert!(near(full.importance.unwrap(), e, 1e-4) && near(full.grad_norm, e * none.grad_norm, 1e-3));
    assert!(near(cut.importance.unwrap(), 2.0, 1e-6) && near(cut.grad_norm, 2.0 * none.grad_norm, 1e-3));
    assert_eq!((masked.importance, masked.importance_bounded, masked.grad_norm), (Some(0.0), Some(1.0), 0.0));
    assert_eq!((none.clip_fraction, none.kl), (0.0, 0.0), "the ratio to the learner starts at 1");
    let coupled = update(&stale, |_| {});
    assert_eq!(coupled.clip_fraction, 1.0, "the ratio to the rollout is e");
}

#[test]
fn cispo_equals_the_clipped_surrogate_on_policy() {
    let batch = rollout(&model(3), 3, 4, 0, &low_tokens);
    let clip = update(&batch, |_| {});
    let cispo = update(&batch, |c| c.surrogate = Surrogate::Cispo);
    assert!(near(cispo.grad_norm, clip.grad_norm, 1e-4), "{} and {}", cispo.grad_norm, clip.grad_norm);
    assert!(!near(cispo.loss["policy"], clip.loss["policy"], 1e-3), "CISPO weighs log-probabilities");
}

#[test]
fn the_overlong_filter_leaves_out_cut_responses_alone() {
    let mut batch = rollout(&model(3), 3, 4, 0, &low_tokens);
    let cut = [(0, 1), (1, 0), (1, 1), (1, 2), (1, 3)];
    let tokens: usize = cut.iter().map(|(g, r)| batch[*g].responses[*r].tokens.len()).sum();
    for g in &mut batch {
        g.responses.iter_mut().for_each(|r| r.finish = Finish::Stop);
    }
    let whole = update(&batch, |c| c.overlong_filter = true);
    cut.iter().for_each(|(g, r)| batch[*g].responses[*r].finish = Finish::Length);
    let off = update(&batch, |_| {});
    assert_eq!((whole.filtered_responses, whole.tokens, off.filtered_responses), (0, off.tokens, 0));
    assert!(near(whole.grad_norm, off.grad_norm, 1e-6), "without cut responses the filter changes nothing");
    for algorithm in [Algorithm::Grpo, Algorithm::Rloo, Algorithm::Ppo, Algorithm::ReinforcePlusPlusBaseline] {
        let report = update(&batch, |c| (c.overlong_filter, c.algorithm) = (true, algorithm));
        assert_eq!((report.filtered_responses, report.tokens), (cut.len(), off.tokens - tokens), "{algorithm:?}");
        assert_eq!(report.responses, off.responses, "the report counts all responses");
    }
    let filtered = |batch: &[TrainGroup]| update(batch, |c| c.overlong_filter = true).grad_norm;
    // The reward of a cut response changes the advantages of the others.
    let before = filtered(&batch);
    batch[0].breakdowns[1].total = Some(5.0);
    assert!(!near(filtered(&batch), before, 1e-3));
    // It has no gradient itself: its tokens may be anything.
    let with = |batch: &mut Vec<TrainGroup>, token: u32| {
        batch[0].responses[1].tokens.iter_mut().for_each(|t| *t = token);
        filtered(batch)
    };
    let first = with(&mut batch, 1);
    assert!(near(with(&mut batch, 2), first, 1e-6));
}

#[test]
fn a_batch_of_cut_responses_is_skipped() {
    let mut batch = rollout(&model(3), 2, 4, 0, &low_tokens);
    batch.iter_mut().flat_map(|g| &mut g.responses).for_each(|r| r.finish = Finish::Length);
    let report = learner(3, |c| c.overlong_filter = true).update(&batch).unwrap();
    assert!(report.skipped.unwrap().contains("learner.overlong_filter"));
}

#[test]
fn kl_enters_the_loss_or_the_reward() {
    let batch = rollout(&model(3), 3, 4, 0, &low_tokens);
    let plain = update(&batch, |_| {});
    assert_eq!((plain.kl_coef, plain.kl_reference), (None, 0.0));
    for algorithm in [Algorithm::Grpo, Algorithm::Ppo, Algorithm::ReinforcePlusPlus] {
        let with = |place, coef, form| {
            update(&batch, |c| (c.algorithm, c.kl_in, c.kl_coef, c.kl_form) = (algorithm, place, coef, form))
        };
        let parts = |r: &UpdateReport| r.loss["policy"] + 0.5 * r.loss["value"];
        let in_loss = with(KlPlacement::Loss, 0.5, KlForm::K3);
        assert_eq!(in_loss.kl_coef, Some(0.5));
        assert!(near(in_loss.loss["loss"], parts(&in_loss) + 0.5 * in_loss.kl_reference, 1e-4), "{in_loss:?}");
        let weak = with(KlPlacement::Reward, 1e-9, KlForm::K1);
        let strong = with(KlPlacement::Reward, 0.5, KlForm::K1);
        assert!(near(strong.loss["loss"], parts(&strong), 1e-4), "not in the loss: {strong:?}");
        assert!(near(strong.kl_reference, weak.kl_reference, 1e-6) && weak.kl_reference != 0.0);
        assert!(!near(strong.grad_norm, weak.grad_norm, 1e-3), "{algorithm:?}: the penalty changes the advantages");
    }
}

#[test]
fn kl_coefficient_follows_its_target() {
    let mut l = learner(3, |c| (c.kl_coef, c.kl_target, c.kl_form) = (0.1, 1e-4, KlForm::K3));
    let mut coefs = Vec::new();
    for step in 0..3 {
        let batch = rollout(l.vlm(), 2, 4, step, &low_tokens);
        coefs.push(l.update(&batch).unwrap().kl_coef.unwrap());
    }
    for (got, want) in coefs.iter().zip([0.1, 0.1 * 1.02, 0.1 * 1.02 * 1.02]) {
        assert!(near(*got, want, 1e-9), "the KL to another model is far above the target: {coefs:?}");
    }
}

#[test]
fn loss_reductions_scale_the_gradient() {
    let batch = rollout(&model(3), 3, 4, 0, &low_tokens);
    let norm = |change: &dyn Fn(&mut schema::Learner)| {
        update(&batch, |c| {
            c.scale_by_std = false;
            change(c);
        })
        .grad_norm
    };
    let lengths: Vec<usize> = batch.iter().flat_map(|g| &g.responses).map(|r| r.tokens.len()).collect();
    let plain = norm(&|_| {});
    let reduction_norm = |mean: LossReduction| norm(&move |c| c.loss_mean = mean);
    let per_response = plain * lengths.iter().sum::<usize>() as f64 / lengths.len() as f64;
    assert!(near(reduction_norm(LossReduction::SequenceTokenSum), per_response, 1e-3));
    assert!(near(reduction_norm(LossReduction::SequenceMaxLength), per_response / MAX_TOKENS as f64, 1e-3));
    assert!(near(norm(&|c| c.policy_coef = 0.25), 0.25 * plain, 1e-3), "c1 scales the advantages");
    // On policy, all ratios are 1 at both levels, but the tokens of a response share one gradient.
    let sequence = norm(&|c| (c.ratio, c.loss_mean) = (RatioLevel::Sequence, LossReduction::SequenceTokenMean));
    assert!(near(sequence, reduction_norm(LossReduction::SequenceTokenMean), 1e-3));
}
