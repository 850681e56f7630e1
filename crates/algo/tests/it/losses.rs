//! Compares values and gradients of the loss with PyTorch, for every form, clip range, coefficient and reduction.

use serde_json::{Value, json};
use tch::Kind;
use unveil_algo::{ClipRange, Correction, KlForm, KlGradient, LossParts, LossReduction, Objective, RatioLevel};

use crate::batch::{Batch, LEAVES};
use crate::harness::{Cases, DOUBLE, Results, SINGLE, Tolerance, seed};

const CLIPS: [ClipRange; 3] = [
    ClipRange { low: 0.2, high: 0.28, dual: None },
    ClipRange { low: 0.3, high: 0.3, dual: Some(3.0) },
    ClipRange { low: 0.1, high: 0.2, dual: Some(1.5) },
];
const CORRECTIONS: [Correction; 5] = [
    Correction::None,
    Correction::Full,
    Correction::Truncate { cap: 1.6 },
    Correction::Mask { cap: 1.8 },
    Correction::Truncate { cap: 1.0 },
];
pub const REDUCTIONS: [LossReduction; 5] = [
    LossReduction::TokenMean,
    LossReduction::SequenceTokenMean,
    LossReduction::SequenceTokenSum,
    LossReduction::SequenceMaxLength { max_length: 12 },
    LossReduction::GroupTokenMean,
];
const KL: [KlForm; 3] = [KlForm::K1, KlForm::K2, KlForm::K3];

/// Returns objective `i` of a series through all options; 60 of them cover every pair of neighbouring fields below.
fn objective(i: usize) -> Objective {
    Objective {
        policy_coef: [1.0, 0.7][i / 5 % 2],
        clip: CLIPS[i % 3],
        ratio: if i % 4 == 3 { RatioLevel::Sequence } else { RatioLevel::Token },
        correction: CORRECTIONS[(i + i / 5) % 5],
        reduction: REDUCTIONS[i % 5],
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
    let (correction, cap) = match o.correction {
        Correction::None => ("none", 0.0),
        Correction::Full => ("full", 0.0),
        Correction::Truncate { cap } => ("truncate", cap),
        Correction::Mask { cap } => ("mask", cap),
    };
    let (reduction, max_length) = match o.reduction {
        LossReduction::SequenceMaxLength { max_length } => ("SequenceMaxLength".to_owned(), max_length),
        other => (format!("{other:?}"), 0),
    };
    json!({
        "what": "loss", "lengths": batch.layout.lengths(), "policy_coef": o.policy_coef, "clip_low": o.clip.low,
        "clip_high": o.clip.high, "clip_dual": o.clip.dual, "ratio": format!("{:?}", o.ratio), "correction": correction,
        "cap": cap, "aggregation": reduction, "max_length": max_length, "value_coef": o.value_coef,
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
    assert_eq!(m.importance.is_some(), o.correction != Correction::None);
    for (key, ours) in scalars {
        want.assert_close(name, key, ours, tolerance);
    }
}

fn check(objectives: &[Objective], kind: Kind, first_seed: u64, tolerance: Tolerance) {
    let mut cases = Cases::default();
    let batches: Vec<Batch> = (0..objectives.len()).map(|i| Batch::random(seed(first_seed + i as u64), kind)).collect();
    for (i, (o, b)) in objectives.iter().zip(&batches).enumerate() {
        cases.add(&format!("{i}"), settings(o, b), b.tensors());
    }
    let want = cases.run("golden.py");
    for (i, (o, b)) in objectives.iter().zip(&batches).enumerate() {
        let (parts, gradients) = b.loss(o, &b.counts()).unwrap();
        assert_eq!(parts.loss.kind(), kind, "{o:?}");
        compare(&want, &format!("{i}"), &parts, o, tolerance);
        for (leaf, gradient) in LEAVES.iter().zip(&gradients) {
            assert_eq!(gradient.kind(), kind);
            want.assert_close(&format!("{i}"), &format!("grad_{leaf}"), gradient, tolerance);
        }
    }
}

#[test]
fn all_options_match_pytorch_in_f64() {
    let all: Vec<Objective> = (0..60).map(objective).collect();
    check(&all, Kind::Double, 1000, DOUBLE);
}

#[test]
fn all_options_match_pytorch_in_f32() {
    let all: Vec<Objective> = (0..60).map(objective).collect();
    check(&all, Kind::Float, 2000, SINGLE);
}

#[test]
fn single_terms_match_pytorch() {
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
    all.extend(CORRECTIONS.map(|correction| Objective { correction, ..base }));
    all.extend(CLIPS.map(|clip| Objective { clip, ..base }));
    all.extend(REDUCTIONS.map(|reduction| Objective { reduction, ..base }));
    check(&all, Kind::Double, 3000, DOUBLE);
}

#[test]
fn gradients_of_omitted_terms_are_zero() {
    let b = Batch::random(seed(4000), Kind::Double);
    let critic = Objective { value_coef: 0.5, kl_coef: 0.1, entropy_coef: 0.1, ..objective(3) }.critic_only();
    let (_, gradients) = b.loss(&critic, &b.counts()).unwrap();
    for (leaf, gradient) in LEAVES.iter().zip(&gradients) {
        assert_eq!(gradient.abs().max().double_value(&[]) > 0.0, *leaf == "values", "{leaf}");
    }
    let advantages: Vec<(&str, tch::Tensor)> = b.named.iter().map(|(k, t)| (*k, t.shallow_clone())).collect();
    let mut flat = Batch { layout: b.layout.clone(), named: advantages };
    flat.named.iter_mut().filter(|(k, _)| *k == "advantages").for_each(|(_, t)| *t = t.zeros_like());
    for dual in [None, Some(2.0)] {
        let o = Objective { clip: ClipRange { low: 0.2, high: 0.2, dual }, ..Objective::surrogate(0.2, 0.2) };
        let (parts, gradients) = flat.loss(&o, &flat.counts()).unwrap();
        assert_eq!((parts.loss.double_value(&[]), gradients[0].abs().max().double_value(&[])), (0.0, 0.0));
    }
}
