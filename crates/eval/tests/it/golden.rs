//! Comparison of the suites with torchvision, scipy and numpy (golden.py) on random response files.
//!
//! Metrics agree within 1e-9, intervals within 1e-6 if both sides use the same resamples. scipy's resamples differ, so its intervals are
//! compared within 0.3 standard errors: the uncertainty of each end with 4,000 resamples is about 0.06 standard errors.

use std::path::{Path, PathBuf};
use std::process::Command;

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use unveil_config::Config;
use unveil_config::schema::Suite;
use unveil_core::BoxForm;
use unveil_eval::{Bootstrap, Evaluation, evaluate_responses, measure_suite};

const RECORDS: usize = 60;
const SOURCES: [&str; 4] = ["chest", "gut", "kidney", "skull"];

const FORMS: [BoxForm; 3] = [BoxForm::Absolute, BoxForm::PerMille, BoxForm::Llava];

/// Runs golden.py on response files in [`FORMS`], in one process, because its imports take longer than the computation.
fn python(given: &Path, files: &[PathBuf]) -> Vec<Value> {
    let mut command = Command::new(unveil_testkit::python());
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden.py")).arg(given);
    for (form, file) in FORMS.iter().zip(files) {
        command.arg(form.name()).arg(file);
    }
    let out = command.env("OMP_NUM_THREADS", "1").output().unwrap();
    assert!(out.status.success(), "golden.py failed: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Returns a random box with corners on quarters of a pixel, which are exact in f32.
fn random_box(random: &mut ChaCha8Rng, size: [u32; 2]) -> [f64; 4] {
    let mut side = |most: u32| {
        let most = most * 4;
        let a = random.random_range(0..most - 8);
        (f64::from(a) / 4.0, f64::from(random.random_range(a + 4..=most)) / 4.0)
    };
    let (x1, x2) = side(size[0]);
    let (y1, y2) = side(size[1]);
    [x1, y1, x2, y2]
}

fn box_text(b: [f64; 4], size: [u32; 2], resized: [u32; 2], form: BoxForm) -> String {
    let part = |v: f64, side: usize| {
        let share = v / f64::from(size[side]);
        match form {
            BoxForm::Absolute => format!("{}", (share * f64::from(resized[side])).round()),
            BoxForm::PerMille => format!("{}", (share * 1000.0).round()),
            _ => format!("{share:.3}"),
        }
    };
    format!("[{},{},{},{}]", part(b[0], 0), part(b[1], 1), part(b[2], 0), part(b[3], 1))
}

/// Returns a random answer, usually close to the truth.
fn random_answer(
    random: &mut ChaCha8Rng,
    truth: &[[f64; 4]],
    size: [u32; 2],
    resized: [u32; 2],
    form: BoxForm,
) -> String {
    let wrong =
        ["", "what?", "[1,2,3] nodule", "[1,2,3,4", "seen [1,2,3,4] nodule", "[0,0,9999,9999] nodule", "No finding"];
    if random.random_bool(0.15) {
        return (*wrong.choose(random).unwrap()).to_owned();
    }
    if truth.is_empty() && random.random_bool(0.7) {
        return "no finding".to_owned();
    }
    let mut boxes = Vec::new();
    for t in truth {
        if random.random_bool(0.85) {
            let mut b = *t;
            b.iter_mut().for_each(|v| *v = (*v + random.random_range(-8.0..8.0)).max(0.0));
            boxes.push(box_text(b, size, resized, form));
        }
    }
    while boxes.is_empty() || random.random_bool(0.2) {
        boxes.push(box_text(random_box(random, size), size, resized, form));
    }
    let category = ["nodule", "Nodule", "pulmonary Nodule", "mass", "höhle nodule", ""].choose(random).unwrap();
    format!("{} {category}", boxes.join(", ")).trim_end().to_owned()
}

/// Splits a text at random character boundaries and returns the byte ranges.
fn random_spans(random: &mut ChaCha8Rng, text: &str) -> Vec<[usize; 2]> {
    let mut cuts: Vec<usize> = text.char_indices().map(|(i, _)| i).filter(|_| random.random_bool(0.4)).collect();
    cuts.extend([0, text.len()]);
    cuts.sort_unstable();
    cuts.dedup();
    cuts.windows(2).map(|w| [w[0], w[1]]).collect()
}

fn attention(random: &mut ChaCha8Rng, tokens: usize) -> Value {
    let grid = [random.random_range(1..12), random.random_range(1..12)];
    let rows: Vec<Vec<f32>> = (0..tokens)
        .map(|_| {
            let raw: Vec<f32> = (0..grid[0] * grid[1]).map(|_| random.random_range(0.0f32..1.0).powi(6)).collect();
            let total: f32 = raw.iter().sum();
            raw.iter().map(|v| v / total).collect()
        })
        .collect();
    json!({"grid": grid, "tokens": (0..tokens).collect::<Vec<_>>(), "rows": rows})
}

fn lines(random: &mut ChaCha8Rng, form: BoxForm) -> String {
    let mut out = String::new();
    for i in 0..RECORDS {
        let size = [random.random_range(40..300), random.random_range(40..300)];
        let resized = [random.random_range(2..20) * 28, random.random_range(2..20) * 28];
        let count = *[0, 1, 1, 1, 1, 2, 3, 4].choose(random).unwrap();
        let mut truth: Vec<[f64; 4]> = (0..count).map(|_| random_box(random, size)).collect();
        if random.random_bool(0.03) {
            truth = vec![[0.0, 0.0, f64::from(size[0]), f64::from(size[1])]];
        }
        let source = SOURCES.choose(random).unwrap();
        for index in 0..random.random_range(1..4) {
            let response = random_answer(random, &truth, size, resized, form);
            let mut line = json!({"id": format!("r{i}"), "index": index, "image_size": size, "resized_size": resized,
                "category": "nodule", "boxes": truth, "source": source, "response": response});
            let spans = random_spans(random, &response);
            if random.random_bool(0.9) {
                line["attention"] = attention(random, spans.len());
            }
            if random.random_bool(0.95) {
                line["spans"] = json!(spans);
            }
            out += &format!("{line}\n");
        }
    }
    out
}

/// Returns the draws for every possible number of records.
fn draws(b: &Bootstrap) -> Value {
    let draws_of = |stream: u64| -> Map<String, Value> {
        (1..=RECORDS).map(|n| (n.to_string(), json!(b.draws(stream, n).collect::<Vec<_>>()))).collect()
    };
    (0..SOURCES.len() as u64).map(|s| (s.to_string(), Value::Object(draws_of(s)))).collect::<Map<_, _>>().into()
}

#[track_caller]
fn near(name: &str, ours: &Value, theirs: &Value, tolerance: f64) {
    match (ours.as_f64(), theirs.as_f64()) {
        (Some(a), Some(b)) => assert!((a - b).abs() <= tolerance, "{name}: {a} and {b}"),
        _ => assert!(ours.is_null() && theirs.is_null(), "{name}: {ours} and {theirs}"),
    }
}

#[track_caller]
fn same_estimate(name: &str, ours: &Value, theirs: &Value) {
    near(name, &ours["value"], &theirs["value"], 1e-9);
    near(name, &ours["low"], &theirs["low"], 1e-6);
    near(name, &ours["high"], &theirs["high"], 1e-6);
    assert_eq!(ours["n"], theirs["n"], "{name}");
}

#[test]
fn suites_match_torchvision_scipy_and_numpy() {
    let seed: u64 = std::env::var("UNVEIL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let few = Bootstrap { resamples: 100, seed, ..Default::default() };
    let dir = tempfile::tempdir().unwrap();
    let given = dir.path().join("given.json");
    let names = json!({"nodule": ["nodule", "pulmonary nodule"]});
    std::fs::write(&given, json!({"draws": draws(&few), "names": names}).to_string()).unwrap();
    let files = FORMS.map(|form| dir.path().join(format!("{}.jsonl", form.name())));
    for (k, (form, file)) in FORMS.into_iter().zip(&files).enumerate() {
        let mut random = ChaCha8Rng::seed_from_u64(seed * 10 + k as u64);
        std::fs::write(file, lines(&mut random, form)).unwrap();
    }
    let results = python(&given, &files);
    assert_eq!(results.len(), FORMS.len());
    for ((form, file), theirs) in FORMS.into_iter().zip(&files).zip(&results) {
        let mut config = Config::default();
        config.model.boxes = Some(form);
        config.data.synonyms.insert("nodule".into(), vec!["pulmonary nodule".into()]);
        let answers = evaluate_responses(&config, file, "").unwrap();
        let suite = |suite, b: &Bootstrap| json!(measure_suite(suite, &answers, None, b).unwrap());
        let grounding = suite(Suite::Grounding, &few);
        let mau = suite(Suite::Mau, &few);
        let metrics = theirs["metrics"].as_object().unwrap();
        assert_eq!(metrics.len(), grounding["metrics"].as_object().unwrap().len());
        for (name, expected) in metrics {
            same_estimate(name, &grounding["metrics"][name], expected);
        }
        for name in
            ["mean_iou", "acc50", "soft_f1", "in_box_energy", "pointing_game", "invalid_boxes", "parse_failures"]
        {
            let v = theirs["metrics"][name]["value"].as_f64().unwrap();
            assert!(v > 0.02 && v < 0.98, "{name} is {v}: the comparison is trivial");
        }
        assert_eq!((&grounding["faults"], &grounding["without_rows"]), (&theirs["faults"], &theirs["without_rows"]));
        assert!(theirs["without_rows"].as_u64().unwrap() > 3);
        same_estimate("accuracy", &mau["accuracy"], &theirs["accuracy"]);
        assert_eq!(mau["sources"].as_object().unwrap().len(), SOURCES.len());
        for (name, expected) in theirs["sources"].as_object().unwrap() {
            same_estimate(name, &mau["sources"][name], expected);
        }
        let summary = json!(Evaluation::new(answers.clone()).metrics);
        for (name, expected) in theirs["summary"].as_object().unwrap() {
            near(name, &summary[name], expected, 1e-9);
        }
        let many = suite(Suite::Grounding, &Bootstrap { resamples: 4000, seed, ..Default::default() });
        for (name, expected) in theirs["scipy"].as_object().unwrap() {
            let tolerance = 0.3 * expected["se"].as_f64().unwrap();
            near(name, &many["metrics"][name]["low"], &expected["low"], tolerance);
            near(name, &many["metrics"][name]["high"], &expected["high"], tolerance);
        }
    }
}
