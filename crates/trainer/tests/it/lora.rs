//! Adapters in stage 2: training, and the policy without them as the KL reference.

use unveil_model::Vlm;
use unveil_testkit_model::{adapters, add_noise, configured, lora_spec, low_tokens, model, rollout, weights};
use unveil_trainer::PolicyTrainer;

fn adapted(seed: u64) -> Vlm {
    let mut vlm = model(seed);
    vlm.init_adapters(&lora_spec(4), 1).unwrap();
    vlm
}

/// Adapters are trained, and nothing else.
#[test]
fn adapters_raise_a_toy_reward_with_frozen_weights() {
    let vlm = adapted(3);
    let before = weights(&vlm);
    let fresh = adapters(&vlm);
    let settings = configured(&vlm, 20, |l| l.optimizer.lr = 1e-2);
    let mut learner = PolicyTrainer::new(vlm, None, settings).unwrap();
    let mut means = Vec::new();
    for step in 0..20 {
        let batch = rollout(learner.vlm(), 4, 8, step, &low_tokens);
        let report = learner.update(&batch).unwrap();
        assert!(report.agreement.is_some_and(|a| a < 1e-5), "{:?}", report.agreement);
        means.push(report.reward["total"]);
    }
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let first = mean(&means[..3]);
    let last = mean(&means[17..]);
    assert!(last > first + 0.2, "{first} -> {last}");
    assert!(weights(learner.vlm()) == before, "a frozen weight has changed");
    let moved = adapters(learner.vlm());
    assert!(moved.iter().zip(&fresh).all(|(a, b)| a.1 != b.1), "every adapter is trained");
    // Generation with merged weights and the CPU kernels agrees as well.
    let batch = learner.vlm_mut().merged(|vlm| rollout(vlm, 4, 8, 20, &low_tokens)).unwrap();
    let report = learner.update(&batch).unwrap();
    assert!(report.agreement.is_some_and(|a| a < 1e-5), "{:?}", report.agreement);
}

/// The model without its adapters serves as the reference, bit for bit like a second copy.
#[test]
fn disabled_adapters_equal_a_reference_model() {
    for recompute in [false, true] {
        let update = |reference: Option<Vlm>| {
            let mut vlm = adapted(5);
            add_noise(&mut vlm, 8);
            let settings = configured(&vlm, 10, |l| {
                l.kl_coef = 0.2;
                l.recompute = recompute;
                l.inner_epochs = 2;
            });
            let mut learner = PolicyTrainer::new(vlm, reference, settings).unwrap();
            let batch = rollout(learner.vlm(), 3, 4, 0, &low_tokens);
            let report = learner.update(&batch).unwrap();
            (report.kl_reference, report.loss, adapters(learner.vlm()))
        };
        let without_reference = update(None);
        let copy = update(Some(model(5)));
        assert!(without_reference.0 > 1e-3, "the reference is another model: {}", without_reference.0);
        assert!(
            without_reference == copy,
            "{:?} is not {:?}",
            (without_reference.0, without_reference.1),
            (copy.0, copy.1)
        );
    }
}
