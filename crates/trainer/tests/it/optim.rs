//! AdamW, decay, clipping and moments against `torch.optim.AdamW` over several steps.

use std::path::Path;
use std::process::Command;

use tch::{Device, Kind, Tensor};
use unveil_config::schema::{Optimizer, ParameterGroup};
use unveil_testkit::python;
use unveil_trainer::optim::AdamW;

const LR: f64 = 1e-3;
const CLIP: f64 = 0.7;
const DECAY: f64 = 0.1;
const STEPS: i64 = 6;

/// A run: updates in which the vector is frozen at first, dtype, and the vector's learning rate relative to that of the matrix.
#[derive(Debug, Clone, Copy)]
struct Run {
    frozen: i64,
    kind: Kind,
    rate: f64,
}

/// Compares six updates of a matrix and a vector: plain, with a vector that is frozen at first or has another learning rate, and in bf16
/// with fp32 master weights.
#[test]
fn updates_equal_torch() {
    tch::manual_seed(4);
    let opt = (Kind::Float, Device::Cpu);
    let scale = Tensor::from_slice(&[0.01f32, 0.1, 5.0, 0.3, 1e-4, 2.0]);
    let named = [
        ("matrix", Tensor::randn([7, 5], opt)),
        ("vector", Tensor::randn([9], opt)),
        ("grad_matrix", Tensor::randn([STEPS, 7, 5], opt) * scale.view([-1, 1, 1])),
        ("grad_vector", Tensor::randn([STEPS, 9], opt) * scale.view([-1, 1])),
    ];
    let dir = tempfile::tempdir().unwrap();
    let src = dir.path().join("in.safetensors");
    Tensor::write_safetensors(&named, &src).unwrap();
    let run = |frozen: i64, kind: Kind, rate: f64| Run { frozen, kind, rate };
    let runs = [
        run(0, Kind::Float, 1.0),
        run(2, Kind::Float, 1.0),
        run(0, Kind::Float, 3.0),
        run(3, Kind::BFloat16, 1.0),
        run(0, Kind::BFloat16, 0.25),
    ];
    let result = |index: usize| dir.path().join(format!("run-{index}.safetensors"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/optim.py");
    let mut python = Command::new(python());
    python.arg(script).arg(&src).args([LR, CLIP, DECAY].map(|v| v.to_string())).env("OMP_NUM_THREADS", "1");
    for (index, Run { frozen, kind, rate }) in runs.into_iter().enumerate() {
        let kind = if kind == Kind::BFloat16 { "bfloat16" } else { "float32" };
        python.arg(result(index)).args([frozen.to_string().as_str(), kind, rate.to_string().as_str()]);
    }
    let output = python.output().unwrap();
    assert!(output.status.success(), "optim.py: {}", String::from_utf8_lossy(&output.stderr));
    for (index, run) in runs.into_iter().enumerate() {
        compare(&named, run, &Tensor::read_safetensors(result(index)).unwrap());
    }
}

/// Repeats the updates of a run and compares them with `expected`.
fn compare(named: &[(&str, Tensor)], run: Run, expected: &[(String, Tensor)]) {
    let Run { frozen, kind, rate } = run;
    let leaf = |i: usize| named[i].1.to_kind(kind).copy().set_requires_grad(true);
    let parameters = vec![("matrix".to_owned(), leaf(0)), ("vector".to_owned(), leaf(1))];
    let group = ParameterGroup { parameters: vec!["vec".into()], lr: LR * rate };
    let groups = if rate == 1.0 { Vec::new() } else { vec![group] };
    let options = Optimizer { lr: LR, clip_norm: CLIP, weight_decay: DECAY, groups, ..Default::default() };
    let mut adam = AdamW::new(&options, &parameters).unwrap();
    for step in 0..STEPS {
        adam.set_trained(|name| name != "vector" || step >= frozen);
        adam.zero_grad().unwrap();
        let weigh = |i: usize| (&parameters[i].1 * named[i + 2].1.get(step).to_kind(kind)).sum(Kind::Float);
        let loss: Tensor = (0..2).map(weigh).sum();
        loss.backward();
        let gradient = adam.collect_gradient().unwrap();
        adam.step(gradient, LR * (step + 1) as f64).unwrap();
    }
    let mut ours = adam.state().unwrap();
    ours.extend(adam.weights().unwrap());
    ours.extend(parameters.iter().map(|(n, t)| (format!("rounded.{n}"), t.detach().to_kind(Kind::Float))));
    let run = format!("{run:?}");
    for (name, want) in expected {
        let Some((_, found)) = ours.iter().find(|(n, _)| n == name) else {
            assert_eq!((name.starts_with("step."), want.double_value(&[0])), (true, STEPS as f64), "{run}: {name}");
            continue;
        };
        let far = (found - want).abs().max().double_value(&[]);
        let size = want.abs().max().double_value(&[]);
        // Weights near the midpoint of two bf16 values may be rounded either way.
        let limit = if kind == Kind::BFloat16 && name.starts_with("rounded.") { 1e-2 } else { 1e-6 };
        assert!(far <= limit * size.max(1e-3), "{run}: {name}: {far} of {size}");
    }
    let counted = ours.iter().filter(|(n, _)| n.starts_with("step.")).count();
    assert_eq!(counted, usize::from(frozen > 0), "{run}: counts that differ from the number of updates are saved");
}
