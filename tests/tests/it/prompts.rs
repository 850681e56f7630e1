//! Prompts, bounds of the resize and composed configuration files, through the built programs.

use serde_json::{Value, json};
use unveil_testkit::{Finished, Sandbox, json_lines};

fn with_sets(s: &Sandbox, command: &[&str], sets: &[&str]) -> Finished {
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    s.unveil(&[command, &sets].concat())
}

fn logprobs(lines: &[Value]) -> Vec<f64> {
    lines
        .iter()
        .flat_map(|l| l["logprobs"].as_array().expect("a list"))
        .map(|v| v.as_f64().expect("a number"))
        .collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn generate_and_score_build_the_same_prompts() {
    let s = Sandbox::new();
    let data = s.synth("data", 3, 2);
    let model = s.tiny_model("model", 1).to_string_lossy().into_owned();
    let records = json_lines(&std::fs::read_to_string(&data).expect("records"));
    let data = data.to_string_lossy().into_owned();
    let sets = [
        "prompt.system=You read images.",
        "prompt.template={{ question }} ({{ id }})",
        r#"prompt.suffix="\nAnswer in JSON.""#,
        "model.min_pixels=4096",
        "model.max_pixels=4096",
    ];
    let generate = ["generate", "--model", &model, "--data", &data, "--n", "2", "--max-new-tokens", "8", "--seed", "5"];
    let made = with_sets(&s, &generate, &sets).ok().json();
    assert_eq!(made.len(), 6);
    let responses: Vec<String> = made
        .iter()
        .map(|line| {
            let record = records.iter().find(|r| r["id"] == line["id"]).expect("its record");
            let mut response = record.clone();
            response["index"] = line["index"].clone();
            response["tokens"] = line["tokens"].clone();
            response.to_string()
        })
        .collect();
    let file = s.write("data/responses.jsonl", responses.join("\n")).to_string_lossy().into_owned();
    let score = ["score", "--model", &model, "--data", &file];
    let expected = logprobs(&made);
    let scored = logprobs(&with_sets(&s, &score, &sets).ok().json());
    let difference = largest_difference(&expected, &scored);
    assert!(difference <= 1e-5, "the log-probabilities differ by {difference}");
    // Each setting is part of the prompt.
    for left_out in [&sets[..1], &sets[1..2], &sets[2..3], &sets[3..]] {
        let others: Vec<&str> = sets.iter().copied().filter(|set| !left_out.contains(set)).collect();
        let scored = logprobs(&with_sets(&s, &score, &others).ok().json());
        assert!(largest_difference(&expected, &scored) > 1e-5, "{left_out:?} has no effect");
    }
    let lines: Vec<Value> = with_sets(&s, &["eval", "--model", &model, "--data", &data], &sets).ok().json();
    assert_eq!(lines[0]["n"], json!(3));
}

#[test]
fn unusable_prompts_and_bounds_are_reported() {
    let s = Sandbox::new();
    let data = s.synth("data", 2, 2).to_string_lossy().into_owned();
    let model = s.tiny_model("model", 1).to_string_lossy().into_owned();
    let generate = ["generate", "--model", &model, "--data", &data, "--n", "1", "--max-new-tokens", "2"];
    let e = with_sets(&s, &generate, &["prompt.template={{ organ }}"]).exits(1).stderr;
    assert!(e.contains("`organ`") && e.contains("prompt.template") && e.contains("record"), "{e}");
    let check = ["data", "check", &data, "--model", &model];
    let e = with_sets(&s, &check, &["prompt.template={{ organ }}"]).exits(1);
    assert!(format!("{}{}", e.stdout, e.stderr).contains("`organ`"), "{} {}", e.stdout, e.stderr);
    let e = with_sets(&s, &generate, &["model.max_pixels=4096"]).exits(1).stderr;
    assert!(e.contains("model.max_pixels (4096)") && e.contains("model.min_pixels"), "{e}");
    let dir = format!("model.dir={model}");
    for (set, word) in [
        ("prompt.template={{ answer }}", "`answer`"),
        ("prompt.template=<image> {{ question }}", "`<image>`"),
        ("prompt.template={{ question", "prompt.template"),
        ("model.max_pixels=4096", "below the minimum of the model directory"),
        ("model.max_pixels=3", "one image token"),
        ("answer.form=xml", "use native, json or auto"),
        ("answer.reasoning=maybe", "use none, optional or required"),
    ] {
        let e = with_sets(&s, &["config", "check"], &[set, &dir]).exits(2).stderr;
        assert!(e.contains(word) && e.contains("--set"), "{set}: {e}");
    }
    let both = ["model.min_pixels=9", "model.max_pixels=8"];
    let e = with_sets(&s, &["config", "check"], &both).exits(2).stderr;
    assert!(e.contains("model.min_pixels (9) is above model.max_pixels (8)"), "{e}");
}

#[test]
fn configuration_files_compose() {
    let s = Sandbox::new();
    std::fs::create_dir(s.path("common")).expect("a folder");
    s.write("common/full.toml", "[run]\nseed = 1\n[rollout]\nn = 4\n");
    s.write("run.toml", "base = [\"common/full.toml\"]\n[run]\nseed = 2\n");
    s.write("over.toml", "[rollout]\nn = 6\n");
    let show = |args: &[&str]| s.unveil(&[&["config", "show"], args].concat()).ok().stdout;
    let alone = show(&["--config", "run.toml"]);
    assert!(alone.contains("\nseed = 2\n") && alone.contains("\nn = 4\n"), "{alone}");
    let both = show(&["--config", "run.toml", "--config", "over.toml"]);
    assert!(both.contains("\nseed = 2\n") && both.contains("\nn = 6\n"), "{both}");

    let explained = show(&["--config", "run.toml", "--config", "over.toml", "--explain"]);
    for line in ["# Seed of all random numbers of the run.", "run.toml:3", "over.toml:2", "[prompt]"] {
        assert!(explained.contains(line), "{line}: {explained}");
    }
    s.write("explained.toml", &explained);
    assert_eq!(show(&["--config", "explained.toml"]), both, "the explained configuration loads again");

    let ok = s.unveil(&["config", "check", "--config", "run.toml", "--config", "over.toml"]).ok().stderr;
    assert!(ok.contains("run.toml + over.toml"), "{ok}");
    s.write("common/full.toml", "base = [\"../run.toml\"]\n");
    s.unveil(&["config", "check", "--config", "run.toml"]).fails_with(2, &["common/full.toml:1", "leads back"]);
    s.write("run.toml", "base = [\"gone.toml\"]\n");
    s.unveil(&["config", "check", "--config", "run.toml"]).fails_with(2, &["gone.toml", "run.toml:1", "No such file"]);
    s.write("run.toml", "base = [\"over.toml\"]\n");
    s.write("over.toml", "[rollout]\nm = 6\n");
    s.unveil(&["config", "check", "--config", "run.toml"]).fails_with(2, &["`rollout.m` in over.toml:2"]);
}

/// Stage 1 teaches the configured form within its span, learner and worker build the same prompts, and the prompt cannot change on resume.
#[test]
fn runs_keep_their_prompt() {
    let s = Sandbox::new();
    let sets = [
        "sft.steps=4",
        "learner.steps=2",
        "rollout.max_new_tokens=16",
        "prompt.system=You read images.",
        "prompt.template={{ question }} This is {{ id }}.",
        "answer.form=json",
        "answer.span=answer",
    ];
    s.run_micro("train", &sets).ok();
    let other: Vec<&str> = sets
        .iter()
        .map(|set| match *set {
            "prompt.system=You read images." => "prompt.system=You are brief.",
            "learner.steps=2" => "learner.steps=4",
            set => set,
        })
        .collect();
    s.run_micro("learner", &other).fails_with(1, &["another configuration", "prompt.system = \"You are brief.\""]);
}
