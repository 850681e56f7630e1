//! Complete runs as a user starts them: all processes, all files, and the commands that read them.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use unveil_testkit::{Lineage, Sandbox, Span, SpanCollector, events_of, json_lines, read_json, run_args};

fn assert_valid_metrics(metrics: &Value) {
    for key in ["accuracy", "mean_iou", "acc50", "soft_f1", "vision_lift", "n"] {
        let value = metrics[key].as_f64().unwrap_or(f64::NAN);
        assert!(value.is_finite(), "`{key}` is {} in {metrics}", metrics[key]);
    }
    for key in ["accuracy", "mean_iou", "acc50", "soft_f1"] {
        assert!((0.0..=1.0).contains(&metrics[key].as_f64().unwrap_or(-1.0)), "`{key}` in {metrics}");
    }
    assert_eq!(metrics["n"], 8, "the test split has 8 records");
}

fn tensorboard_files(dir: &Path) -> usize {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.fold(0, |sum, e| {
        let whole = e.file_name().to_string_lossy().contains("tfevents") && e.metadata().is_ok_and(|m| m.len() > 0);
        sum + if e.path().is_dir() { tensorboard_files(&e.path()) } else { usize::from(whole) }
    })
}

#[test]
fn complete_runs_end_to_end() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let run = s.path("run");
    let collector = SpanCollector::start();
    let endpoint = format!("telemetry.otlp_endpoint={}", collector.endpoint());
    let sets = ["eval.suites=[\"grounding\"]", "telemetry.log=json", &endpoint];
    let args = run_args("train", &config, &sets);
    let first = s.unveil(&args).ok();
    assert_eq!(s.processes(), [], "every role ends with the run");

    let summary = read_json(&run.join("summary.json"));
    assert_eq!(first.json().last(), Some(&summary), "standard output ends with the summary");
    assert_valid_metrics(&summary["before"]);
    assert_valid_metrics(&summary["after"]);
    assert_eq!((&summary["steps"], &summary["seed"]), (&6.into(), &3.into()));
    for key in ["wall_s", "peak_rss_mib"] {
        assert!(summary[key].as_f64().is_some_and(|v| v > 0.0), "`{key}` in {summary}");
    }
    let report = std::fs::read_to_string(run.join("report.html")).expect("report.html");
    // The report shows the settings, including the address of the collector.
    let report = report.replace(collector.endpoint(), "");
    assert!(report.contains("data:image/") && report.contains("<svg"), "the report shows images and curves");
    assert!(!report.contains("http://") && !report.contains("https://"), "the report loads nothing");

    Lineage::read(&run).assert_exactly_once(6, 2, 8);
    assert_eq!(events_of(&run, "sft").len(), 40, "updates of stage 1");
    let updates = events_of(&run, "train");
    assert!(
        updates.iter().any(|e| e["reward"]["total"].as_f64().is_some_and(|r| r > 0.0)),
        "nothing was rewarded: {updates:?}"
    );
    for e in &updates {
        let agreement = e["agreement"].as_f64().expect("agreement of rollout and learner is measured");
        assert!(agreement <= 1e-5, "{e}");
        assert_eq!(e["staleness"], 0, "{e}");
        assert!(e["grad_norm"].as_f64().is_some_and(|g| g > 0.0), "weights change: {e}");
    }
    let evaluated = events_of(&run, "eval");
    assert!(!evaluated.is_empty(), "stage 2 is evaluated");
    for e in &evaluated {
        let with = &e["grounding"];
        let without = &e["grounding"]["withheld"];
        assert_eq!(with["soft_f1"], e["soft_f1"], "{e}");
        assert!(without["soft_f1"].is_number() && with["in_box_energy"].is_number(), "{e}");
    }
    assert!(report.contains("image withheld"), "the report shows the suite");
    check_samples(&run, 6);
    let page = std::fs::read_to_string(run.join("samples.html")).expect("samples.html");
    assert_eq!(page.matches("<li data-i=").count(), 6 * 8, "all responses of the first groups of every update");
    assert!(report.contains("samples.html") && page.contains("data:image/jpeg"), "the report links to it");
    assert!(tensorboard_files(&run.join("metrics")) >= 2, "both stages write TensorBoard files");

    check_checkpoints(&s, &run.to_string_lossy());
    check_json_logs(&run);
    check_traces(&collector.spans());

    let again = s.unveil(&args).ok();
    assert!(again.waited < Duration::from_secs(20), "a finished run is not repeated: {:?}", again.waited);
    let second = read_json(&run.join("summary.json"));
    for key in ["before", "after", "steps", "seed"] {
        assert_eq!(second[key], summary[key], "`{key}` of a finished run stays");
    }
    Lineage::read(&run).assert_exactly_once(6, 2, 8);
}

/// Every log line of the roles names its role and run.
fn check_json_logs(run: &Path) {
    for (file, role) in [("rollout-0.log", "rollout"), ("reward.log", "reward")] {
        let text = std::fs::read_to_string(run.join("logs").join(file)).expect("a role's log");
        let lines = json_lines(&text);
        assert!(!lines.is_empty() && lines.len() == text.lines().count(), "{text}");
        for line in &lines {
            assert_eq!((&line["role"], &line["run"]), (&role.into(), &run.to_string_lossy().into()), "{line}");
            assert!(line["message"].is_string() && line["level"].is_string(), "{line}");
        }
    }
}

/// Each of the twelve trained groups is one trace with spans of three processes.
fn check_traces(spans: &[Span]) {
    let groups: Vec<&Span> = spans.iter().filter(|s| s.name == "group").collect();
    assert_eq!(groups.len(), 12);
    for group in groups {
        let mut names: Vec<(&str, &str)> =
            spans.iter().filter(|s| s.trace == group.trace).map(|s| (s.service.as_str(), s.name.as_str())).collect();
        names.sort_unstable();
        let learner = ["group", "lease", "take", "train"].map(|name| ("unveil-learner", name));
        let rollout = ["generate", "score", "submit"].map(|name| ("unveil-rollout", name));
        assert_eq!(names, [&learner[..], &[("unveil-reward", "rewards")], &rollout].concat(), "{}", group.trace);
    }
}

/// Checks the sampled responses of an update: boxes, the image that the policy saw, and attention.
fn check_samples(run: &Path, step: u64) {
    let path = run.join(format!("rollouts/step-{step}.jsonl"));
    let lines = json_lines(&std::fs::read_to_string(path).expect("responses are kept as samples"));
    assert_eq!(lines.len(), 8, "two groups of four");
    assert!(lines.iter().any(|l| l["predicted"] != serde_json::json!([])), "stage 1 learned the form of boxes");
    for line in &lines {
        let text = |key: &str| line[key].as_str().expect("a text").to_lowercase();
        let named = !text("category").is_empty() && text("text").contains(&text("category"));
        let rows = line["attention"]["rows"].as_array().map_or(&[][..], Vec::as_slice);
        assert_eq!(!rows.is_empty(), named, "rows of the tokens that name the class: {line}");
        for row in rows {
            let values: Vec<f64> = row.as_array().expect("a row").iter().filter_map(Value::as_f64).collect();
            let cells =
                line["attention"]["grid"][0].as_u64().zip(line["attention"]["grid"][1].as_u64()).map(|(r, c)| r * c);
            assert_eq!(Some(values.len() as u64), cells);
            assert!((values.iter().sum::<f64>() - 1.0).abs() < 1e-4);
        }
        let boxes = line["predicted"].as_array().expect("the answer's boxes").len();
        assert!(boxes <= text("text").matches('[').count(), "{line}");
        let seen = std::fs::read(run.join(line["seen"].as_str().expect("a path"))).expect("the image that was seen");
        let side = |offset: usize| u32::from_be_bytes(std::array::from_fn(|i| seen[offset + i]));
        assert_eq!(
            serde_json::json!([side(16), side(20)]),
            line["image_size"],
            "boxes are pixels of the image that was seen"
        );
    }
}

fn check_checkpoints(s: &Sandbox, run: &str) {
    let checks = s.unveil(&["checkpoint", "verify", run]).ok().json();
    assert!(!checks.is_empty() && checks.iter().all(|c| c["ok"] == true), "{checks:?}");
    s.unveil(&["checkpoint", "verify", &format!("{run}/sft")]).ok();
    let list = s.unveil(&["checkpoint", "list", run]).ok().json();
    let steps: Vec<u64> = list.iter().filter_map(|c| c["step"].as_u64()).collect();
    assert_eq!(steps, [4, 6], "the newest two are kept, and the best one is among them");
    let shown = s.unveil(&["checkpoint", "show", run, "--step", "4"]).ok().json();
    assert_eq!(shown[0]["manifest"]["step"], 4);
    let out = s.path("exported");
    let out = out.to_string_lossy();
    s.unveil(&["checkpoint", "export", run, "--out", &out]).ok();
    let inspected = s.unveil(&["model", "inspect", &out]).ok().json();
    assert!(inspected[0]["parameters"].as_u64().is_some_and(|p| (1_000_000..=6_000_000).contains(&p)), "{inspected:?}");
    s.unveil(&["model", "inspect", &format!("{run}/model")]).ok();
}

/// Only adapters are trained and sent; the run writes the merged model and the adapters, and both export commands agree with it.
#[test]
fn adapter_runs_write_merged_model_and_adapters() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let run = s.path("run");
    let sets = ["learner.lora.rank=4", "learner.kl_coef=0.05", "learner.steps=3"];
    let mut args = run_args("train", &config, &sets);
    s.unveil(&args).ok();
    Lineage::read(&run).assert_exactly_once(3, 2, 8);
    let updates = events_of(&run, "train");
    for e in &updates {
        assert!(e["agreement"].as_f64().is_some_and(|a| a <= 1e-5), "{e}");
        assert!(e["grad_norm"].as_f64().is_some_and(|g| g > 0.0), "{e}");
    }
    let place = |name: &str| run.join(name).to_string_lossy().into_owned();
    let out = s.path("exported").to_string_lossy().into_owned();
    let best = read_json(&run.join("adapter/adapter_config.json"));
    assert_eq!((&best["r"], &best["peft_type"]), (&4.into(), &"LORA".into()));
    s.unveil(&["model", "export", &place("stage1"), "--adapter", &place("adapter"), "--out", &out]).ok();
    let weights = |dir: &str| std::fs::read(Path::new(dir).join("model.safetensors")).expect("weights");
    assert!(weights(&out) == weights(&place("model")) && weights(&out) != weights(&place("stage1")));
    s.unveil(&["model", "inspect", &place("model")]).ok();
    let saved = s.path("saved").to_string_lossy().into_owned();
    s.unveil(&["checkpoint", "export", &place(""), "--out", &saved]).ok();
    let mut names: Vec<_> =
        std::fs::read_dir(&saved).expect("folder").map(|e| e.expect("entry").file_name().into_string()).collect();
    names.sort();
    assert_eq!(names, [Ok("adapter_config.json".to_owned()), Ok("adapter_model.safetensors".to_owned())]);
    let wrong = s.unveil(&["model", "export", &place("stage1"), "--adapter", &place("stage1"), "--out", &out]).exits(1);
    assert!(wrong.stderr.contains("adapter_config.json"), "{}", wrong.stderr);
    let other = format!("run.dir={}", s.path("other").display());
    args.extend(["--set", "learner.lora.targets=[\"q_porj\"]", "--set", "sft.steps=0", "--set", &other]);
    let wrong = s.unveil(&args).exits(1);
    assert!(wrong.stderr.contains("`q_porj`") && wrong.stderr.contains("`q_proj`"), "{}", wrong.stderr);
}

#[test]
fn ppo_trains_a_value_head() {
    let s = Sandbox::new();
    let run = s.path("run");
    let sets = [
        "learner.algorithm=ppo",
        "learner.steps=2",
        "learner.inner_epochs=2",
        "learner.minibatches=2",
        "data.augment.crop_min=0.6",
    ];
    s.run_micro("train", &sets).ok();
    Lineage::read(&run).assert_exactly_once(2, 2, 8);
    check_samples(&run, 2);
    for e in events_of(&run, "train") {
        let loss = e["loss"].as_object().expect("parts of the loss");
        let value = loss.iter().find(|(k, _)| k.contains("value")).and_then(|(_, v)| v.as_f64());
        assert!(value.is_some_and(|v| v.is_finite() && v > 0.0), "the value head has a loss: {e}");
    }
    let shown = s.unveil(&["checkpoint", "show", &run.to_string_lossy()]).ok().json();
    let tensors = shown[0]["manifest"]["tensors"].as_array().expect("tensors");
    assert!(tensors.iter().any(|t| t["name"] == "value_head.weight"), "the value head is in the checkpoint");
    assert_valid_metrics(&read_json(&run.join("summary.json"))["after"]);
}

/// `unveil learner replay` repeats the update of a dumped batch.
#[test]
fn dumped_batches_replay_to_the_same_weights() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let run = s.path("run");
    let dumps = s.path("dumps");
    let out = s.path("out");
    let one = ["--config", &config, "--set", "learner.steps=1"];
    s.unveil(&[&["train"], &one[..], &["--dump-batch", &dumps.to_string_lossy()]].concat()).ok();
    let batch = dumps.join("step-1");
    let model = run.join("stage1");
    let batch = batch.to_string_lossy();
    let to = out.to_string_lossy();
    let args = ["--model", &model.to_string_lossy(), "--batch", &batch, "--out", &to];
    let replayed = s.unveil(&[&["learner", "replay"], &one[..], &args].concat()).ok().json();
    let event = &events_of(&run, "train")[0];
    let replay = read_json(&out.join("replay.json"));
    assert_eq!(replayed.last(), Some(&replay));
    let near = |a: &Value, b: &Value| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() <= 1e-6;
    assert!(
        near(&replay["loss"], &event["loss"]["loss"]) && near(&replay["grad_norm"], &event["grad_norm"]),
        "{replay} {event}"
    );
    let code = "import sys,glob,torch\nfrom safetensors.torch import load_file\n\
        a,b=({k:v for f in glob.glob(d+'/*.safetensors') for k,v in load_file(f).items()} for d in sys.argv[1:3])\n\
        assert set(a)==set(b) and len(a)>20\n\
        print(max((a[k].double()-b[k].double()).abs().max().item() for k in a))";
    let made = out.join("model");
    let expected = run.join("model");
    let gap = s.python(code, &[&made.to_string_lossy(), &expected.to_string_lossy()]).ok().stdout;
    assert!(gap.trim().parse::<f64>().unwrap() < 1e-6, "weights differ by {gap}");

    let missing = s.unveil(&["learner", "replay", "--model", &made.to_string_lossy(), "--batch", "none", "--out", &to]);
    missing.fails_with(1, &["none/batch.json"]);
}
