//! `generate` and `score` on a tiny random model: shape of the lines, agreement of both, errors that name the line.

use std::path::Path;

use serde_json::{Value, json};

use crate::{GenerateOptions, OfflineModel, Result, ScoreOptions, fixture, generate_cli, score_cli};

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("model")).unwrap();
        fixture::model_dir(&dir.path().join("model"), 3);
        let mut lines = String::new();
        for k in 0..2 {
            std::fs::write(dir.path().join(format!("r{k}.png")), fixture::picture(k).to_png().unwrap()).unwrap();
            lines += &format!("{}\n", serde_json::to_string(&fixture::record(k)).unwrap());
        }
        std::fs::write(dir.path().join("d.jsonl"), lines).unwrap();
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn model(&self) -> OfflineModel {
        OfflineModel {
            dir: self.path().join("model"),
            device: "cpu".into(),
            threads: 1,
            layer: None,
            question: "What is abnormal, and where?".into(),
            boxes: None,
            synonyms: Default::default(),
        }
    }

    fn generate(&self, temperature: f64, seed: u64) -> Vec<Value> {
        let data = self.path().join("d.jsonl");
        let options = GenerateOptions { model: self.model(), data, n: 2, temperature, max_new_tokens: 8, seed };
        let mut out = Vec::new();
        generate_cli(&options, &mut out).unwrap();
        lines(&out)
    }

    fn score(&self, given: &[Value], temperature: f64) -> Result<Vec<Value>> {
        let data = self.path().join("responses.jsonl");
        let text: String = given.iter().map(|l| format!("{l}\n")).collect();
        std::fs::write(&data, text).unwrap();
        let mut out = Vec::new();
        score_cli(&ScoreOptions { model: self.model(), data, temperature }, &mut out)?;
        Ok(lines(&out))
    }
}

fn lines(out: &[u8]) -> Vec<Value> {
    std::str::from_utf8(out).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn floats(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// A record's line with more keys.
fn with(k: u32, more: Value) -> Value {
    let mut line = serde_json::to_value(fixture::record(k)).unwrap();
    line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    line
}

#[test]
fn generate_and_score_agree() {
    let place = Place::new();
    for temperature in [1.0, 0.0] {
        let made = place.generate(temperature, 5);
        let order: Vec<_> = made.iter().map(|l| (l["id"].as_str().unwrap(), l["index"].as_u64().unwrap())).collect();
        assert_eq!(order, [("r0", 0), ("r0", 1), ("r1", 0), ("r1", 1)]);
        for l in &made {
            let keys: Vec<&String> = l.as_object().unwrap().keys().collect();
            assert_eq!(keys, ["id", "index", "tokens", "text", "logprobs", "boxes", "finish", "vision_relevance"]);
            assert!(l["boxes"].is_array() && ["stop", "length"].contains(&l["finish"].as_str().unwrap()));
            // A random model hardly names the class: no mention is 0.
            assert!(l["vision_relevance"].is_number(), "{l}");
        }
        let given: Vec<Value> = made
            .iter()
            .map(|l| {
                with(
                    l["id"].as_str().unwrap()[1..].parse().unwrap(),
                    json!({"tokens": l["tokens"], "index": l["index"]}),
                )
            })
            .collect();
        let scored = place.score(&given, temperature).unwrap();
        assert_eq!(scored.len(), 4);
        for (m, s) in made.iter().zip(&scored) {
            assert_eq!((&m["id"], &m["index"], &m["tokens"]), (&s["id"], &s["index"], &s["tokens"]));
            for (a, b) in floats(&m["logprobs"]).iter().zip(floats(&s["logprobs"])) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }
    assert_eq!(place.generate(1.0, 5), place.generate(1.0, 5));
    assert_ne!(place.generate(1.0, 5), place.generate(1.0, 6));
}

#[test]
fn a_response_text_is_encoded_and_its_mention_is_looked_at() {
    let place = Place::new();
    let given = [
        with(0, json!({"response": "[20,30,50,60] nodule"})),
        with(0, json!({"response": "no finding"})),
        with(1, json!({"response": "[20,30,50,60] Nodule", "boxes": []})),
    ];
    let scored = place.score(&given, 1.0).unwrap();
    assert_eq!((&scored[0]["index"], &scored[1]["index"], &scored[2]["index"]), (&json!(0), &json!(1), &json!(0)));
    for s in &scored {
        assert_eq!(s["tokens"].as_array().unwrap().len(), floats(&s["logprobs"]).len());
    }
    let value = scored[0]["vision_relevance"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&value));
    assert_eq!(scored[1]["vision_relevance"], json!(0.0));
    assert_eq!(scored[2]["vision_relevance"], Value::Null, "no true box: not defined");
}

#[test]
fn bad_lines_are_named() {
    let place = Place::new();
    for (line, what) in [
        (with(0, json!({})), "neither `response`"),
        (with(0, json!({"tokens": "x"})), "`tokens`"),
        (with(0, json!({"tokens": [1], "index": -1})), "`index`"),
        (with(0, json!({"tokens": [1], "image": "../x.png"})), "leaves the folder"),
        (json!({"image": "r0.png", "tokens": [1]}), "not a record"),
    ] {
        let text = place.score(&[with(0, json!({"response": "x"})), line], 1.0).unwrap_err().to_string();
        assert!(text.contains("responses.jsonl:2:") && text.contains(what), "{text}");
    }
    let text = place.score(&[with(0, json!({"tokens": [1], "image": "gone.png"}))], 1.0).unwrap_err().to_string();
    assert!(text.contains("gone.png") && text.contains("r0"), "{text}");
    let text = place.score(&[with(0, json!({"tokens": [999_999]}))], 1.0).unwrap_err().to_string();
    assert!(text.contains("999999") && text.contains("r0"), "{text}");
}
