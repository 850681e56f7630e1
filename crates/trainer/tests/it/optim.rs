//! AdamW, decay, clipping and moments against `torch.optim.AdamW` over several steps.

use std::path::Path;
use std::process::Command;

use tch::{Device, Kind, Tensor};
use unveil_config::schema::Optimizer;
use unveil_testkit::python;
use unveil_trainer::optim::AdamW;

/// Compares six updates of a matrix and a vector of dtype `kind`; the vector is frozen in the first `frozen` of them.
fn equals_torch(frozen: i64, kind: Kind) {
    tch::manual_seed(4);
    let opt = (Kind::Float, Device::Cpu);
    let lr = 1e-3;
    let clip = 0.7;
    let decay = 0.1;
    let steps = 6;
    let scale = Tensor::from_slice(&[0.01f32, 0.1, 5.0, 0.3, 1e-4, 2.0]);
    let named = [
        ("matrix", Tensor::randn([7, 5], opt)),
        ("vector", Tensor::randn([9], opt)),
        ("grad_matrix", Tensor::randn([steps, 7, 5], opt) * scale.view([-1, 1, 1])),
        ("grad_vector", Tensor::randn([steps, 9], opt) * scale.view([-1, 1])),
    ];
    let dir = tempfile::tempdir().unwrap();
    let src = dir.path().join("in.safetensors");
    let dst = dir.path().join("out.safetensors");
    Tensor::write_safetensors(&named, &src).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/optim.py");
    let numbers = [lr, clip, decay].map(|v: f64| v.to_string());
    let options_args = [frozen.to_string(), if kind == Kind::BFloat16 { "bfloat16" } else { "float32" }.to_owned()];
    let mut run = Command::new(python());
    let run = run.arg(script).args([&src, &dst]).args(numbers).args(options_args).env("OMP_NUM_THREADS", "1").output();
    let run = run.unwrap();
    assert!(run.status.success(), "optim.py: {}", String::from_utf8_lossy(&run.stderr));

    let leaf = |i: usize| named[i].1.to_kind(kind).copy().set_requires_grad(true);
    let parameters = vec![("matrix".to_owned(), leaf(0)), ("vector".to_owned(), leaf(1))];
    let options = Optimizer { lr, clip_norm: clip, weight_decay: decay, ..Default::default() };
    let mut adam = AdamW::new(&options, &parameters).unwrap();
    for step in 0..steps {
        adam.set_trained(|name| name != "vector" || step >= frozen);
        adam.zero_grad().unwrap();
        let weigh = |i: usize| (&parameters[i].1 * named[i + 2].1.get(step).to_kind(kind)).sum(Kind::Float);
        let loss: Tensor = (0..2).map(weigh).sum();
        loss.backward();
        let gradient = adam.collect_gradient().unwrap();
        adam.step(gradient, lr * (step + 1) as f64).unwrap();
    }
    let mut ours = adam.state().unwrap();
    ours.extend(adam.weights().unwrap());
    ours.extend(parameters.iter().map(|(n, t)| (format!("rounded.{n}"), t.detach().to_kind(Kind::Float))));
    for (name, want) in Tensor::read_safetensors(&dst).unwrap() {
        let Some((_, found)) = ours.iter().find(|(n, _)| *n == name) else {
            assert_eq!((name.starts_with("step."), want.double_value(&[0])), (true, steps as f64), "{name}");
            continue;
        };
        let far = (found - &want).abs().max().double_value(&[]);
        let size = want.abs().max().double_value(&[]);
        // Weights near the midpoint of two bf16 values may be rounded either way.
        let limit = if kind == Kind::BFloat16 && name.starts_with("rounded.") { 1e-2 } else { 1e-6 };
        assert!(far <= limit * size.max(1e-3), "{name}: {far} of {size}");
    }
    let counted = ours.iter().filter(|(n, _)| n.starts_with("step.")).count();
    assert_eq!(counted, usize::from(frozen > 0), "counts that differ from the number of updates are part of the state");
}

#[test]
fn updates_equal_torch() {
    equals_torch(0, Kind::Float);
}

#[test]
fn updates_of_thawed_parameters_equal_torch() {
    equals_torch(2, Kind::Float);
}

#[test]
fn updates_of_master_weights_equal_torch() {
    equals_torch(3, Kind::BFloat16);
}

/// Repeats the tests with the rounding of other instruction sets.
#[test]
fn numbers_hold_under_every_dispatch() {
    unveil_testkit::under_every_dispatch(&["optim::"]);
}
