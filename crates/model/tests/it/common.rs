//! Tiny models and Python helpers of the integration tests.

use std::path::Path;
use std::process::Command;

use tch::{Device, Kind, Tensor};
use unveil_core::{Family, SpecialTokens};
use unveil_model::{InitSpec, Vlm, init};
use unveil_testkit_model::tiny_spec;

/// Returns a tiny model with 300 tokens and the special tokens of `golden.py`.
pub(crate) fn spec(seed: u64) -> InitSpec {
    let special = SpecialTokens {
        image_pad: 3,
        video_pad: 4,
        vision_start: 5,
        vision_end: 6,
        im_start: 2,
        im_end: 1,
        end_of_text: 0,
    };
    InitSpec { vocab_size: 300, special, ..tiny_spec(Family::Qwen2_5Vl, seed) }
}

/// Creates a tiny model whose weights were just initialised.
pub(crate) fn fresh(family: Family, seed: u64) -> Vlm {
    let dir = tempfile::tempdir().expect("temporary directory");
    fresh_in(dir.path(), family, seed)
}

fn fresh_in(dir: &Path, family: Family, seed: u64) -> Vlm {
    init(&InitSpec { family: family.name().into(), ..spec(seed) }, dir).expect("init");
    Vlm::load(dir, Device::Cpu, Kind::Float).expect("load")
}

/// Creates a tiny Qwen2.5-VL in `dir`; see [`lively_of`].
pub(crate) fn lively(dir: &Path) -> Vlm {
    lively_of(Family::Qwen2_5Vl, dir)
}

/// Creates a tiny model in `dir` whose logits and attention are far from uniform.
pub(crate) fn lively_of(family: Family, dir: &Path) -> Vlm {
    tch::set_num_threads(1);
    let mut vlm = fresh_in(dir, family, 7);
    tch::manual_seed(11);
    let state: Vec<(String, Tensor)> = vlm
        .named_parameters()
        .iter()
        .map(|(name, t)| {
            let size = t.size();
            let noise = Tensor::randn(size.as_slice(), (Kind::Float, Device::Cpu));
            let fan_in = size[1..].iter().product::<i64>() as f64;
            let new = match (size.len(), name.contains("embed_tokens")) {
                (1, _) => t + noise * 0.2,
                (_, true) => noise * 0.2,
                _ => noise * (1.2 / fan_in.sqrt()),
            };
            (name.clone(), new)
        })
        .collect();
    vlm.load_state(&state).expect("fits");
    vlm
}

/// Runs a script of `tests/` and returns its standard output.
pub(crate) fn python(script: &str, args: &[&str]) -> String {
    run(script, args, None)
}

/// Runs a script with the last transformers 4, which setup installs next to the packages of the interpreter.
pub(crate) fn python4(script: &str, args: &[&str]) -> String {
    let python = unveil_testkit::python();
    let transformers4 = Path::new(&python).parent().and_then(Path::parent).expect("bin").join("transformers4");
    assert!(
        transformers4.join("transformers").is_dir(),
        "{} is missing: run .ci/setup --tests",
        transformers4.display()
    );
    run(script, args, Some(&transformers4))
}

fn run(script: &str, args: &[&str], packages: Option<&Path>) -> String {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = Command::new(unveil_testkit::python())
        .arg(here.join("tests").join(script))
        .args(args)
        .env("OMP_NUM_THREADS", "1")
        .envs(packages.map(|p| ("PYTHONPATH", p)))
        .output()
        .unwrap();
    assert!(out.status.success(), "{script} {args:?} failed:\n{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Returns the largest absolute difference.
pub(crate) fn max_diff(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}
