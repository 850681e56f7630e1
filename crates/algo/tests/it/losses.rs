//! Compares values and gradients of the loss with PyTorch, for every form, clip range, coefficient and reduction.

use serde_json::{Value, json};
use tch::{Kind, Tensor};
use unveil_algo::{ClipRange, LossParts, Objective, TokenBatch, TokenLayout, policy_loss};
use unveil_core::{Importance, KlForm, KlGradient, LossReduction, RatioLevel, Surrogate};

use crate::batch::{Batch, LEAVES};
use crate::harness::{Cases, DOUBLE, Results, SINGLE, Tolerance, seed};

const CLIPS: [ClipRange; 3] = [
    ClipRange { low: 0.2, high: 0.28, dual: None },
    ClipRange { low: 0.3, high: 0.3, dual: Some(3.0) },
    ClipRange { low: 0.1, high: 0.2, dual: Some(1.5) },
];
/// Importance weights and their bounds.
const IMPORTANCE: [(Importance, f64); 5] = [
    (Importance::None, 1.0),
    (Importance::Full, 1.0),
    (Importance::Truncate, 1.6),
    (Importance::Mask, 1.8),
    (Importance::Truncate, 1.0),
];
pub(crate) const REDUCTIONS: [LossReduction; 5] = [
    LossReduction::Token,
    LossReduction::SequenceTokenMean,
    LossReduction::SequenceTokenSum,
    LossReduction::SequenceMaxLength,
    LossReduction::GroupTokenMean,
];
const KL: [KlForm; 3] = [KlForm::K1, KlForm::K2, KlForm::K3];

/// Returns objective `i` of a series through all options; 60 of them cover every pair of neighbouring fields below.
fn objective(i: usize) -> Objective {
    let (importance, importance_cap) = IMPORTANCE[(i + i / 5) % 5];
    Objective {
        policy_coef: [1.0, 0.7][i / 5 % 2],
        surrogate: if i % 7 == 6 { Surrogate::Cispo } else { Surrogate::Clip },
        clip: CLIPS[i % 3],
        ratio: if i % 4 == 3 { RatioLevel::Sequence } else { RatioLevel::Token },
        importance,
        importance_cap,
        reduction: REDUCTIONS[i % 5],
        max_length: 12,
        value_coef: 0.5,
        value_clip: [0.2, 0.0][i / 2 % 2],
        entropy_coef: 0.01,
        kl_coef: 0.05,
        kl_form: KL[(i + i / 3) % 3],
        kl_gradient: [KlGradient::Own, KlGradient::Reverse][i % 2],
        attention_coef: 0.3,
    }
}

fn settings(o: &Objective, batch: &Batch) -> Value {
    json!({
        "what": "loss", "lengths": batch.layout.lengths(), "policy_coef": o.policy_coef, "surrogate": o.surrogate, "clip_low": o.clip.low,
        "clip_high": o.clip.high, "clip_dual": o.clip.dual, "ratio": format!("{:?}", o.ratio), "correction": o.importance,
        "cap": o.importance_cap, "aggregation": format!("{:?}", o.reduction), "max_length": o.max_length, "value_coef": o.value_coef,
        "value_clip": o.value_clip, "entropy_coef": o.entropy_coef, "kl_coef": o.kl_coef,
        "kl_form": format!("{:?}", o.kl_form), "kl_gradient": format!("{:?}", o.kl_gradient),
        "attention_coef": o.attention_coef,
    })
}

fn compare(want: &Results, name: &str, parts: &LossParts, o: &Objective, tolerance: Tolerance) {
    let m = &parts.means;
    let mut scalars = vec![
        ("loss", &parts.loss),
        ("policy", &parts.policy),
        ("entropy", &parts.entropy),
        ("kl", &parts.kl),
        ("mean_entropy", &m.entropy),
        ("mean_kl", &m.kl),
        ("clip_fraction", &m.clip_fraction),
        ("approx_kl", &m.approx_kl),
    ];
    scalars.extend((o.value_coef > 0.0).then_some(("value", &parts.value)));
    scalars.extend((o.attention_coef > 0.0).then_some(("attention", &parts.attention)));
    if let Some((mean, bounded)) = &m.importance {
        scalars.extend([("importance", mean), ("bounded", bounded)]);
    }
    assert_eq!(m.importance.is_some(), o.importance != Importance::None);
    for (key, ours) in scalars {
        want.assert_close(name, key, ours, tolerance);
    }
}

/// A loss on a random batch, to be compared with Python.
struct Case {
    name: String,
    objective: Objective,
    batch: Batch,
    kind: Kind,
    tolerance: Tolerance,
}

fn series(objectives: &[Objective], kind: Kind, first_seed: u64, tolerance: Tolerance) -> Vec<Case> {
    let case = |(i, objective): (usize, &Objective)| {
        let batch = Batch::random(seed(first_seed + i as u64), kind);
        Case { name: format!("{kind:?}-{}", first_seed + i as u64), objective: *objective, batch, kind, tolerance }
    };
    objectives.iter().enumerate().map(case).collect()
}

/// A token far outside the clip range keeps its gradient with CISPO, and has none with the clipped surrogate.
#[test]
fn cispo_keeps_the_gradient_of_clipped_tokens() {
    let old = Tensor::from_slice(&[-2.5f64, -0.2]);
    let advantages = Tensor::from_slice(&[1.0f64, -2.0]);
    let layout = TokenLayout::new(vec![vec![1, 1]]);
    let gradient = |surrogate| {
        let logprobs = Tensor::from_slice(&[-0.5f64, -3.0]).set_requires_grad(true);
        let objective = Objective { surrogate, ..Objective::surrogate(0.2, 0.28) };
        let batch = TokenBatch {
            logprobs: Some(&logprobs),
            old_logprobs: Some(&old),
            advantages: Some(&advantages),
            ..Default::default()
        };
        let parts = policy_loss(&objective, &batch, &layout, &layout.counts()).unwrap();
        assert_eq!(parts.means.clip_fraction.double_value(&[]), 1.0);
        parts.loss.backward();
        Vec::<f64>::try_from(logprobs.grad()).unwrap()
    };
    assert_eq!(gradient(Surrogate::Clip), [0.0, 0.0]);
    // Minus weight times advantage, over two tokens: the weights are 1.28 and 0.8.
    let cispo = gradient(Surrogate::Cispo);
    assert!((cispo[0] + 1.28 / 2.0).abs() < 1e-12 && (cispo[1] - 0.8 * 2.0 / 2.0).abs() < 1e-12, "{cispo:?}");
}

/// Compares all options in both dtypes and single terms. Python computes them in one run, because its imports take longer.
#[test]
fn losses_and_gradients_match_pytorch() {
    let all: Vec<Objective> = (0..60).map(objective).collect();
    let mut cases = series(&all, Kind::Double, 1000, DOUBLE);
    cases.extend(series(&all, Kind::Float, 2000, SINGLE));
    cases.extend(series(&single_terms(), Kind::Double, 3000, DOUBLE));
    let mut inputs = Cases::default();
    for c in &cases {
        inputs.add(&c.name, settings(&c.objective, &c.batch), c.batch.tensors());
    }
    let want = inputs.run("golden.py");
    for Case { name, objective, batch, kind, tolerance } in &cases {
        let (parts, gradients) = batch.loss(objective, &batch.counts()).unwrap();
        assert_eq!(parts.loss.kind(), *kind, "{objective:?}");
        compare(&want, name, &parts, objective, *tolerance);
        for (leaf, gradient) in LEAVES.iter().zip(&gradients) {
            assert_eq!(gradient.kind(), *kind);
            want.assert_close(name, &format!("grad_{leaf}"), gradient, *tolerance);
        }
    }
}

/// Returns objectives of one term or option each.
fn single_terms() -> Vec<Objective> {
    let base = Objective::surrogate(0.2, 0.28);
    let mut all = vec![
        base,
        Objective::paper(0.4, 0.3, 0.02, 0.2),
        Objective { value_coef: 0.5, value_clip: 0.2, ..base }.critic_only(),
        Objective { attention_coef: 0.7, ..base },
        Objective { ratio: RatioLevel::Sequence, reduction: LossReduction::SequenceTokenMean, ..base },
    ];
    for kl_form in KL {
        for kl_gradient in [KlGradient::Own, KlGradient::Reverse] {
            all.push(Objective { kl_coef: 0.2, kl_form, kl_gradient, ..base });
        }
    }
    all.extend(IMPORTANCE.map(|(importance, importance_cap)| Objective { importance, importance_cap, ..base }));
    all.extend(CLIPS.map(|clip| Objective { clip, ..base }));
    let cispo = Objective { surrogate: Surrogate::Cispo, ..base };
    all.extend(CLIPS.map(|clip| Objective { clip, ..cispo }));
    // No lower bound of the weight.
    all.push(Objective { clip: ClipRange { low: 1.0, high: 1.5, dual: None }, ..cispo });
    all.push(Objective { ratio: RatioLevel::Sequence, importance: Importance::Truncate, importance_cap: 1.6, ..cispo });
    all.extend(REDUCTIONS.map(|reduction| Objective { reduction, max_length: 12, ..base }));
    all
}

#[test]
fn gradients_of_omitted_terms_are_zero() {
    let b = Batch::random(seed(4000), Kind::Double);
    let critic = Objective { value_coef: 0.5, kl_coef: 0.1, entropy_coef: 0.1, ..objective(3) }.critic_only();
    let (_, gradients) = b.loss(&critic, &b.counts()).unwrap();
    for (leaf, gradient) in LEAVES.iter().zip(&gradients) {
        assert_eq!(gradient.abs().max().double_value(&[]) > 0.0, *leaf == "values", "{leaf}");
    }
    let advantages: Vec<(&str, Tensor)> = b.named.iter().map(|(k, t)| (*k, t.shallow_clone())).collect();
    let mut flat = Batch { layout: b.layout.clone(), named: advantages };
    flat.named.iter_mut().filter(|(k, _)| *k == "advantages").for_each(|(_, t)| *t = t.zeros_like());
    for dual in [None, Some(2.0)] {
        let o = Objective { clip: ClipRange { low: 0.2, high: 0.2, dual }, ..Objective::surrogate(0.2, 0.2) };
        let (parts, gradients) = flat.loss(&o, &flat.counts()).unwrap();
        assert_eq!((parts.loss.double_value(&[]), gradients[0].abs().max().double_value(&[])), (0.0, 0.0));
    }
}
