//! The operations of an update: no wait for the device inside a pass, and no pass that is not needed.

use unveil_config::schema::{KlPlacement, RatioBase};
use unveil_core::{Algorithm, TrainGroup};
use unveil_testkit_model::{configured, low_tokens, model, rollout};
use unveil_torch_ext::{OperationCounts, count_operations};
use unveil_trainer::{PolicyTrainer, StepSettings, UpdateReport};

/// Performs one update in micro-batches of one group each, and counts its operations.
fn update(batch: &[TrainGroup], change: impl FnOnce(&mut StepSettings)) -> (UpdateReport, OperationCounts) {
    let vlm = model(7);
    let mut settings = configured(&vlm, 5, |l| l.algorithm = Algorithm::Grpo);
    settings.token_budget = 1;
    change(&mut settings);
    let reference = (settings.objective.kl_coef > 0.0).then(|| model(8));
    let mut trainer = PolicyTrainer::new(vlm, reference, settings).unwrap();
    let (report, counts) = count_operations(|| trainer.update(batch)).unwrap();
    let report = report.unwrap();
    assert_eq!(report.skipped, None);
    (report, counts)
}

/// Number of passes: each embeds its tokens once.
fn passes(counts: &OperationCounts) -> u64 {
    counts["aten::embedding"]
}

#[test]
fn updates_read_no_single_numbers() {
    let batch = rollout(&model(7), 4, 4, 0, &low_tokens);
    let entropy = |s: &mut StepSettings| s.objective.entropy_coef = 0.01;
    let kl = |s: &mut StepSettings| s.objective.kl_coef = 0.1;
    for change in [&entropy as &dyn Fn(&mut StepSettings), &kl] {
        let (_, counts) = update(&batch, change);
        // A read of a number waits for all work that the GPU has been given.
        assert_eq!(counts.get("aten::_local_scalar_dense"), None, "{counts:?}");
        assert!(passes(&counts) >= 4, "{counts:?}");
    }
}

#[test]
fn one_pass_over_each_group_suffices() {
    let batch = rollout(&model(7), 4, 4, 0, &low_tokens);
    let (report, counts) = update(&batch, |_| {});
    assert_eq!(passes(&counts), 4);
    // The loss of older weights needs log-probabilities of the learner first.
    let (_, counts) = update(&batch, |s| s.ratio_to = RatioBase::Learner);
    assert_eq!(passes(&counts), 8);
    let (_, counts) = update(&batch, |s| s.inner_epochs = 2);
    assert_eq!(passes(&counts), 12);
    // A batch within the budget keeps its first passes.
    let (whole, counts) = update(&batch, |s| s.token_budget = usize::MAX);
    assert!(passes(&counts) <= 4);
    assert!((report.agreement.unwrap() - whole.agreement.unwrap()).abs() < 1e-6, "{report:?} {whole:?}");
    assert!((report.loss["loss"] - whole.loss["loss"]).abs() < 1e-5);
    assert!((report.grad_norm - whole.grad_norm).abs() < 1e-4 * whole.grad_norm);
}

#[test]
fn kl_is_reported_alike_from_either_pass() {
    let batch = rollout(&model(7), 3, 4, 0, &low_tokens);
    let run = |kl_in: KlPlacement| {
        update(&batch, |s| {
            s.objective.kl_coef = 0.1;
            s.kl_in = kl_in;
            s.kl_target = 1.0;
        })
    };
    // KL in the reward enters the advantages: three more passes, besides the three of the reference.
    let (in_loss, few) = run(KlPlacement::Loss);
    let (in_reward, more) = run(KlPlacement::Reward);
    assert_eq!((passes(&few), passes(&more)), (6, 9));
    assert_eq!(in_loss.kl_coef, in_reward.kl_coef);
    // The training pass records a graph and takes other paths through matrix products: log-probabilities agree to fp32 rounding, a tenth of
    // the limit.
    let [recorded, plain] = [in_loss.agreement.unwrap(), in_reward.agreement.unwrap()];
    assert!((recorded - plain).abs() < 1e-6, "{recorded:e} {plain:e}");
    println!("agreement {recorded:e} in the training pass, {plain:e} in a pass of its own");
}
