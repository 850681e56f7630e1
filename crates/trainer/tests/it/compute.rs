//! Updates in the fast precision mode: generation and training agree, recomputation changes nothing.

use tch::{Device, Kind};
use unveil_core::{Algorithm, Compute};
use unveil_model::{Vlm, agreement_limit};
use unveil_testkit_model::{configured, low_tokens, rollout, weights, write_model};
use unveil_trainer::PolicyTrainer;

fn fast_model(kind: Kind) -> Vlm {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), 3);
    let mut vlm = Vlm::load(dir.path(), Device::Cpu, kind).unwrap();
    vlm.set_compute(Compute::Fast).unwrap();
    vlm
}

fn trainer(kind: Kind, updates: u64, recompute: bool) -> PolicyTrainer {
    let vlm = fast_model(kind);
    let settings = configured(&vlm, updates, |l| {
        l.algorithm = Algorithm::Grpo;
        l.recompute = recompute;
    });
    assert_eq!(settings.agreement_limit, agreement_limit(Compute::Fast, kind));
    PolicyTrainer::new(vlm, None, settings).unwrap()
}

#[test]
fn fast_updates_agree_with_generation() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let mut learner = trainer(kind, 3, false);
        for step in 0..3 {
            let batch = rollout(learner.vlm(), 2, 4, step, &low_tokens);
            let report = learner.update(&batch).unwrap();
            assert_eq!(report.skipped, None);
            // Products of rounded operands are no longer equal to the last bit of fp32, but far below the limit.
            assert!(report.agreement.is_some_and(|a| a < 1e-2), "{kind:?}: {:?}", report.agreement);
        }
    }
}

#[test]
fn recomputation_equals_kept_activations_in_fast_mode() {
    let updated = |recompute: bool| -> Vec<f32> {
        let mut learner = trainer(Kind::Float, 1, recompute);
        let batch = rollout(learner.vlm(), 3, 4, 0, &low_tokens);
        assert_eq!(learner.update(&batch).unwrap().skipped, None);
        weights(learner.vlm()).into_iter().flat_map(|(_, values)| values).collect()
    };
    let before: Vec<f32> = weights(&fast_model(Kind::Float)).into_iter().flat_map(|(_, values)| values).collect();
    let kept = updated(false);
    let share =
        |a: &[f32], b: &[f32]| a.iter().zip(b).filter(|(a, b)| (*a - *b).abs() > 1e-6).count() as f64 / a.len() as f64;
    assert!(share(&before, &kept) > 0.3, "the update changes weights");
    // The first step of AdamW has the size of the learning rate wherever a gradient is not exactly 0: of the few that cancel, the sign may
    // differ.
    assert!(share(&kept, &updated(true)) < 0.01, "{}", share(&kept, &updated(true)));
}
