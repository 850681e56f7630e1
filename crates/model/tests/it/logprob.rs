//! Log-probabilities and entropy against values computed by hand.

use tch::{Kind, Tensor};
use unveil_model::{logprobs, logprobs_entropy};

#[test]
fn banned_tokens_have_no_probability() {
    let logits = Tensor::from_slice(&[0.0f32, 1.0, 50.0, 1.0]).view([1, 4]).set_requires_grad(true);
    let targets = Tensor::from_slice(&[1i64]);
    let (lp, ent) = logprobs_entropy(&logits, &targets, 0.5, &[2, 99]);
    let z = 1.0 + 2.0 * 2f64.exp();
    assert!((lp.double_value(&[0]) - (2.0 - z.ln())).abs() < 1e-5);
    let p0 = 1.0 / z;
    let p1 = 2f64.exp() / z;
    assert!((ent.double_value(&[0]) + p0 * p0.ln() + 2.0 * p1 * p1.ln()).abs() < 1e-5);
    (lp.sum(Kind::Float) + ent.sum(Kind::Float)).backward();
    assert!(logits.grad().isfinite().all().int64_value(&[]) == 1);
}

#[test]
fn greedy_counts_as_temperature_one() {
    let logits = Tensor::from_slice(&[0.5f32, -1.0]).view([1, 2]);
    let target = Tensor::from_slice(&[0i64]);
    let at = |temperature: f64| logprobs(&logits, &target, temperature, &[]).double_value(&[0]);
    assert_eq!(at(0.0), at(1.0));
    assert_ne!(at(0.5), at(1.0));
}
