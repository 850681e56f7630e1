//! Products of bf16 operands equal fp64 products of the rounded operands, with their gradients; weights of any dtype keep fp32 gradients.

use tch::{Device, Kind, Tensor};
use unveil_torch_ext::{MatrixSet, Operands, keep_wide_gradient, mixed_linear, round_through};

fn random(size: &[i64]) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu))
}

fn rounded(t: &Tensor) -> Tensor {
    t.detach().to_kind(Kind::BFloat16).to_kind(Kind::Double)
}

fn error(a: &Tensor, b: &Tensor) -> f64 {
    let b = b.to_kind(Kind::Double);
    ((a.to_kind(Kind::Double) - &b).abs().max() / b.abs().max()).double_value(&[])
}

/// Trained tensors that share the memory of one.
fn parts(whole: &Tensor, rows: &[i64]) -> Vec<Tensor> {
    let parts = whole.split_with_sizes(rows, 0);
    let trained = |t: Tensor| t.detach().set_requires_grad(true);
    parts.into_iter().map(trained).inspect(|t| keep_wide_gradient(t).unwrap()).collect()
}

/// The rounding error of an fp32 gradient that is rounded to bf16 would be 2e-3.
#[test]
fn products_and_gradients_equal_fp64() {
    tch::manual_seed(crate::seed());
    let shapes: [&[i64]; 3] = [&[7, 33], &[2, 5, 33], &[33]];
    for shape in shapes {
        for kind in [Kind::Float, Kind::BFloat16] {
            for operands in [Operands::Bf16, Operands::Input] {
                for (biased, stored_whole, rows) in
                    [(false, false, vec![5]), (true, false, vec![5, 2, 9]), (true, true, vec![5, 2, 9])]
                {
                    let case = format!("{shape:?} {kind:?} {operands:?} {biased} {stored_whole}");
                    let n: i64 = rows.iter().sum();
                    let x = random(shape).set_requires_grad(true);
                    let whole = (random(&[n, 33]).to_kind(kind), random(&[n]).to_kind(kind));
                    let weights = parts(&whole.0, &rows);
                    let biases = if biased { parts(&whole.1, &rows) } else { Vec::new() };
                    let set = MatrixSet {
                        weights: &weights.iter().collect::<Vec<_>>(),
                        biases: &biases.iter().collect::<Vec<_>>(),
                        whole: stored_whole.then_some((&whole.0, Some(&whole.1))),
                    };
                    let y = mixed_linear(&x, &set, operands).unwrap();
                    let seed = random(&y.size());
                    // Twice, to see that gradients add up.
                    for _ in 0..2 {
                        (mixed_linear(&x, &set, operands).unwrap() * &seed).sum(Kind::Float).backward();
                    }
                    let operand = |t: &Tensor| match operands {
                        Operands::Bf16 => rounded(t),
                        Operands::Input => t.detach().to_kind(Kind::Double),
                    };
                    let wide = |t: &Tensor| t.to_kind(Kind::Double);
                    let expected = operand(&x).matmul(&operand(&whole.0).tr());
                    let expected = if biased { expected + wide(&whole.1) } else { expected };
                    let g = operand(&seed).reshape([-1, n]);
                    let dx = (g.matmul(&operand(&whole.0)) * 2.0).reshape(shape);
                    let dw = g.tr().matmul(&operand(&x).reshape([-1, 33])) * 2.0;
                    let db = wide(&seed).reshape([-1, n]).sum_dim_intlist([0i64].as_slice(), false, Kind::Double) * 2.0;
                    assert!(error(&y, &expected) < 1e-6 && error(&x.grad(), &dx) < 1e-6, "{case}");
                    let check = |trained: &[Tensor], all: &Tensor| {
                        for (t, expected) in trained.iter().zip(all.split_with_sizes(rows.as_slice(), 0)) {
                            assert_eq!(t.grad().kind(), Kind::Float, "{case}");
                            assert!(error(&t.grad(), &expected) < 1e-6, "{case}");
                        }
                    };
                    check(&weights, &dw);
                    check(&biases, &db);
                }
            }
        }
    }
}

#[test]
fn frozen_weights_and_inputs_get_no_gradient() {
    tch::manual_seed(5);
    let x = random(&[3, 8]);
    let trained = random(&[2, 8]).set_requires_grad(true);
    let frozen = random(&[4, 8]);
    let set = MatrixSet { weights: &[&frozen, &trained], biases: &[], whole: None };
    mixed_linear(&x, &set, Operands::Bf16).unwrap().sum(Kind::Float).backward();
    assert!(trained.grad().defined() && !frozen.grad().defined() && !x.grad().defined());
    assert!(!tch::no_grad(|| mixed_linear(&x, &set, Operands::Bf16).unwrap()).requires_grad());
}

#[test]
fn rounding_passes_the_gradient_unchanged() {
    tch::manual_seed(6);
    let t = random(&[50]).set_requires_grad(true);
    let seed = random(&[50]);
    let out = round_through(&t).unwrap();
    assert_eq!(out.to_kind(Kind::Double), rounded(&t));
    (&out * &seed).sum(Kind::Float).backward();
    assert_eq!(t.grad(), seed);
}

#[test]
fn matrices_that_do_not_fit_are_refused() {
    let t = |size: &[i64]| Tensor::zeros(size, (Kind::Float, Device::Cpu));
    let x = t(&[3, 4]);
    let refused = |x: &Tensor, weights: &[&Tensor], biases: &[&Tensor], whole: Option<&Tensor>| {
        let set = MatrixSet { weights, biases, whole: whole.map(|w| (w, None)) };
        mixed_linear(x, &set, Operands::Bf16).unwrap_err().to_string()
    };
    let fits = t(&[2, 4]);
    assert!(refused(&x, &[&t(&[2, 5])], &[], None).contains("a matrix of [2, 5] for an input of [3, 4]"));
    assert!(refused(&x, &[&fits], &[&t(&[3])], None).contains("a bias of [3]"));
    assert!(refused(&x, &[&fits, &fits], &[&t(&[2])], None).contains("1 biases for 2 matrices"));
    assert!(refused(&x, &[&fits], &[], Some(&t(&[3, 4]))).contains("in one of [3, 4]"));
    assert!(refused(&x, &[], &[], None).contains("for 0 matrices"));
    assert!(refused(&x.to_kind(Kind::Double), &[&fits], &[], None).contains("Double"));
    assert!(
        keep_wide_gradient(&(fits.set_requires_grad(true) * 2.0))
            .unwrap_err()
            .to_string()
            .contains("dtype of a gradient")
    );
}
