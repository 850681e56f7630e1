//! AdamW, decay, clipping and moments against `torch.optim.AdamW` over several steps.

use std::path::{Path, PathBuf};
use std::process::Command;

use tch::{Device, Kind, Tensor};
use unveil_config::schema::Optimizer;
use unveil_learner::optim::AdamW;

fn python() -> PathBuf {
    let p = std::env::var_os("UNVEIL_PYTHON")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python"), PathBuf::from);
    assert!(p.exists(), "no Python with torch at {}: run `make setup` or set UNVEIL_PYTHON", p.display());
    p
}

#[test]
fn equals_torch() {
    tch::manual_seed(4);
    let opt = (Kind::Float, Device::Cpu);
    let (lr, clip, decay, steps) = (1e-3, 0.7, 0.1, 6);
    let scale = Tensor::from_slice(&[0.01f32, 0.1, 5.0, 0.3, 1e-4, 2.0]);
    let named = [
        ("matrix", Tensor::randn([7, 5], opt)),
        ("vector", Tensor::randn([9], opt)),
        ("grad_matrix", Tensor::randn([steps, 7, 5], opt) * scale.view([-1, 1, 1])),
        ("grad_vector", Tensor::randn([steps, 9], opt) * scale.view([-1, 1])),
    ];
    let dir = tempfile::tempdir().unwrap();
    let (src, dst) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    Tensor::write_safetensors(&named, &src).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/optim.py");
    let numbers = [lr, clip, decay].map(|v: f64| v.to_string());
    let run = Command::new(python()).arg(script).args([&src, &dst]).args(numbers).env("OMP_NUM_THREADS", "1").output();
    let run = run.unwrap();
    assert!(run.status.success(), "optim.py: {}", String::from_utf8_lossy(&run.stderr));

    let leaf = |i: usize| named[i].1.copy().set_requires_grad(true);
    let parameters = vec![("matrix".to_owned(), leaf(0)), ("vector".to_owned(), leaf(1))];
    let options = Optimizer { lr, clip_norm: clip, weight_decay: decay, ..Default::default() };
    let mut adam = AdamW::new(&options, &parameters).unwrap();
    for step in 0..steps {
        adam.zero_grad().unwrap();
        let loss: Tensor = (0..2).map(|i| (&parameters[i].1 * named[i + 2].1.get(step)).sum(Kind::Float)).sum();
        loss.backward();
        let gradient = adam.take_gradient().unwrap();
        adam.step(gradient, lr * (step + 1) as f64).unwrap();
    }
    let mut ours = adam.state().unwrap();
    ours.extend(parameters.iter().map(|(n, t)| (n.clone(), t.detach())));
    let theirs = Tensor::read_safetensors(&dst).unwrap();
    assert_eq!(ours.len(), theirs.len());
    for (name, want) in theirs {
        let (_, found) = ours.iter().find(|(n, _)| *n == name).unwrap();
        let far = (found - &want).abs().max().double_value(&[]);
        let size = want.abs().max().double_value(&[]);
        assert!(far <= 1e-6 * size.max(1e-3), "{name}: {far} of {size}");
    }
}
