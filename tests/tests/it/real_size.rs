//! Configurations of published models at their real size, and `unveil plan`, which needs their `config.json` alone.

use std::path::PathBuf;

use serde_json::{Value, json};
use unveil_testkit::{Finished, Sandbox, workspace};

/// A published model: its overlay in `configs/large`, and its `config.json`.
struct Published {
    overlay: &'static str,
    config: Value,
}

fn published() -> [Published; 2] {
    let rope = |section: [u32; 3]| json!({"type": "mrope", "mrope_section": section});
    let qwen2_5 = json!({
        "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": false, "max_position_embeddings": 128000,
        "rope_theta": 1e6, "rope_scaling": rope([16, 24, 24]), "torch_dtype": "bfloat16",
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
    });
    let qwen3 = json!({
        "model_type": "qwen3_vl", "tie_word_embeddings": false,
        "text_config": {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 151936, "rope_theta": 5e6, "rope_scaling": {"mrope_section": [24, 20, 20], "rope_type": "default"},
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096, "patch_size": 16,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    });
    [
        Published { overlay: "qwen2_5-vl-7b.toml", config: qwen2_5 },
        Published { overlay: "qwen3-vl-8b.toml", config: qwen3 },
    ]
}

/// Writes a model directory that has nothing but `config.json`, and returns its path.
fn write_model(s: &Sandbox, name: &str, config: &Value) -> String {
    let directory = s.path(name);
    std::fs::create_dir_all(&directory).expect("a directory");
    s.write(&format!("{name}/config.json"), config.to_string());
    directory.display().to_string()
}

/// Runs a command with configuration files, a model, and further arguments.
fn with_files(s: &Sandbox, command: &[&str], files: &[PathBuf], model: &Published, more: &[&str]) -> Finished {
    let directory = write_model(s, model.overlay, &model.config);
    let files: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
    let sets = [format!("model.dir={directory}"), "data.root=records.jsonl".to_owned()];
    let mut args = command.to_vec();
    args.extend(files.iter().flat_map(|file| ["--config", file.as_str()]));
    args.extend(sets.iter().flat_map(|set| ["--set", set.as_str()]));
    args.extend(more);
    s.unveil(&args)
}

/// Runs a command with a configuration of `configs/large`, a model, and further arguments.
fn with_config(s: &Sandbox, command: &[&str], name: &str, model: &Published, more: &[&str]) -> Finished {
    let large = workspace().join("configs/large");
    with_files(s, command, &[large.join(name), large.join(model.overlay)], model, more)
}

fn role<'a>(plan: &'a Value, name: &str) -> &'a Value {
    plan["roles"].as_array().expect("roles").iter().find(|r| r["role"] == name).expect("the role")
}

/// Each configuration, and the GPUs that it is for: name, GPUs per node, nodes.
const CONFIGURATIONS: [(&str, [&str; 3]); 5] = [
    ("lora-one-gpu.toml", ["A100-80", "1", "1"]),
    ("full-eight-gpus.toml", ["H100", "8", "1"]),
    ("full-four-nodes.toml", ["H100", "8", "4"]),
    ("instruct-rl.toml", ["H100", "8", "1"]),
    ("paper-ppo.toml", ["H100", "8", "1"]),
];

#[test]
fn configurations_at_real_size_are_valid_and_fit() {
    let s = Sandbox::new();
    for model in &published() {
        for (name, [gpu, gpus, nodes]) in CONFIGURATIONS {
            with_config(&s, &["config", "check", "--offline"], name, model, &[]).ok();
            let hardware = ["--gpu", gpu, "--gpus", gpus, "--nodes", nodes];
            let plan = with_config(&s, &["plan"], name, model, &hardware).ok().json().remove(0);
            let roles = plan["roles"].as_array().expect("roles");
            assert!(roles.len() >= 2, "{name}: {plan}");
            for r in roles {
                assert_eq!(r["fits"], true, "{name} with {}: {plan:#}", model.overlay);
                let total = r["total_gib"].as_f64().expect("a number");
                // Weights in bf16 alone, or a 16th of the state.
                assert!(total > 8.0, "{name}: {r}");
                assert!(r["other_gib"].as_f64().expect("a number") <= 0.1001 * total, "{name}: {r}");
            }
            assert!(plan["step_s"].as_f64().is_some_and(|s| s > 0.5), "{name}: {plan}");
            assert_eq!(plan["advice"], json!([]), "{name}: {plan}");
        }
    }
}

/// The examples of the chart, whose learner and workers have a GPU each; workers of the last one run on further nodes.
#[test]
fn configurations_of_the_chart_are_valid_and_fit() {
    let s = Sandbox::new();
    let [qwen, _] = published();
    for (name, [gpus, nodes]) in [("one-gpu", ["2", "1"]), ("eight-gpus", ["8", "1"]), ("four-nodes", ["8", "5"])] {
        let file = workspace().join(format!("cluster/helm/unveil/values/{name}.toml"));
        with_files(&s, &["config", "check", "--offline"], std::slice::from_ref(&file), &qwen, &[]).ok();
        let hardware = ["--gpu", "H100", "--gpus", gpus, "--nodes", nodes];
        let plan = with_files(&s, &["plan"], std::slice::from_ref(&file), &qwen, &hardware).ok().json().remove(0);
        let roles = plan["roles"].as_array().expect("roles");
        assert!(roles.len() >= 2 && roles.iter().all(|r| r["fits"] == true), "{name}: {plan:#}");
    }
}

/// `configs/instruct.toml` is made for a few GPUs of 40 GB or more.
#[test]
fn instruct_configuration_fits() {
    let s = Sandbox::new();
    for model in &published() {
        let file = workspace().join("configs/instruct.toml");
        with_files(&s, &["config", "check", "--offline"], std::slice::from_ref(&file), model, &[]).ok();
        let plan = with_files(&s, &["plan"], std::slice::from_ref(&file), model, &["--gpu", "L40S", "--gpus", "2"])
            .ok()
            .json()
            .remove(0);
        assert!(plan["roles"].as_array().expect("roles").iter().all(|r| r["fits"] == true), "{plan:#}");
    }
}

/// A file in `configs/large` that no test reads would go stale.
#[test]
fn every_large_configuration_is_checked() {
    let mut files: Vec<String> = std::fs::read_dir(workspace().join("configs/large"))
        .expect("the folder")
        .map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    files.retain(|name| name != "common.toml" && published().iter().all(|p| p.overlay != name));
    files.sort();
    let mut checked = CONFIGURATIONS.map(|(name, _)| name.to_owned());
    checked.sort();
    assert_eq!(files, checked);
}

#[test]
fn plan_says_what_would_fit() {
    let s = Sandbox::new();
    let [qwen, _] = published();
    let sets =
        ["--gpu", "H100", "--gpus", "8", "--set", "learner.parallel.ranks=1", "--set", "learner.parallel.zero=0"];
    let plan = with_config(&s, &["plan"], "full-eight-gpus.toml", &qwen, &sets).ok().json().remove(0);
    let learner = role(&plan, "learner");
    // 18 bytes per parameter: weights, moments and master weights, gradients.
    assert!(learner["fits"] == false && learner["total_gib"].as_f64().is_some_and(|t| t > 139.0), "{plan:#}");
    let advice = plan["advice"].to_string();
    assert!(advice.contains("learner.lora.rank = 16") && advice.contains("which fits"), "{advice}");
    assert!(role(&plan, "sft")["fits"] == true && role(&plan, "rollout")["fits"] == true, "{plan:#}");
}

#[test]
fn unusable_plans_are_refused() {
    let s = Sandbox::new();
    let [qwen, _] = published();
    let plan = |more: &[&str]| with_config(&s, &["plan"], "full-eight-gpus.toml", &qwen, more);
    let e = plan(&["--gpu", "H300", "--gpus", "8"]);
    assert_eq!(e.code(), Some(2));
    for part in ["`H300` is not a known GPU", "A100-40", "H200", "RTX-4090"] {
        assert!(e.stderr.contains(part), "{part}: {}", e.stderr);
    }
    let e = plan(&["--gpu", "H100", "--gpus", "4"]);
    assert_eq!(e.code(), Some(2));
    for part in ["8 processes", "there are 4", "launch.share_gpus = true"] {
        assert!(e.stderr.contains(part), "{part}: {}", e.stderr);
    }
    for flags in [["--gpus", "0"], ["--nodes", "0"]] {
        assert_eq!(plan(&[&["--gpu", "H100"][..], &flags[..]].concat()).code(), Some(2), "{flags:?}");
    }
    std::fs::create_dir(s.path("empty")).expect("a directory");
    let set = format!("model.dir={}", s.path("empty").display());
    assert_ne!(plan(&["--gpu", "H100", "--set", &set]).code(), Some(0));
}

#[test]
fn train_refuses_what_does_not_fit() {
    let s = Sandbox::new();
    let [qwen, _] = published();
    let set = format!("model.dir={}", write_model(&s, "qwen", &qwen.config));
    let data = s.synth("data", 4, 1);
    let root = format!("data.root={}", data.display());
    let run = format!("run.dir={}", s.path("run").display());
    // A pass over 64 groups of 8 responses of 256 tokens, in fp32 and on CPUs, keeps terabytes.
    let sets = [
        set.as_str(),
        root.as_str(),
        run.as_str(),
        "data.kind=jsonl",
        "run.device=cpu",
        "sft.steps=0",
        "learner.optimizer.lr=1e-6",
        "learner.token_budget=4000000",
        "learner.groups=64",
        "rollout.n=8",
        "rollout.max_new_tokens=256",
    ];
    let flags: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    for command in [&["train"][..], &["train", "--dry-run"]] {
        let finished = s.unveil(&[command, &flags].concat());
        assert_eq!(finished.code(), Some(2), "{}", finished.stderr);
        for part in ["learner needs about", "launch.check_memory = false", "learner.recompute = true"] {
            assert!(finished.stderr.contains(part), "{part}: {}", finished.stderr);
        }
    }
    assert!(!s.path("run").exists(), "nothing is written");
}

#[test]
fn dry_run_prints_plan_and_placement() {
    let s = Sandbox::new();
    let run = format!("run.dir={}", s.path("run").display());
    let args = ["train", "--dry-run", "--set", "run.device=cpu", "--set", &run, "--set", "rollout.workers=2"];
    let printed = s.unveil(&args).ok().json().remove(0);
    let names: Vec<&str> =
        printed["placement"].as_array().expect("a list").iter().filter_map(|p| p["process"].as_str()).collect();
    assert_eq!(names, ["learner", "rollout-0", "rollout-1"]);
    let roles: Vec<&str> =
        printed["plan"]["roles"].as_array().expect("a list").iter().filter_map(|r| r["role"].as_str()).collect();
    assert_eq!(roles, ["sft", "learner", "rollout"]);
    assert!(!s.path("run").exists(), "nothing is started");
}
