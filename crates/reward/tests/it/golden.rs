//! Compares scorers with torchvision, scipy, rouge-score, sacrebleu, difflib, transformers and TRL on random cases (golden.py).
//! `UNVEIL_SEED` is the seed of the cases.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use unveil_config::schema::Overlap;
use unveil_core::{BBox, BoxForm};
use unveil_preprocess::codec::Sizes;
use unveil_reward::assignment::max_assignment;
use unveil_reward::embed::{Embedder, similarity};
use unveil_reward::localization::{
    OverlapRule, PredictedBoxes, TrueBoxes, any_label, score_localization, score_localization_by_iou,
};
use unveil_reward::overlong::soft_overlong_punishment;
use unveil_reward::text::{bleu::bleu, difflib, overlap};
use unveil_reward::{GroupInput, ResponseInput, Scoring, score_group};

/// A small linear congruential generator of reproducible numbers in [0, 1).
struct Numbers(u64);

impl Numbers {
    fn new(stream: u64) -> Self {
        let seed = std::env::var("UNVEIL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7_u64);
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stream)
    }

    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() * n as f64) as usize
    }

    /// Draws boxes whose coordinates are exact in f32, so that both sides read the same numbers.
    fn boxes(&mut self, n: usize) -> Vec<[f64; 4]> {
        let mut draw = || {
            let x = self.next() * 150.0;
            let y = self.next() * 90.0;
            [x, y, x + 1.0 + self.next() * 49.0, y + 1.0 + self.next() * 29.0].map(|v| f64::from(v as f32))
        };
        (0..n).map(|_| draw()).collect()
    }

    /// Draws a text of words, numbers, punctuation and other scripts.
    fn text(&mut self) -> String {
        const PIECES: [&str; 28] = [
            "nodule",
            "lung",
            "the",
            "a",
            "An",
            "left",
            "right",
            "No finding",
            "3.5",
            "mm",
            "7-8",
            ",",
            ".",
            "!",
            "(",
            ")",
            "it's",
            "&",
            "&lt;",
            "\"",
            "-",
            "höhle",
            "ÄÖ",
            "肺",
            "1,000",
            "x.y",
            "/",
            "_",
        ];
        let n = [0, 1, 3, 8, 20, 60][self.below(6)];
        let mut out = String::new();
        for _ in 0..n {
            out.push_str(PIECES[self.below(PIECES.len())]);
            out.push_str(["", " ", " ", " ", "  ", "\n"][self.below(6)]);
        }
        out
    }
}

/// Runs golden.py; a missing interpreter is a failure, not a skip.
fn golden(request: &Value) -> Value {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden.py");
    let mut child = Command::new(unveil_testkit::python())
        .arg(script)
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let body = serde_json::to_vec(request).unwrap();
    let mut input = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || input.write_all(&body).unwrap());
    let out = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(out.status.success(), "golden.py failed");
    serde_json::from_slice(&out.stdout).unwrap()
}

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap()
}

#[test]
fn overlong_punishment_matches_trl() {
    let mut rng = Numbers::new(9);
    let mut cases: Vec<[usize; 3]> = (0..300)
        .map(|_| {
            let most = 1 + rng.below(200);
            let interval = 1 + rng.below(most);
            [rng.below(most + 3), most, interval]
        })
        .collect();
    cases.extend([[16_384, 20_480, 4096], [18_432, 20_480, 4096], [20_480, 20_480, 4096], [5, 5, 5]]);
    let theirs = golden(&json!({"what": "overlong", "cases": cases}));
    let ours = cases.iter().map(|[tokens, most, interval]| soft_overlong_punishment(*tokens, *most, *interval));
    for (i, value) in ours.enumerate() {
        let expected = number(&theirs["values"][i]);
        assert!((value - expected).abs() < 1e-12, "{:?}: {value} and {expected}", cases[i]);
    }
}

#[test]
fn overlaps_soft_f1_and_assignment_match_references() {
    let mut rng = Numbers::new(1);
    let cases: Vec<[Vec<[f64; 4]>; 2]> = (0..1500)
        .map(|_| {
            let p = 1 + rng.below(12);
            let t = 1 + rng.below(8);
            let mut predicted = rng.boxes(p);
            let truth = rng.boxes(t);
            if rng.below(4) == 0 {
                predicted[0] = truth[0];
            }
            [predicted, truth]
        })
        .collect();
    let matrices: Vec<Vec<Vec<f64>>> = (0..1500)
        .map(|_| {
            let rows = 1 + rng.below(20);
            let columns = 1 + rng.below(20);
            // Rounded to make ties common.
            (0..rows).map(|_| (0..columns).map(|_| (rng.next() * 10.0).round() / 10.0).collect()).collect()
        })
        .collect();
    let sent: Vec<Value> = cases.iter().map(|[p, t]| json!({"predicted": p, "true": t})).collect();
    let golden = golden(&json!({"what": "boxes", "cases": sent, "matrices": matrices}));
    let mut compared = 0;
    for (i, [predicted, truth]) in cases.iter().enumerate() {
        let list = |b: &[[f64; 4]]| b.iter().map(|b| BBox::from(b.map(|v| v as f32))).collect::<Vec<_>>();
        let p = list(predicted);
        let t = list(truth);
        for (a, box_a) in p.iter().enumerate() {
            for (b, box_b) in t.iter().enumerate() {
                let ours = [box_a.iou(box_b), box_a.giou(box_b), box_a.ciou(box_b)];
                for (name, ours) in ["iou", "giou", "ciou"].into_iter().zip(ours) {
                    let expected = number(&golden[name][i][a][b]);
                    assert!((ours - expected).abs() < 1e-9, "case {i} {name}: {ours} {expected}");
                    compared += 1;
                }
            }
        }
        for (at, overlap) in [Overlap::Iou, Overlap::Giou, Overlap::Ciou].into_iter().enumerate() {
            let predicted = PredictedBoxes { boxes: &p, says_no_finding: false };
            let truth = TrueBoxes { boxes: &t, image: [200, 120] };
            let ours = score_localization(predicted, truth, OverlapRule { overlap, threshold: 0.0 }, any_label);
            let expected = number(&golden["soft_f1"][i][at]);
            assert!((ours.value.unwrap() - expected).abs() < 1e-9, "case {i}: {ours:?} {expected}");
        }
        assert_eq!(score_localization_by_iou(&p, false, &t, [200, 120]).lesions.len(), t.len());
    }
    assert!(compared > 50_000);
    for (i, m) in matrices.iter().enumerate() {
        let pairs = max_assignment(m.len(), m[0].len(), |r, c| m[r][c]);
        assert_eq!(pairs.len(), m.len().min(m[0].len()));
        let ours: f64 = pairs.iter().map(|&(r, c)| m[r][c]).sum();
        let expected = number(&golden["optimum"][i]);
        assert!((ours - expected).abs() < 1e-9, "matrix {i}: {ours} {expected}");
    }
}

/// Compares the scores of JSON answers with labelled boxes with scipy's assignment, where pairs with different labels are masked.
#[test]
fn labelled_boxes_match_reference() {
    const LABELS: [&str; 4] = ["cyst", "Mass", "stone", ""];
    let mut rng = Numbers::new(4);
    let mut sent = Vec::new();
    let mut groups = Vec::new();
    for _ in 0..600 {
        let n = 1 + rng.below(9);
        let m = 1 + rng.below(7);
        let truth = rng.boxes(m);
        let mut predicted = rng.boxes(n);
        // Most boxes are on lesions, some on the same one under several labels.
        for p in &mut predicted {
            if rng.below(3) > 0 {
                *p = truth[rng.below(m)].map(|v| f64::from((v + rng.next()) as f32));
            }
        }
        let mut draw = |n: usize, choices: usize| -> Vec<&str> { (0..n).map(|_| LABELS[rng.below(choices)]).collect() };
        let said = draw(n, 4);
        let real = draw(m, 3);
        let real = if rng.below(5) == 0 { Vec::new() } else { real };
        let items: Vec<Value> = predicted.iter().zip(&said).map(|(b, l)| json!({"bbox_2d": b, "label": l})).collect();
        let record = json!({"id": "a", "image_size": [400, 400], "category": "cyst", "boxes": truth, "labels": real});
        sent.push(json!({"predicted": predicted, "true": truth, "said": said, "labels": real, "category": "cyst"}));
        groups.push(GroupInput {
            record: serde_json::from_value(record).unwrap(),
            sizes: Sizes { original: (400, 400), resized: (400, 400) },
            boxes: BoxForm::Absolute,
            responses: vec![ResponseInput { text: Value::Array(items).to_string(), ..Default::default() }],
        });
    }
    let golden = golden(&json!({"what": "labels", "cases": sent}));
    let mut s = Scoring::default();
    let mut differs = 0;
    for (at, overlap) in [Overlap::Iou, Overlap::Giou, Overlap::Ciou].into_iter().enumerate() {
        s.reward.localization.overlap = overlap;
        for (i, group) in groups.iter().enumerate() {
            let mut score = |aware| {
                s.reward.localization.label_aware = aware;
                score_group(&s, group)[0].components["localization"].value.unwrap()
            };
            let ours = score(true);
            let without = score(false);
            let expected = number(&golden["soft_f1"][i][at]);
            assert!((ours - expected).abs() < 1e-6, "case {i} {overlap:?}: {ours} {expected}\n{}", sent[i]);
            differs += usize::from((ours - without).abs() > 0.01);
        }
    }
    assert!(differs > 600, "labels made a difference {differs} times");
}

#[test]
fn text_measures_match_references() {
    let mut rng = Numbers::new(2);
    let mut pairs: Vec<[String; 2]> = (0..2500)
        .map(|_| {
            let reference = rng.text();
            // Often a changed copy of the reference, so that the texts overlap.
            let answer = match rng.below(3) {
                0 => rng.text(),
                1 => format!("{}{reference}", rng.text()),
                _ => reference.chars().filter(|_| rng.below(12) > 0).collect(),
            };
            [answer, reference]
        })
        .collect();
    pairs.push(["ab".repeat(150), "a".repeat(300)]);
    pairs.push(["abcdefghij".repeat(30), "jihgfedcba".repeat(25)]);
    let golden = golden(&json!({"what": "texts", "pairs": pairs}));
    for (i, [answer, reference]) in pairs.iter().enumerate() {
        for (name, ours) in [
            ("exact", overlap::exact(answer, reference)),
            ("f1", overlap::token_f1(answer, reference)),
            ("rouge", overlap::rouge_l(answer, reference)),
            ("bleu", bleu(answer, reference)),
            ("ratio", difflib::ratio(reference, answer)),
        ] {
            let expected = number(&golden[name][i]);
            assert!((ours - expected).abs() < 1e-6, "{name}: {ours} {expected}\n{answer:?}\n{reference:?}");
        }
    }
}

#[test]
fn sentence_embeddings_match_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Numbers::new(3);
    let mut texts: Vec<String> = (0..60).map(|_| rng.text()).collect();
    texts.extend(["".to_owned(), "left lung nodule".repeat(40), "The nodules, no finding.".to_owned()]);
    let seed = rng.below(1000);
    let golden = golden(&json!({"what": "embedding", "dir": dir.path(), "texts": texts, "seed": seed}));
    let model = Embedder::load(dir.path()).unwrap();
    let mut all = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        let ours = model.embed(text).unwrap();
        let expected: Vec<f32> = golden["vectors"][i].as_array().unwrap().iter().map(|v| number(v) as f32).collect();
        assert_eq!(ours.len(), expected.len());
        for (a, b) in ours.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-5, "{text:?}: {a} {b}");
        }
        assert!((similarity(&ours, &expected) - 1.0).abs() < 1e-5);
        all.push(ours);
    }
    assert!(similarity(&all[61], &all[62]) < 0.9999, "texts differ");
    std::fs::create_dir(dir.path().join("1_Pooling")).unwrap();
    std::fs::write(dir.path().join("1_Pooling/config.json"), r#"{"pooling_mode_cls_token": true}"#).unwrap();
    let e = Embedder::load(dir.path()).unwrap_err().to_string();
    assert!(e.contains("pooling"), "{e}");
}
