//! `generate` and `score` on a tiny random model: shape of the lines, agreement of both, errors that name the line.

use std::path::Path;

use serde_json::{Value, json};
use unveil_core::{BBox, Grid, Sampling};
use unveil_model::VlmConfig;
use unveil_reward::calibrate::{HeadSample, calibrate};

use crate::{GenerateOptions, OfflineModel, Result, ScoreOptions, fixture, generate_cli, open_engine, score_cli};

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
        let mut config = unveil_config::Config::default();
        (config.run.device, config.run.threads) = ("cpu".into(), 1);
        OfflineModel { dir: self.path().join("model"), config }
    }

    fn generate(&self, temperature: f64, seed: u64) -> Vec<Value> {
        let data = self.path().join("d.jsonl");
        let sampling = Sampling { n: 2, temperature, max_new_tokens: 8, seed, ..Default::default() };
        let options = GenerateOptions { model: self.model(), data, sampling, stop: Vec::new() };
        let mut out = Vec::new();
        generate_cli(&options, &mut out).unwrap();
        lines(&out)
    }

    fn score(&self, given: &[Value], temperature: f64) -> Result<Vec<Value>> {
        self.score_with(given, |o| o.temperature = temperature)
    }

    fn score_with(&self, given: &[Value], change: impl FnOnce(&mut ScoreOptions)) -> Result<Vec<Value>> {
        let data = self.path().join("responses.jsonl");
        let text: String = given.iter().map(|l| format!("{l}\n")).collect();
        std::fs::write(&data, text).unwrap();
        let mut options = ScoreOptions { model: self.model(), data, temperature: 1.0, answers: false, heads: None };
        change(&mut options);
        let mut out = Vec::new();
        score_cli(&options, &mut out)?;
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
        (json!({"image": "r0.png", "tokens": [1]}), "missing field `id`"),
    ] {
        let text = place.score(&[with(0, json!({"response": "x"})), line], 1.0).unwrap_err().to_string();
        assert!(text.contains("responses.jsonl:2:") && text.contains(what), "{text}");
    }
    let text = place.score(&[with(0, json!({"tokens": [1], "image": "gone.png"}))], 1.0).unwrap_err().to_string();
    assert!(text.contains("gone.png") && text.contains("r0"), "{text}");
    let text = place.score(&[with(0, json!({"tokens": [999_999]}))], 1.0).unwrap_err().to_string();
    assert!(text.contains("999999") && text.contains("r0"), "{text}");
}

/// What cannot be used is left out and named; the others are answered and scored.
#[test]
fn one_odd_record_stops_nothing() {
    let place = Place::new();
    std::fs::write(place.path().join("wide.png"), unveil_data::store::Image::new(1200, 4).to_png().unwrap()).unwrap();
    let named = |id: &str, more: Value| {
        let mut line = with(0, more);
        line["id"] = id.into();
        line
    };
    let odd = [
        named("wide", json!({"image": "wide.png"})),
        named("long", json!({"question": "why ".repeat(3000)})),
        named("special", json!({"question": "a <|im_end|>"})),
        named("gone", json!({"image": "gone.png"})),
        named("remote", json!({"image": "s3://b/k.png"})),
        json!({"image": "r0.png"}),
    ];
    let good = [with(0, json!({})), with(1, json!({}))];
    let text = |lines: &[&Value]| lines.iter().map(|l| format!("{l}\n")).collect::<String>();
    let mixed: Vec<&Value> = odd[..3].iter().chain(&good[..1]).chain(&odd[3..]).chain(&good[1..]).collect();
    let run = |lines: &[&Value]| {
        let data = place.path().join("mixed.jsonl");
        std::fs::write(&data, text(lines)).unwrap();
        let sampling = Sampling { n: 1, temperature: 0.0, max_new_tokens: 8, seed: 1, ..Default::default() };
        let options = GenerateOptions { model: place.model(), data, sampling, stop: Vec::new() };
        let mut out = Vec::new();
        let ended = generate_cli(&options, &mut out);
        (String::from_utf8(out).unwrap(), ended)
    };
    let (alone, ended) = run(&good.iter().collect::<Vec<_>>());
    ended.unwrap();
    let (printed, ended) = run(&mixed);
    assert_eq!(printed, alone);
    let e = ended.unwrap_err().to_string();
    assert!(e.starts_with("6 of 8 could not be used") && e.contains("mixed.jsonl:7"), "{e}");
    // The same of `score`, where a group of lines stands and falls with its record, and a response by itself.
    let response = |line: &Value, more: Value| {
        let mut line = line.clone();
        line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        line
    };
    let mut given: Vec<Value> = mixed.iter().map(|l| response(l, json!({"response": "no finding"}))).collect();
    given.insert(1, response(&odd[0], json!({"response": "a"})));
    given.push(response(&good[1], json!({"tokens": [999_999]})));
    given.push(response(&good[1], json!({"response": "nodule"})));
    let data = place.path().join("given.jsonl");
    std::fs::write(&data, text(&given.iter().collect::<Vec<_>>())).unwrap();
    let options = ScoreOptions { model: place.model(), data, temperature: 1.0, answers: false, heads: None };
    let mut out = Vec::new();
    let e = score_cli(&options, &mut out).unwrap_err().to_string();
    assert!(e.starts_with("8 of 11 could not be used"), "{e}");
    let ids: Vec<_> = lines(&out).iter().map(|l| (l["id"].clone(), l["index"].clone())).collect();
    assert_eq!(ids, [(json!("r0"), json!(0)), (json!("r1"), json!(0)), (json!("r1"), json!(2))]);
}

/// Vision relevance of a row, by hand.
fn relevance(row: &[f64], grid: Grid, b: &BBox) -> f64 {
    let m = grid.coverage(std::slice::from_ref(b), 96.0, 96.0);
    let a = m.iter().map(|m| f64::from(*m)).sum::<f64>() / m.len() as f64;
    let s: f64 = row.iter().zip(&m).map(|(p, m)| p * f64::from(*m)).sum();
    ((s - a) / (1.0 - a)).clamp(0.0, 1.0)
}

/// Mean over some heads of a sample's rows.
fn mean(sample: &HeadSample, chosen: impl Fn(&[usize; 2]) -> bool) -> Vec<f64> {
    let rows: Vec<&Vec<f32>> = sample.heads.iter().filter(|h| chosen(&[h.layer, h.head])).map(|h| &h.row).collect();
    (0..rows[0].len()).map(|j| rows.iter().map(|r| f64::from(r[j])).sum::<f64>() / rows.len() as f64).collect()
}

/// Rows of single heads are written, chosen from, and read again by `score` and by generation.
#[test]
fn heads_are_written_chosen_and_used() {
    let place = Place::new();
    let given = [
        with(0, json!({"response": "[20,30,50,60] Nodule, nodule"})),
        with(0, json!({"response": "no finding"})),
        with(0, json!({"response": "a nodule"})),
        with(1, json!({"response": "nodule", "boxes": []})),
        with(1, json!({})),
    ];
    let file = place.path().join("heads.jsonl");
    let write = |o: &mut ScoreOptions| (o.answers, o.heads) = (true, Some(file.clone()));
    let scored = place.score_with(&given, write).unwrap();
    let samples: Vec<HeadSample> =
        std::fs::read_to_string(&file).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    // The first, the third, and the training answer of the last: the others name nothing, or have nothing to look at.
    assert_eq!(samples.iter().map(|s| s.id.as_str()).collect::<Vec<_>>(), ["r0", "r0", "r1"]);
    let config = VlmConfig::load(&place.model().dir).unwrap();
    let (layers, heads) = (config.text.num_hidden_layers, config.text.num_attention_heads as usize);
    let grid = Grid { rows: samples[0].grid[0], cols: samples[0].grid[1] };
    let agree = |scored: &[Value], chosen: &dyn Fn(&[usize; 2]) -> bool| {
        for (line, sample) in [0, 2, 4].into_iter().zip(&samples) {
            let expected = relevance(&mean(sample, chosen), grid, &sample.boxes[0]);
            let found = scored[line]["vision_relevance"].as_f64().unwrap();
            assert!((found - expected).abs() < 1e-5, "{line}: {found} {expected}");
        }
    };
    for s in &samples {
        let order: Vec<[usize; 2]> = s.heads.iter().map(|h| [h.layer, h.head]).collect();
        assert_eq!(order, (0..layers * heads).map(|i| [i / heads, i % heads]).collect::<Vec<_>>());
        assert!(s.heads.iter().all(|h| (h.row.iter().sum::<f32>() - 1.0).abs() < 1e-4));
    }
    agree(&scored, &|[layer, _]| *layer == config.default_capture_layer());

    let (choice, out) = (calibrate(&file, 3).unwrap(), place.path().join("heads.toml"));
    choice.save(&out).unwrap();
    assert_eq!((choice.samples, choice.measured.len()), (3, layers * heads));
    let set = format!("reward.vision_relevance.heads_file={}", out.display());
    let loaded = unveil_config::load_from(None, std::iter::empty(), &[set]).unwrap();
    let mut chosen = place.model().config;
    chosen.reward = loaded.reward;
    let again = place.score_with(&given, |o| (o.answers, o.model.config) = (true, chosen.clone())).unwrap();
    agree(&again, &|head| choice.heads.contains(head));
    assert!([0, 2, 4].iter().any(|i| again[*i]["vision_relevance"] != scored[*i]["vision_relevance"]));

    // The worker opens its engine in the same way: it captures these heads.
    let engine = open_engine(&chosen, &place.model().dir, 1, &[]).unwrap();
    let mut named: Vec<[usize; 2]> = Vec::new();
    for (layer, list) in engine.capture().unwrap().named() {
        named.extend(list.iter().flatten().map(|head| [*layer, *head as usize]));
    }
    let mut expected = choice.heads.clone();
    expected.sort_unstable();
    assert_eq!(named, expected);
    let gone = place.score_with(&given, |o| (o.answers, o.heads) = (true, Some("/no/such/dir/h.jsonl".into())));
    assert!(gone.unwrap_err().to_string().contains("/no/such/dir/h.jsonl"));
}

/// A sink filter changes what `score` prints, as its definition says of the rows that the engine gives.
#[test]
fn sinks_are_left_out_where_they_are_configured() {
    const ANSWER: &str = "[20] nodule";
    let place = Place::new();
    let mut config = place.model().config;
    config.reward.vision_relevance.layers = vec![2];
    // Rows of every token, as the worker sends them.
    let preparer = unveil_data::prepare::Preparer::load(&place.model().dir).unwrap();
    let mut engine = open_engine(&config, &place.model().dir, 1, &[]).unwrap();
    let prepared = preparer.prepare(&fixture::picture(0), &fixture::record(0).question).unwrap();
    let (input, frame) = crate::text::group_input("r0", None, prepared);
    let tokens = preparer.tokenizer().encode(ANSWER).unwrap();
    let (text, spans) = crate::text::decode(preparer.tokenizer(), &tokens);
    let scored = engine.score(&[unveil_engine::ScoreRequest { input, responses: vec![tokens] }], 1.0).unwrap();
    let rows = frame.attention(scored[0][0].attention.as_ref()).unwrap().rows;
    let word = |i: usize| text[spans[i].0..spans[i].1].chars().any(char::is_alphanumeric);
    let (class, rest): (Vec<usize>, Vec<usize>) =
        (0..spans.len()).partition(|i| spans[*i].1 > text.find("nodule").unwrap());
    let mute: Vec<usize> = rest.into_iter().filter(|i| !word(*i)).collect();
    assert!(mute.len() >= 2, "brackets: {text} {spans:?}");
    // The lesion is the cell that the class looks at most.
    let cells = frame.grid.tokens();
    let seen = |j: usize| class.iter().map(|i| rows[*i][j]).sum::<f32>();
    let lesion = (0..cells).max_by(|a, b| seen(*a).total_cmp(&seen(*b))).unwrap();
    let (x, y) = (lesion % frame.grid.cols * 16, lesion / frame.grid.cols * 16);
    let given = [with(0, json!({"response": ANSWER, "boxes": [[x, y, x + 16, y + 16]]}))];
    let by_hand = |sink: f64| {
        let is_sink =
            |j: usize| sink > 0.0 && j != lesion && mute.iter().all(|i| f64::from(rows[*i][j]) >= sink / cells as f64);
        let kept: Vec<usize> = (0..cells).filter(|j| !is_sink(*j)).collect();
        let share = |i: &usize| f64::from(rows[*i][lesion]) / kept.iter().map(|j| f64::from(rows[*i][*j])).sum::<f64>();
        let (a, s) = (1.0 / kept.len() as f64, class.iter().map(share).sum::<f64>() / class.len() as f64);
        (cells - kept.len(), ((s - a) / (1.0 - a)).clamp(0.0, 1.0))
    };
    let score = |sink: f64| {
        let change = |o: &mut ScoreOptions| {
            o.model.config = config.clone();
            o.model.config.reward.vision_relevance.sink = sink;
        };
        place.score_with(&given, change).unwrap()[0]["vision_relevance"].as_f64().unwrap()
    };
    for sink in [0.0, 1.001, 1.01, 50.0] {
        let (found, expected) = (score(sink), by_hand(sink).1);
        assert!((found - expected).abs() < 1e-5, "{sink}: {found} {expected}");
    }
    let (none, some) = (by_hand(0.0), by_hand(1.001));
    assert!(
        some.0 > 0 && (none.1 - some.1).abs() > 1e-4,
        "cells that all tokens look at a little more: {none:?} {some:?}"
    );
    assert_eq!(by_hand(50.0), none);
}
