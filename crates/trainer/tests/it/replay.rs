//! One update from a dumped batch against an independent computation in Python (`replay.py`): one padded row per
//! response, transformers' model, autograd, torch's AdamW. Importance ratios and values are perturbed.

use std::path::Path;
use std::process::Command;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use unveil_config::Config;
use unveil_config::schema::Critic;
use unveil_core::{Algorithm, Finish, Surrogate};
use unveil_model::{LoraSpec, ValueHead};
use unveil_testkit::python;
use unveil_testkit_model::{low_tokens, model, rollout, write_model};
use unveil_trainer::{Models, PolicyTrainer, Ranks, ReplayModels, StepSettings, dump, replay};

fn models(model: &Path) -> ReplayModels<'_> {
    ReplayModels { model, adapter: None, reference: None }
}

fn seed() -> u64 {
    std::env::var("UNVEIL_SEED").map_or(1, |s| s.parse().expect("UNVEIL_SEED is a number"))
}

/// Writes a dump with perturbed log-probabilities and values, one masked response, and one group of equal rewards.
fn dumped(dir: &Path, config: &Config) {
    let seed = seed();
    write_model(&dir.join("base"), seed);
    let vlm = model(seed);
    let mut groups = rollout(&vlm, 3, 4, 0, &low_tokens);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for g in &mut groups {
        for r in &mut g.responses {
            r.logprobs.iter_mut().for_each(|v| *v += rng.random_range(-0.5..0.4));
            r.versions.fill(0);
        }
    }
    groups[0].breakdowns[1].total = None;
    groups[2].breakdowns.iter_mut().for_each(|b| b.total = Some(0.5));
    if config.learner.overlong_filter {
        // One response of a group, and all responses of another one.
        groups.iter_mut().flat_map(|g| &mut g.responses).for_each(|r| r.finish = Finish::Stop);
        groups[0].responses[2].finish = Finish::Length;
        groups[2].responses.iter_mut().for_each(|r| r.finish = Finish::Length);
    }
    let settings = StepSettings::new(config, &vlm, &[]);
    let hidden = vlm.config().text.hidden_size;
    let ppo = config.learner.algorithm == Algorithm::Ppo;
    let critic = (config.learner.critic == Critic::Separate).then(|| model(seed));
    let learner = PolicyTrainer::distributed(Ranks::solo(), Models { vlm, reference: None, critic }, settings).unwrap();
    dump::write(&dir.join("dump"), config, &learner, &groups).unwrap();
    if ppo {
        tch::manual_seed(seed as i64);
        let mut head = ValueHead::new(hidden, (Kind::Float, Device::Cpu));
        let random: Vec<(String, Tensor)> = head
            .named_parameters()
            .iter()
            .map(|(n, t)| (n.clone(), Tensor::randn(t.size(), (Kind::Float, Device::Cpu)) * 0.1))
            .collect();
        head.load_state(&random).unwrap();
        head.save(&dir.join("base")).unwrap();
        edit(&dir.join("dump/batch.json"), |file| {
            for v in file.pointer_mut("/groups").unwrap().as_array_mut().unwrap().iter_mut() {
                for a in v["responses"].as_array_mut().unwrap() {
                    let n = a["tokens"].as_array().unwrap().len();
                    if a["masked"] == false {
                        a["values"] = (0..n).map(|_| rng.random_range(-0.5f32..0.5)).collect::<Vec<_>>().into();
                    }
                }
            }
        });
    }
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut file);
    std::fs::write(path, file.to_string()).unwrap();
}

fn config(algorithm: Algorithm) -> Config {
    let mut c = Config::default();
    c.run.device = "cpu".into();
    c.learner.threads = 1;
    c.learner.algorithm = algorithm;
    c.learner.entropy_coef = 0.01;
    c.learner.optimizer.lr = 1e-3;
    c.learner.optimizer.warmup = 1;
    c.learner.optimizer.weight_decay = 0.1;
    c.learner.optimizer.clip_norm = 0.5;
    c
}

/// Returns the updates to compare, by name.
fn updates() -> [(&'static str, Config); 8] {
    let mut critic = config(Algorithm::Ppo);
    critic.learner.critic = Critic::Separate;
    let mut recomputing = config(Algorithm::Ppo);
    recomputing.learner.recompute = true;
    let mut cispo = config(Algorithm::Grpo);
    cispo.learner.surrogate = Surrogate::Cispo;
    let mut overlong = config(Algorithm::Grpo);
    overlong.learner.overlong_filter = true;
    let mut adapters = config(Algorithm::Grpo);
    adapters.learner.lora.rank = 3;
    adapters.learner.lora.alpha = 5.0;
    // Adapters in both towers, with a value head.
    let mut all_adapters = config(Algorithm::Ppo);
    all_adapters.learner.lora.rank = 4;
    all_adapters.learner.lora.rslora = true;
    all_adapters.learner.recompute = true;
    all_adapters.learner.lora.targets =
        ["q_proj", "v_proj", "up_proj", "visual.*.qkv", "visual.*.down_proj", "visual.merger.*"]
            .map(str::to_owned)
            .to_vec();
    // AdamW's first step is the sign of the gradient down to its epsilon. Adapters are small tensors, and without the value loss the
    // gradients of the policy are closer to rounding noise: an epsilon above the noise of fp32 keeps single elements from dominating.
    for c in [&mut critic, &mut cispo, &mut overlong, &mut adapters, &mut all_adapters] {
        c.learner.optimizer.eps = 1e-5;
    }
    [
        ("grpo", config(Algorithm::Grpo)),
        ("grpo-cispo", cispo),
        ("grpo-overlong", overlong),
        ("ppo", config(Algorithm::Ppo)),
        ("ppo-critic", critic),
        ("ppo-recompute", recomputing),
        ("grpo-adapters", adapters),
        ("ppo-adapters", all_adapters),
    ]
}

/// Writes a dump and replays it in both dtypes.
fn replay_update(dir: &Path, config: &Config) {
    std::fs::create_dir(dir).unwrap();
    dumped(dir, config);
    let path_of = |name: &str| dir.join(name);
    let lora = &config.learner.lora;
    if lora.rank > 0 {
        let mut vlm = model(seed());
        let rank = lora.rank as i64;
        let targets = lora.targets.clone();
        vlm.init_adapters(&LoraSpec { rank, alpha: lora.alpha, rank_stabilised: lora.rslora, targets }, 0).unwrap();
        let named_adapters = vlm.adapters().unwrap().named_parameters();
        tch::manual_seed(seed() as i64);
        let noise: Vec<(String, Tensor)> =
            named_adapters.iter().map(|(n, t)| (n.clone(), t.randn_like() * 0.1)).collect();
        vlm.load_adapters(&noise).unwrap();
        vlm.adapters().unwrap().save(&path_of("adapter"), "base").unwrap();
    }
    let base = path_of("base");
    let adapter = path_of("adapter");
    let start = ReplayModels { adapter: (lora.rank > 0).then_some(adapter.as_path()), ..models(&base) };
    for (kind, out) in [(Kind::Double, "out-float64"), (Kind::Float, "out-float32")] {
        let result = replay(config, start, &path_of("dump"), &path_of(out), &[], kind).unwrap();
        assert!(result["clip_fraction"].as_f64().unwrap() > 0.05, "ratios must leave the clip range: {result}");
    }
}

/// Compares full updates, with and without recomputation, with peft's on frozen weights, too. It is one test, because importing the
/// libraries takes Python longer than all updates.
#[test]
fn updates_equal_independent_computations() {
    let root = tempfile::tempdir().unwrap();
    let updates = updates();
    for (name, config) in &updates {
        replay_update(&root.path().join(name), config);
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/replay.py");
    let dirs = updates.iter().map(|(name, _)| root.path().join(name));
    let output = Command::new(python()).arg(script).args(dirs).env("OMP_NUM_THREADS", "2").output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "seed {}: {text}", seed());
    for (name, _) in &updates {
        for dtype in ["float64", "float32"] {
            let compared = format!("{name} {dtype} change of all weights:");
            assert!(text.contains(&compared), "{name} was not compared: {text}");
        }
    }
    println!("seed {}: {text}", seed());
}

#[test]
fn invalid_dumps_are_named() {
    let config = config(Algorithm::Grpo);
    let dir = tempfile::tempdir().unwrap();
    dumped(dir.path(), &config);
    let path_of = |name: &str| dir.path().join(name);
    let text = std::fs::read(path_of("dump/batch.json")).unwrap();
    let error_after = |change: &dyn Fn(&mut Value)| {
        edit(&path_of("dump/batch.json"), change);
        let e = replay(&config, models(&path_of("base")), &path_of("dump"), &path_of("out"), &[], Kind::Float)
            .unwrap_err()
            .to_string();
        std::fs::write(path_of("dump/batch.json"), &text).unwrap();
        e
    };
    let e = error_after(&|f| f["groups"][1]["responses"][2]["logprobs"] = serde_json::json!([0.5]));
    assert!(e.contains("group 1 (record \"r1\"): response 2") && e.contains("`logprobs`"), "{e}");
    let e = error_after(&|f| f["groups"][0]["grids"] = serde_json::json!([[1, 2, 2]]));
    assert!(e.contains("`0000.pixel_values` has shape"), "{e}");
    let e = error_after(&|f| f["format"] = 9.into());
    assert!(e.contains("format 9"), "{e}");
    let e = error_after(&|f| f["groups"][1]["responses"][0]["reward"] = Value::Null);
    assert!(e.contains("`masked`"), "{e}");
    assert!(!path_of("out").exists());
    std::fs::remove_file(path_of("dump/batch.safetensors")).unwrap();
    let e = replay(&config, models(&path_of("base")), &path_of("dump"), &path_of("out"), &[], Kind::Float)
        .unwrap_err()
        .to_string();
    assert!(e.contains("batch.safetensors"), "{e}");
}

/// KL is computed to the reference model if one is given, else to the trained model.
#[test]
fn kl_is_computed_to_the_reference() {
    let mut c = config(Algorithm::Grpo);
    c.learner.kl_coef = 0.1;
    let dir = tempfile::tempdir().unwrap();
    dumped(dir.path(), &config(Algorithm::Grpo));
    let path_of = |name: &str| dir.path().join(name);
    write_model(&path_of("other"), seed() + 1);
    let kl = |reference: Option<&Path>| {
        let report = replay(
            &c,
            ReplayModels { reference, ..models(&path_of("base")) },
            &path_of("dump"),
            &path_of("out"),
            &[],
            Kind::Double,
        )
        .unwrap();
        report["kl_reference"].as_f64().unwrap()
    };
    assert!(kl(None).abs() < 1e-12);
    assert!(kl(Some(&path_of("other"))) > 1e-3);
}
