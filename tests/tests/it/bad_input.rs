//! Invalid records, models, configurations and paths: one clear error line, and nothing damaged.

use std::collections::HashMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use unveil_testkit::{Sandbox, SmallDisk, binary, committed_steps, json_lines};

const SOON: Duration = Duration::from_secs(120);

fn write_records(path: &Path, records: &[Value]) {
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    std::fs::write(path, lines.join("\n") + "\n").expect("records are written");
}

/// Arguments of `train` with a record file.
fn train_on<'a>(config: &'a str, data: &'a str) -> Vec<&'a str> {
    vec!["train", "--config", config, "--set", "data.kind=jsonl", "--set", data]
}

#[test]
fn invalid_records_are_reported() {
    let s = Sandbox::new();
    let file = s.synth("data", 20, 1);
    let good = json_lines(&std::fs::read_to_string(&file).expect("records"));
    let bad = s.path("data/bad.jsonl");
    let image = std::fs::read(s.path("data").join(good[0]["image"].as_str().expect("an image"))).expect("an image");
    s.write("data/cut.png", &image[..image.len() / 2]);
    let with = |changes: Value| {
        let mut record = good[0].clone();
        let fields = record.as_object_mut().expect("a record");
        fields.insert("id".into(), json!("odd"));
        for (key, value) in changes.as_object().expect("changes") {
            fields.insert(key.clone(), value.clone());
        }
        fields.retain(|_, v| !v.is_null());
        record
    };
    let first = good[0]["id"].as_str().expect("an id");
    let cases = [
        ("missing image", with(json!({"image": "gone.png"})), "odd", "gone.png"),
        ("corrupt image", with(json!({"image": "cut.png"})), "odd", "cut.png"),
        (
            "box outside",
            with(json!({"boxes": [[1, 1, 70, 9]], "labels": [], "category": "mass"})),
            "odd",
            "outside the image",
        ),
        (
            "box without area",
            with(json!({"boxes": [[5, 5, 5, 9]], "labels": [], "category": "mass"})),
            "odd",
            "no area",
        ),
        ("no id", with(json!({"id": null})), "", "`id`"),
        ("the same id again", with(json!({"id": first})), first, "already on line 1"),
    ];
    let config = s.micro_config();
    let shown = bad.to_string_lossy();
    let root = format!("data.root={shown}");
    let place = format!("{shown}:21");
    for (name, record, id, what) in cases {
        let mut records = good.clone();
        records.push(record);
        write_records(&bad, &records);

        let checked = s.unveil(&["data", "check", &shown]);
        let findings = checked.json();
        let errors: Vec<&Value> = findings.iter().filter(|f| f["severity"] == "error").collect();
        assert_eq!(errors.len(), 1, "{name}: {findings:?}");
        assert_eq!((errors[0]["id"].as_str(), errors[0]["file"].as_str()), (Some(id), Some(place.as_str())), "{name}");
        assert!(errors[0]["what"].as_str().is_some_and(|w| w.contains(what)), "{name}: {}", errors[0]);
        checked.fails_with(1, &["bad.jsonl"]);

        let line = s.unveil(&train_on(&config, &root)).fails_with(1, &[&place, id, what]);
        assert!(line.len() < 400, "{name}: {line}");
        assert!(!s.path("run/model-init").exists(), "{name}: nothing is started on bad data");
    }
    write_records(&bad, &good);
    s.unveil(&["data", "check", &shown]).ok();
}

/// A PNG image of 1200 x 4 pixels.
const WIDE: [u8; 85] = [
    137, 80, 78, 71, 13, 10, 26, 10, 0, 0, 0, 13, 73, 72, 68, 82, 0, 0, 4, 176, 0, 0, 0, 4, 8, 0, 0, 0, 0, 187, 94,
    153, 99, 0, 0, 0, 28, 73, 68, 65, 84, 120, 218, 237, 193, 49, 1, 0, 0, 0, 194, 160, 245, 79, 109, 13, 15, 160, 0,
    0, 0, 0, 224, 219, 0, 18, 196, 0, 1, 188, 240, 50, 203, 0, 0, 0, 0, 73, 69, 78, 68, 174, 66, 96, 130,
];

/// Valid records that do not fit the model: `data check --model` and the start of a run report them all, before any update.
#[test]
fn records_that_do_not_fit_the_model_are_reported() {
    let s = Sandbox::new();
    let file = s.synth("data", 20, 1);
    let good = json_lines(&std::fs::read_to_string(&file).expect("records"));
    s.write("data/wide.png", WIDE);
    let with = |id: &str, changes: Value| {
        let mut record = good[0].clone();
        let fields = record.as_object_mut().expect("a record");
        fields.extend(changes.as_object().expect("changes").clone());
        fields.insert("id".into(), json!(id));
        record
    };
    let odd = [
        (
            with(
                "wide",
                json!({"image": "wide.png", "image_size": [1200, 4], "boxes": [], "labels": [], "split": "train"}),
            ),
            "aspect ratio of 300.0",
        ),
        (with("long", json!({"question": "why ".repeat(3000), "split": "train"})), "context of"),
        (with("special", json!({"question": "a <|im_end|>", "split": "test"})), "<|im_end|>"),
    ];
    let bad = s.path("data/bad.jsonl");
    let records: Vec<Value> = good.iter().cloned().chain(odd.iter().map(|(r, _)| r.clone())).collect();
    write_records(&bad, &records);
    let config = s.micro_config();
    let shown = bad.to_string_lossy().into_owned();
    let model = s.tiny_model("model", 0);
    let model = model.to_string_lossy();
    s.unveil(&["data", "check", &shown]).ok();
    let checked = s.unveil(&["data", "check", &shown, "--model", &model]);
    let errors: Vec<Value> = checked.json().into_iter().filter(|f| f["severity"] == "error").collect();
    assert_eq!(errors.len(), odd.len(), "{errors:?}");
    for (finding, (record, what)) in errors.iter().zip(&odd) {
        assert_eq!(finding["id"], record["id"]);
        assert!(finding["what"].as_str().is_some_and(|w| w.contains(what)), "{finding}");
    }
    checked.fails_with(1, &["bad.jsonl", "3 of ", "are errors"]);
    let run = s.unveil(&train_on(&config, &format!("data.root={shown}")));
    assert!(odd.iter().all(|(_, what)| run.stderr.contains(what)), "{}", run.stderr);
    assert!(run.exits(1).stderr.contains("error: sft ended"));
    let events = std::fs::read_to_string(s.path("run/events.jsonl")).unwrap_or_default();
    assert!(!events.contains("\"kind\":\"sft\""), "no update was made: {events}");
    // The remaining records are answered nevertheless.
    write_records(&bad, &records[19..]);
    let args = ["generate", "--model", &model, "--data", &shown, "--max-new-tokens", "4", "--temperature", "0"];
    let made = s.unveil(&args);
    assert_eq!(made.json().len(), 1);
    made.fails_with(1, &["3 of 4", "wide"]);
    let measured = s.unveil(&["eval", "--config", &config, "--model", &model, "--data", &shown]);
    assert_eq!(measured.json().len(), 1);
    measured.fails_with(1, &["3 records could not be used"]);
}

/// Rewrites `dir/model.safetensors` with `change` applied to the shape of each tensor; `None` drops the tensor.
fn rewrite_shapes(dir: &Path, change: impl Fn(&str, Vec<usize>) -> Option<Vec<usize>>) {
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path).expect("weights");
    let old = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensors: Vec<(String, TensorView<'_>)> = old
        .tensors()
        .into_iter()
        .filter_map(|(name, t)| {
            let shape = change(&name, t.shape().to_vec())?;
            assert_eq!(t.dtype(), Dtype::F32, "{name}");
            let size = shape.iter().product::<usize>() * 4;
            let data = bytes.get(bytes.len() - size..)?;
            let same = shape == t.shape();
            let view = TensorView::new(t.dtype(), shape, if same { t.data() } else { data }).expect("a view");
            Some((name, view))
        })
        .collect();
    let none: Option<HashMap<String, String>> = None;
    std::fs::write(&path, serialize(tensors, none).expect("serialises")).expect("weights are written");
}

fn copy_model(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a model").flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
    }
}

#[test]
fn invalid_model_directories_are_reported() {
    let s = Sandbox::new();
    let good = s.tiny_model("good", 0);
    let name = "model.layers.0.mlp.down_proj.weight";
    let is = |n: &str| n.ends_with("layers.0.mlp.down_proj.weight");
    let missing = s.path("missing");
    copy_model(&good, &missing);
    rewrite_shapes(&missing, |n, shape| (!is(n)).then_some(shape));
    let misshapen = s.path("misshapen");
    copy_model(&good, &misshapen);
    rewrite_shapes(&misshapen, |n, shape| Some(if is(n) { vec![shape[0], shape[1] - 1] } else { shape }));
    let cut = s.path("cut");
    copy_model(&good, &cut);
    let weights = std::fs::read(good.join("model.safetensors")).expect("weights");
    std::fs::write(cut.join("model.safetensors"), &weights[..weights.len() - 100]).expect("weights");

    s.synth("data", 20, 1);
    let config = s.micro_config();
    let root = format!("data.root={}", s.path("data/records.jsonl").display());
    let cases: [(&PathBuf, &[&str]); 3] = [
        (&missing, &["missing", "layers.0.mlp.down_proj.weight"]),
        (&misshapen, &["layers.0.mlp.down_proj.weight", "shape"]),
        (&cut, &["model.safetensors"]),
    ];
    for (number, (dir, parts)) in cases.into_iter().enumerate() {
        let shown = dir.to_string_lossy();
        s.unveil(&["model", "inspect", &shown]).fails_with(1, parts);
        let model = format!("model.dir={shown}");
        let run = format!("run.dir={}", s.path(&format!("run{number}")).display());
        let mut args = train_on(&config, &root);
        args.extend(["--set", &model, "--set", &run]);
        let done = s.unveil(&args).exits(1);
        let line = done.stderr.lines().find(|l| l.contains("error") && parts.iter().all(|p| l.contains(p)));
        assert!(line.is_some(), "{name} is named:\n{}", done.stderr);
        assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    }
    let nowhere = s.path("nowhere").to_string_lossy().into_owned();
    let expected = format!("is `{nowhere}`: there is no such directory");
    let records = s.path("data/records.jsonl").to_string_lossy().into_owned();
    let out = s.path("out").to_string_lossy().into_owned();
    for (args, name) in [
        (&["model", "inspect", &nowhere][..], "DIR"),
        (&["model", "export", &nowhere, "--out", &out], "DIR"),
        (&["eval", "--model", &nowhere, "--data", &records], "--model"),
        (&["generate", "--model", &nowhere, "--data", &records], "--model"),
        (&["score", "--model", &nowhere, "--data", &records], "--model"),
        (&["learner", "replay", "--model", &nowhere, "--batch", &nowhere, "--out", &out], "--model"),
    ] {
        s.unveil(args).fails_with(1, &[&format!("{name} {expected}")]);
    }
    let done = s
        .unveil(&[
            "train",
            "--config",
            &config,
            "--set",
            &format!("model.dir={nowhere}"),
            "--set",
            "data.synth.train=6000",
        ])
        .exits(2);
    assert!(done.stderr.contains(&format!("model.dir {expected} (in --set)")), "{}", done.stderr);
    assert!(!s.path("run").exists(), "no data is generated first");
    assert_eq!(s.unveil(&["model", "inspect", &good.to_string_lossy()]).ok().json()[0]["dtype"], "float32");
}

/// Roles that are started separately name the command that creates their missing input.
#[test]
fn roles_without_their_input_name_the_command_to_run() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let first = ["model-init does not exist", "`unveil train --prepare`", "the same configuration"];
    s.unveil(&["sft", "--config", &config]).fails_with(1, &first);
    let later = ["stage1 does not exist", "the model of stage 1", "`unveil sft`"];
    s.unveil(&["learner", "--config", &config]).fails_with(1, &later);
    let addresses = ["--set", "learner.address=http://127.0.0.1:1", "--set", "reward.address=http://127.0.0.1:1"];
    s.unveil(&[&["rollout", "--config", &config][..], &addresses].concat()).fails_with(1, &later);
    s.tiny_model("run/model-init", 1);
    s.unveil(&["sft", "--config", &config]).fails_with(1, &["records.jsonl does not exist", "`unveil prepare`"]);
}

/// Writes a model directory whose headers claim seven billion parameters.
fn seven_billion(s: &Sandbox, folder: &str) -> String {
    let header = json!({"w": {"dtype": "BF16", "shape": [7_000_000, 1000], "data_offsets": [0, 0]}}).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.into_bytes());
    std::fs::create_dir(s.path(folder)).expect("a folder");
    s.write(&format!("{folder}/config.json"), "{}");
    s.write(&format!("{folder}/model.safetensors"), bytes);
    s.path(folder).to_string_lossy().into_owned()
}

#[test]
fn large_models_need_explicit_learning_rates() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let records = s.synth("data", 20, 1);
    let model = format!("model.dir={}", seven_billion(&s, "seven"));
    let root = format!("data.root={}", records.display());
    let with = |command: &[&str], sets: &[&str]| {
        let mut args =
            [command, &["--config", &config, "--set", &model, "--set", "data.kind=jsonl", "--set", &root]].concat();
        args.extend(sets.iter().flat_map(|set| ["--set", *set]));
        s.unveil(&args)
    };
    for command in [&["config", "check"][..], &["train"], &["submit", "slurm", "--dry-run"], &["learner"]] {
        let stderr = with(command, &["sft.steps=0"]).exits(2).stderr;
        assert!(
            stderr.contains("learner.optimizer.lr is not set") && stderr.contains("7.0 B"),
            "{command:?}: {stderr}"
        );
        let high = with(command, &["sft.steps=0", "learner.optimizer.lr=1e-3"]).exits(2).stderr;
        assert!(high.contains("allow_high_lr = true"), "{command:?}: {high}");
    }
    let stderr = with(&["sft"], &[]).exits(2).stderr;
    assert!(stderr.contains("sft.optimizer.lr is 3e-3") && stderr.contains("micro.toml:"), "{stderr}");
    let good = ["sft.optimizer.lr=1e-5", "learner.optimizer.lr=1e-6"];
    let ok = with(&["config", "check"], &good).ok();
    assert!(
        ok.stderr.starts_with("ok: ") && ok.stderr.contains("7.0 B parameters") && ok.stdout.is_empty(),
        "{}",
        ok.stderr
    );
    assert!(!s.path("run").exists(), "nothing is written");
    // Presets with the shapes of published models are checked too.
    let preset = s.unveil(&["config", "check", "--set", "model.preset=7b", "--set", "sft.steps=0"]).exits(2).stderr;
    assert!(preset.contains("learner.optimizer.lr is not set") && preset.contains("8.3 B"), "{preset}");
    let sets = ["model.preset=7b", "--set", "sft.steps=0", "--set", "learner.optimizer.lr=1e-6"];
    let scratch = s.unveil(&[&["train", "--config", &config, "--set"][..], &sets].concat()).exits(2).stderr;
    assert!(scratch.contains("model.preset is `7b`") && scratch.contains("model.dir"), "{scratch}");
}

#[test]
fn large_presets_need_confirmation() {
    let s = Sandbox::new();
    let out = s.path("seven").to_string_lossy().into_owned();
    s.unveil(&["model", "init", "--preset", "7b", "--out", &out])
        .fails_with(1, &["8.3 B parameters", "16.6 GB", "--yes", "152064"]);
    assert!(!s.path("seven").exists(), "nothing is written");
}

#[test]
fn invalid_configurations_are_reported() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let with = |set: &str| s.unveil(&["train", "--config", &config, "--set", set]);
    with("learner.clip_hihg=0.3").fails_with(2, &["learner.clip_hihg", "did you mean `learner.clip_high`"]);
    with("sft.steps=many").fails_with(2, &["sft.steps", "integer"]);
    with("rollout.n=1").exits(2);
    with("learner.steps=-3").fails_with(2, &["`learner.steps` in --set is -3: use 0 or more"]);
    with("learner.frozen=vision_tower").fails_with(2, &["write it as [\"vision_tower\"]"]);
    let refused = |args: &[&str]| s.unveil(args).exits(2).stderr;
    for (set, words) in [
        ("model.dir=/no/such", &["model.dir is `/no/such`: there is no such directory"][..]),
        ("model.family=llava", &["model.family is `llava`: use qwen2_5_vl or qwen3_vl"]),
        ("model.preset=9b", &["model.preset is `9b`", "tiny, 3b, 7b"]),
        ("actor=1", &["unknown key `actor` in --set\n"]),
        ("wandb.project=a", &["unknown key `wandb` in --set\n"]),
        ("learner.lr=1", &["did you mean `learner.optimizer.lr`?"]),
    ] {
        for stderr in
            [refused(&["config", "check", "--set", set]), refused(&["train", "--config", &config, "--set", set])]
        {
            assert!(words.iter().all(|w| stderr.contains(w)), "{set}: {stderr}");
        }
    }
    let data = ["config", "check", "--set", "data.kind=jsonl", "--set", "data.root=/no/such.jsonl"];
    assert!(refused(&data).contains("data.root is `/no/such.jsonl`: there is no such file"));
    s.unveil(&[&data[..], &["--offline"]].concat()).ok();
    let checked = s.unveil(&["config", "check", "--config", &config]).ok();
    let ok = checked.stderr;
    assert!(ok.starts_with("ok: ") && ok.contains("micro.toml") && ok.contains("qwen2_5_vl/tiny from scratch"), "{ok}");
    assert!(checked.stdout.is_empty() && ok.lines().count() == 1, "{ok}");
    let shown = s.unveil(&["config", "show"]).ok().stdout;
    assert!(shown.contains("eps = 1e-8\n") && !shown.contains("0.00000001"), "{shown}");
    let mut variable = s.command(&binary("unveil"), &["config", "check"]);
    let stderr = s.start(variable.env("UNVEIL_LEARNER_STEPS", "5")).wait(SOON).exits(2).stderr;
    assert!(stderr.contains("UNVEIL_LEARNER_STEPS") && stderr.contains("UNVEIL__LEARNER__STEPS"), "{stderr}");
    let ranks =
        ["learner.parallel.ranks=2", "--set", "learner.parallel.rank=1", "--set", "learner.parallel.rendezvous=h:1"];
    let rank = s.unveil(&[&["train", "--config", &config, "--set"][..], &ranks].concat());
    let stderr = rank.exits(2).stderr;
    assert!(stderr.contains("learner.parallel.rank is 1") && stderr.contains("`unveil learner`"), "{stderr}");
    let refused = |set: &str| with(set).exits(2).stderr;
    let stderr = refused("health.listen=127.0.0.1:9");
    assert!(stderr.contains("health.listen is `127.0.0.1:9`: every role") && stderr.contains("port 0"), "{stderr}");
    let stderr = refused("telemetry.otlp_endpoint=collector");
    assert!(stderr.contains("telemetry.otlp_endpoint is `collector`: use http://host:port"), "{stderr}");
    s.write("odd.toml", "[learner]\nstepz = 3\nlr = 1\n");
    let both = s.unveil(&["config", "check", "--config", "odd.toml"]).exits(2).stderr;
    assert!(both.contains("`learner.stepz` in odd.toml:2") && both.contains("`learner.lr` in odd.toml:3"), "{both}");
    s.write("odd.toml", "[learner]\nstepz = 3\n");
    s.unveil(&["config", "check", "--config", "odd.toml"])
        .fails_with(2, &["odd.toml", "learner.stepz", "learner.steps"]);
    s.write("odd.toml", "[learner\n");
    s.unveil(&["config", "check", "--config", "odd.toml"]).fails_with(2, &["odd.toml", "TOML"]);
    s.unveil(&["config", "check", "--config", "nowhere.toml"]).fails_with(2, &["nowhere.toml"]);
    s.unveil(&["config", "check", "--config", &config]).ok();
    s.unveil(&["trian"]).exits(2);
    assert!(!s.path("run").exists(), "nothing is written");
}

#[test]
fn ports_in_use_are_reported() {
    let s = Sandbox::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("its address").to_string();
    let listen = format!("reward.listen={address}");
    s.unveil(&["reward", "serve", "--set", &listen]).fails_with(1, &[&address, "in use"]);

    // In `train`, the role that needs the port reports it, and the others are stopped.
    let config = s.micro_config();
    let listen = format!("learner.listen={address}");
    let done = s.unveil(&["train", "--config", &config, "--set", "sft.steps=0", "--set", &listen]).exits(1);
    assert!(
        done.stderr.lines().any(|l| l.contains("error") && l.contains(&address) && l.contains("in use")),
        "{}",
        done.stderr
    );
    assert_eq!(s.processes(), []);
}

#[test]
fn impossible_run_directories_are_reported() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let file = s.write("file", "not a folder");
    let dir = format!("run.dir={}/run", file.display());
    s.unveil(&["train", "--config", &config, "--set", &dir])
        .fails_with(1, &["cannot", &format!("{}/run", file.display())]);
}

#[test]
fn full_disks_stop_the_run_and_keep_checkpoints() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let run = s.path("run");
    std::fs::create_dir(&run).expect("a folder");
    let disk = SmallDisk::mount(&s, &run, 600);
    let unveil = binary("unveil");
    let args = ["train", "--config", &config, "--set", "learner.steps=20"];
    let mut train = s.start(&mut disk.command(&s, &unveil, &args));
    train.until("a checkpoint", SOON, || (!committed_steps(&disk.path_outside("")).is_empty()).then_some(()));
    disk.fill();
    let done = train.wait(SOON).exits(1);
    let line = done.stderr.lines().find(|l| l.contains("error") && l.contains("No space left on device"));
    let line = line.unwrap_or_else(|| panic!("the full disk is named:\n{}", done.stderr));
    let written = ["checkpoints/", "log/", "events.jsonl", "rollouts/", "metrics/"];
    assert!(written.iter().any(|f| line.contains(f)), "the file is named: {line}");
    assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    let roles: Vec<_> = s.processes().into_iter().filter(|p| p.args[0].contains("unveil")).collect();
    assert_eq!(roles, [], "nothing is left behind");

    // Saved checkpoints are readable while the disk is still full.
    let shown = run.to_string_lossy();
    let verify =
        |s: &Sandbox| s.start(&mut disk.command(s, &unveil, &["checkpoint", "verify", &shown])).wait(SOON).ok().json();
    let checks = verify(&s);
    assert!(!checks.is_empty() && checks.iter().all(|c| c["ok"] == true), "{checks:?}");
    disk.free_space();
    s.start(&mut disk.command(&s, &unveil, &args)).wait(SOON).ok();
    assert!(verify(&s).iter().all(|c| c["ok"] == true));
}

/// A role whose log is on the full disk reports the error on stdout.
#[test]
fn full_disks_are_reported_without_a_log() {
    let s = Sandbox::new();
    let model = s.tiny_model("model", 1);
    let data = s.synth("data", 4, 1);
    let place = s.path("disk");
    std::fs::create_dir(&place).expect("a folder");
    let disk = SmallDisk::mount(&s, &place, 4);
    disk.fill();
    let program = binary("unveil");
    let out = place.join("answers.jsonl");
    let eval = format!(
        "exec '{}' eval --model '{}' --data '{}' --split train --table --predictions '{}' 2>>'{}'",
        program.display(),
        model.display(),
        data.display(),
        out.display(),
        place.join("log").display(),
    );
    let done = s.start(&mut disk.command(&s, Path::new("sh"), &["-c", &eval])).wait(SOON).exits(1);
    let output = done.json().remove(0);
    let error = output["error"].as_str().expect("an error");
    assert!(error.contains("answers.jsonl") && error.contains("No space left on device"), "{error}");
}
