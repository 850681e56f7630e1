//! The `unveil data` commands: synthesis, checks, import, collection and review.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use unveil_testkit::{Sandbox, WebReply, WebServer, bccd, json_lines};

/// Reads all files below `root`, by relative path.
fn tree(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut out = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for path in std::fs::read_dir(&dir).expect("a folder").flatten().map(|e| e.path()) {
            if path.is_dir() {
                todo.push(path);
            } else {
                let name = path.strip_prefix(root).expect("under the root").to_owned();
                out.insert(name, std::fs::read(&path).expect("a file"));
            }
        }
    }
    out
}

#[test]
fn synthetic_data_depends_on_the_seed_only() {
    let s = Sandbox::new();
    for (folder, seed) in [("a", 3), ("b", 3), ("c", 4)] {
        s.synth(folder, 30, seed);
    }
    let [a, b, c] = ["a", "b", "c"].map(|f| tree(&s.path(f)));
    assert_eq!(a.len(), 31, "30 images and the records");
    assert!(a == b, "the same seed gives the same bytes");
    let [a, c] = [a, c].map(|t| t.into_values().collect::<Vec<_>>());
    assert!(a.iter().all(|file| !c.contains(file)), "another seed gives other images and records");
    s.unveil(&["data", "check", &s.path("a/records.jsonl").to_string_lossy()]).ok();
    let stats = s.unveil(&["data", "stats", &s.path("a/records.jsonl").to_string_lossy()]).ok().json();
    assert_eq!(stats[0]["records"], 30, "{}", stats[0]);
}

#[test]
fn checks_report_what_was_checked() {
    let s = Sandbox::new();
    let file = s.synth("data", 20, 1).display().to_string();
    let done = s.unveil(&["data", "check", &file]).ok();
    assert_eq!((done.stdout.as_str(), done.stderr.trim()), ("", "ok: 20 records, 20 images decoded"));
    let line =
        |id: &str, more: &str| format!(r#"{{"id":{id},"image_size":[9,9],"question":"q","split":"train"{more}}}"#);
    let odd =
        s.write("odd.jsonl", format!("\u{feff}{}\n{}", line("7", ""), line("\"a\\u001b\"", r#","patient_id":3"#)));
    let odd = odd.display().to_string();
    let done = s.unveil(&["data", "check", "--table", &odd]).ok();
    assert_eq!(done.stderr.trim(), "ok: 2 records, 0 images decoded, 1 warning");
    let want = "warning  2  a\\u{1b}  the key `patient_id` is kept, but not used: did you mean `patient`?\n";
    assert_eq!(done.stdout, want);
    // A record without a question is asked the configured one.
    let bare = s.write("bare.jsonl", r#"{"id":"a","image_size":[9,9],"split":"train"}"#).display().to_string();
    assert_eq!(s.unveil(&["data", "check", &bare]).ok().stdout, "");
    let done = s.unveil(&["data", "check", &bare, "--set", "data.question="]).ok();
    assert!(done.json()[0]["what"].as_str().is_some_and(|w| w.contains("data.question")), "{}", done.stdout);
    let bad = s.write("bad.jsonl", line("\"a\"", r#","category":"x""#)).display().to_string();
    let done = s.unveil(&["data", "check", &bad]);
    assert_eq!((&done.json()[0]["id"], &done.json()[0]["severity"]), (&"a".into(), &"error".into()), "{}", done.stdout);
    done.fails_with(1, &["bad.jsonl: 1 of 1 findings are errors"]);
    let none = s.path("none.jsonl").display().to_string();
    let done = s.unveil(&["data", "check", &none]).exits(1);
    assert_eq!(done.stderr.matches(&none).count(), 1, "{}", done.stderr);
}

#[test]
fn bccd_is_imported_completely() {
    let source = bccd();
    let s = Sandbox::new();
    let out = s.path("bccd/records.jsonl");
    std::fs::create_dir(s.path("bccd")).expect("a folder");
    let src = source.to_string_lossy();
    let file = out.to_string_lossy();
    let done = s.unveil(&["data", "import", "voc", "--src", &src, "--out", &file]).ok();
    let report = &done.json()[0];
    assert_eq!((&report["records"], &report["boxes"]), (&364.into(), &4886.into()), "{report}");
    let left: Vec<&str> = done.stderr.lines().filter(|l| l.starts_with("left out: ")).collect();
    assert_eq!(left.len(), 2, "{}", done.stderr);
    for (line, image) in left.iter().zip(["BloodImage_00338", "BloodImage_00343"]) {
        assert!(line.contains(image) && line.contains("area"), "{line}");
    }
    let records = json_lines(&std::fs::read_to_string(&out).expect("records"));
    assert_eq!(records.len(), 364);
    let boxes: usize = records.iter().filter_map(|r| r["boxes"].as_array()).map(Vec::len).sum();
    assert_eq!(boxes, 4886);
    s.unveil(&["data", "check", &file]).ok();
}

#[test]
fn coco_is_imported_and_unknown_formats_refused() {
    let s = Sandbox::new();
    let source = s.synth("source", 3, 8);
    let name = json_lines(&std::fs::read_to_string(&source).expect("records"))[0]["image"]
        .as_str()
        .expect("a path")
        .to_owned();
    let coco = json!({
        "images": [{"id": 1, "file_name": name, "width": 64, "height": 64}, {"id": 2, "file_name": "../../../../x.png"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [10, 20, 30, 40], "iscrowd": 0},
                        {"id": 2, "image_id": 1, "category_id": 4, "bbox": [0, 0, 90, 90], "iscrowd": 1}],
        "categories": [{"id": 4, "name": "cyst"}]});
    s.write("source/train.json", coco.to_string());
    let src = s.path("source").display().to_string();
    let out = s.path("coco.jsonl").display().to_string();
    let done = s.unveil(&["data", "import", "coco", "--src", &src, "--out", &out, "--modality", "CT"]).ok();
    let report = &done.json()[0];
    assert_eq!(
        (&report["records"], &report["boxes"], &report["splits"]["train"]),
        (&1.into(), &1.into(), &1.into()),
        "{report}"
    );
    assert!(done.stderr.contains("is a crowd") && done.stderr.contains("leaves the source folder"), "{}", done.stderr);
    let record = &json_lines(&std::fs::read_to_string(&out).expect("records"))[0];
    assert_eq!((&record["boxes"], &record["modality"]), (&json!([[10.0, 20.0, 40.0, 60.0]]), &json!("CT")));
    s.unveil(&["data", "check", "--near", &out]).ok();
    s.unveil(&["data", "import", "vok", "--src", &src, "--out", &out]).fails_with(2, &["vok"]);
    s.unveil(&["data", "import", "llava", "--src", &s.path("nowhere").display().to_string(), "--out", &out])
        .fails_with(1, &["nowhere"]);
}

/// Answer of a good model, in either stage.
fn answer(number: usize) -> WebReply {
    let text = format!("Something is there, number {number}.");
    let body = json!({"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1000, "completion_tokens": 100}});
    WebReply::immediate(200, body.to_string())
}

#[test]
fn answers_are_collected_and_reviewed() {
    let s = Sandbox::new();
    let data = s.synth("data", 10, 5).display().to_string();
    let out = s.path("out").display().to_string();
    let server = WebServer::start(|r| answer(r.number));
    let sets = [
        format!("collect.base_url={}/v1", server.url()),
        "collect.model=seer".to_owned(),
        "collect.price_answer=10".to_owned(),
    ];
    let collect = |more: &[&str]| {
        let mut args = vec!["data", "collect", "--data", &data, "--out", &out];
        sets.iter().map(String::as_str).chain(more.iter().copied()).for_each(|set| args.extend(["--set", set]));
        s.unveil(&args)
    };
    let unset = s.unveil(&["data", "collect", "--data", &data, "--out", &out]).exits(2);
    assert!(unset.stderr.contains("collect.base_url is empty"), "{}", unset.stderr);
    // An answer costs 0.001 and is estimated at 0.005 beforehand.
    let stopped = collect(&["collect.budget=0.0075", "collect.concurrency=1"]);
    let summary = stopped.json()[0].clone();
    assert_eq!((&summary["asked"], &summary["stopped"]["why"]), (&3.into(), &"budget".into()), "{summary}");
    stopped.fails_with(1, &["budget of 0.0075", "collect.budget"]);
    let done = collect(&[]).ok().json()[0].clone();
    let n = done["to_ask"].as_u64().expect("a count");
    assert_eq!(
        (&done["answered"], server.requests().len() as u64, done["reused"].as_u64()),
        (&n.into(), 2 * n, Some(3)),
        "{done}"
    );
    assert!(s.path("out/review-001.html").is_file());
    let records = json_lines(&std::fs::read_to_string(s.path("out/collected.jsonl")).expect("records"));
    let decision = |r: &Value| json!({"id": r["id"], "key": r["collect"]["key"], "decision": "accept"}).to_string();
    let lines: Vec<String> = records.iter().filter(|r| !r["collect"].is_null()).map(decision).collect();
    let decisions = s.write("decisions.jsonl", lines[1..].join("\n")).display().to_string();
    let last = s.path("final.jsonl").display().to_string();
    let review =
        s.unveil(&["data", "review", "--dir", &out, "--decisions", &decisions, "--out", &last]).ok().json()[0].clone();
    assert_eq!((review["accepted"].as_u64(), review["unreviewed"].as_u64()), (Some(n - 1), Some(1)), "{review}");
    s.unveil(&["data", "check", &last]).ok();
    let stats = s.unveil(&["data", "stats", &last]).ok().json()[0].clone();
    assert_eq!(stats["records"], 9, "{stats}");
    let prompts = s.unveil(&["data", "collect", "--write-prompts", &s.path("prompts").display().to_string()]).ok();
    assert!(s.path("prompts/reflection.txt").is_file(), "{}", prompts.stdout);
}
