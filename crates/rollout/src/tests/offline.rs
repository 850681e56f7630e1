//! `generate` and `score` with a tiny random model: format of the lines, agreement of both commands, errors that name the line.

use std::path::Path;

use serde_json::{Value, json};
use unveil_core::{BBox, Grid, Sampling};
use unveil_model::VlmConfig;
use unveil_reward::calibrate::{HeadSample, calibrate};
use unveil_testkit_model::write_model_directory;

use crate::{GenerateOptions, OfflineModel, Result, ScoreOptions, fixture, generate_cli, open_engine, score_cli};

struct Sandbox {
    dir: tempfile::TempDir,
}

impl Sandbox {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_model_directory(&dir.path().join("model"), 3);
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
        config.run.device = "cpu".into();
        config.run.threads = 1;
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

/// Returns the line of a record with additional keys.
fn with(k: u32, more: Value) -> Value {
    let mut line = serde_json::to_value(fixture::record(k)).unwrap();
    line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    line
}

#[test]
fn generate_and_score_agree() {
    let sandbox = Sandbox::new();
    for temperature in [1.0, 0.0] {
        let generated = sandbox.generate(temperature, 5);
        let order: Vec<_> =
            generated.iter().map(|l| (l["id"].as_str().unwrap(), l["index"].as_u64().unwrap())).collect();
        assert_eq!(order, [("r0", 0), ("r0", 1), ("r1", 0), ("r1", 1)]);
        for l in &generated {
            let keys: Vec<&String> = l.as_object().unwrap().keys().collect();
            assert_eq!(keys, ["id", "index", "tokens", "text", "logprobs", "boxes", "finish", "vision_relevance"]);
            assert!(l["boxes"].is_array() && ["stop", "length"].contains(&l["finish"].as_str().unwrap()));
            // A random model hardly ever names the class, and no mention scores 0.
            assert!(l["vision_relevance"].is_number(), "{l}");
        }
        let given: Vec<Value> = generated
            .iter()
            .map(|l| {
                with(
                    l["id"].as_str().unwrap()[1..].parse().unwrap(),
                    json!({"tokens": l["tokens"], "index": l["index"]}),
                )
            })
            .collect();
        let scored = sandbox.score(&given, temperature).unwrap();
        assert_eq!(scored.len(), 4);
        for (m, s) in generated.iter().zip(&scored) {
            assert_eq!((&m["id"], &m["index"], &m["tokens"]), (&s["id"], &s["index"], &s["tokens"]));
            for (a, b) in floats(&m["logprobs"]).iter().zip(floats(&s["logprobs"])) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }
    assert_eq!(sandbox.generate(1.0, 5), sandbox.generate(1.0, 5));
    assert_ne!(sandbox.generate(1.0, 5), sandbox.generate(1.0, 6));
}

#[test]
fn response_texts_are_encoded_and_scored() {
    let sandbox = Sandbox::new();
    let given = [
        with(0, json!({"response": "[20,30,50,60] nodule"})),
        with(0, json!({"response": "no finding"})),
        with(1, json!({"response": "[20,30,50,60] Nodule", "boxes": []})),
    ];
    let scored = sandbox.score(&given, 1.0).unwrap();
    assert_eq!((&scored[0]["index"], &scored[1]["index"], &scored[2]["index"]), (&json!(0), &json!(1), &json!(0)));
    for s in &scored {
        assert_eq!(s["tokens"].as_array().unwrap().len(), floats(&s["logprobs"]).len());
    }
    let value = scored[0]["vision_relevance"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&value));
    assert_eq!(scored[1]["vision_relevance"], json!(0.0));
    assert_eq!(scored[2]["vision_relevance"], Value::Null, "undefined without a true box");
}

#[test]
fn invalid_lines_are_named() {
    let sandbox = Sandbox::new();
    for (line, what) in [
        (with(0, json!({})), "neither `response`"),
        (with(0, json!({"tokens": "x"})), "`tokens`"),
        (with(0, json!({"tokens": [1], "index": -1})), "`index`"),
        (with(0, json!({"tokens": [1], "image": "../x.png"})), "leaves the folder"),
        (json!({"image": "r0.png", "tokens": [1]}), "missing field `id`"),
    ] {
        let text = sandbox.score(&[with(0, json!({"response": "x"})), line], 1.0).unwrap_err().to_string();
        assert!(text.contains("responses.jsonl:2:") && text.contains(what), "{text}");
    }
    let text = sandbox.score(&[with(0, json!({"tokens": [1], "image": "gone.png"}))], 1.0).unwrap_err().to_string();
    assert!(text.contains("gone.png") && text.contains("r0"), "{text}");
    let text = sandbox.score(&[with(0, json!({"tokens": [999_999]}))], 1.0).unwrap_err().to_string();
    assert!(text.contains("999999") && text.contains("r0"), "{text}");
}

/// Unusable records are left out and named; the others are generated and scored.
#[test]
fn unusable_records_do_not_stop_the_others() {
    let sandbox = Sandbox::new();
    std::fs::write(sandbox.path().join("wide.png"), unveil_data::image_store::Image::new(1200, 4).to_png().unwrap())
        .unwrap();
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
        let data = sandbox.path().join("mixed.jsonl");
        std::fs::write(&data, text(lines)).unwrap();
        let sampling = Sampling { n: 1, temperature: 0.0, max_new_tokens: 8, seed: 1, ..Default::default() };
        let options = GenerateOptions { model: sandbox.model(), data, sampling, stop: Vec::new() };
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
    // `score` leaves out all lines of an unusable record, and single unusable responses.
    let response = |line: &Value, more: Value| {
        let mut line = line.clone();
        line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        line
    };
    let mut given: Vec<Value> = mixed.iter().map(|l| response(l, json!({"response": "no finding"}))).collect();
    given.insert(1, response(&odd[0], json!({"response": "a"})));
    given.push(response(&good[1], json!({"tokens": [999_999]})));
    given.push(response(&good[1], json!({"response": "nodule"})));
    let data = sandbox.path().join("given.jsonl");
    std::fs::write(&data, text(&given.iter().collect::<Vec<_>>())).unwrap();
    let options = ScoreOptions { model: sandbox.model(), data, temperature: 1.0, answers: false, heads: None };
    let mut out = Vec::new();
    let e = score_cli(&options, &mut out).unwrap_err().to_string();
    assert!(e.starts_with("8 of 11 could not be used"), "{e}");
    let ids: Vec<_> = lines(&out).iter().map(|l| (l["id"].clone(), l["index"].clone())).collect();
    assert_eq!(ids, [(json!("r0"), json!(0)), (json!("r1"), json!(0)), (json!("r1"), json!(2))]);
}

/// Computes the vision relevance of a row by hand.
fn relevance(row: &[f64], grid: Grid, b: &BBox) -> f64 {
    let m = grid.coverage(std::slice::from_ref(b), 96.0, 96.0);
    let a = m.iter().map(|m| f64::from(*m)).sum::<f64>() / m.len() as f64;
    let s: f64 = row.iter().zip(&m).map(|(p, m)| p * f64::from(*m)).sum();
    ((s - a) / (1.0 - a)).clamp(0.0, 1.0)
}

/// Averages a sample's rows over the chosen heads.
fn mean(sample: &HeadSample, chosen: impl Fn(&[usize; 2]) -> bool) -> Vec<f64> {
    let rows: Vec<&Vec<f32>> = sample.heads.iter().filter(|h| chosen(&[h.layer, h.head])).map(|h| &h.row).collect();
    (0..rows[0].len()).map(|j| rows.iter().map(|r| f64::from(r[j])).sum::<f64>() / rows.len() as f64).collect()
}

/// Rows of single heads are written; the heads chosen from them are used by `score` and by generation.
#[test]
fn calibrated_heads_are_used() {
    let sandbox = Sandbox::new();
    let given = [
        with(0, json!({"response": "[20,30,50,60] Nodule, nodule"})),
        with(0, json!({"response": "no finding"})),
        with(0, json!({"response": "a nodule"})),
        with(1, json!({"response": "nodule", "boxes": []})),
        with(1, json!({})),
    ];
    let file = sandbox.path().join("heads.jsonl");
    let write = |o: &mut ScoreOptions| (o.answers, o.heads) = (true, Some(file.clone()));
    let scored = sandbox.score_with(&given, write).unwrap();
    let samples: Vec<HeadSample> =
        std::fs::read_to_string(&file).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    // The first, the third, and the training answer of the last line: the others name no class or have no true box.
    assert_eq!(samples.iter().map(|s| s.id.as_str()).collect::<Vec<_>>(), ["r0", "r0", "r1"]);
    let config = VlmConfig::load(&sandbox.model().dir).unwrap();
    let layers = config.text.num_hidden_layers;
    let heads = config.text.num_attention_heads as usize;
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

    let choice = calibrate(&file, 3).unwrap();
    let out = sandbox.path().join("heads.toml");
    choice.save(&out).unwrap();
    assert_eq!((choice.samples, choice.measured.len()), (3, layers * heads));
    let set = format!("reward.vision_relevance.heads_file={}", out.display());
    let loaded = unveil_config::load_from(None, std::iter::empty(), &[set]).unwrap();
    let mut chosen = sandbox.model().config;
    chosen.reward = loaded.reward;
    let again = sandbox.score_with(&given, |o| (o.answers, o.model.config) = (true, chosen.clone())).unwrap();
    agree(&again, &|head| choice.heads.contains(head));
    assert!([0, 2, 4].iter().any(|i| again[*i]["vision_relevance"] != scored[*i]["vision_relevance"]));

    // The worker opens its engine in the same way and captures these heads.
    let engine = open_engine(&chosen, &sandbox.model().dir, 1, &[]).unwrap();
    let mut named: Vec<[usize; 2]> = Vec::new();
    for (layer, list) in engine.capture().unwrap().layers() {
        named.extend(list.iter().flatten().map(|head| [*layer, *head as usize]));
    }
    let mut expected = choice.heads.clone();
    expected.sort_unstable();
    assert_eq!(named, expected);
    let gone = sandbox.score_with(&given, |o| (o.answers, o.heads) = (true, Some("/no/such/dir/h.jsonl".into())));
    assert!(gone.unwrap_err().to_string().contains("/no/such/dir/h.jsonl"));
}

/// A sink filter changes the output of `score` as its definition predicts from the engine's rows.
#[test]
fn configured_sink_filter_changes_scores() {
    const ANSWER: &str = "[20] nodule";
    let sandbox = Sandbox::new();
    let mut config = sandbox.model().config;
    config.reward.vision_relevance.layers = vec![2];
    // Rows of every token, as sent by the worker.
    let preprocessor = unveil_preprocess::preprocessor::Preprocessor::load(&sandbox.model().dir).unwrap();
    let mut engine = open_engine(&config, &sandbox.model().dir, 1, &[]).unwrap();
    let prepared = preprocessor.prepare(&fixture::picture(0), &fixture::record(0)).unwrap();
    let (input, geometry) = crate::text::group_input("r0", None, prepared);
    let tokens = preprocessor.tokenizer().encode(ANSWER).unwrap();
    let (text, spans) = crate::text::decode(preprocessor.tokenizer(), &tokens);
    let scored = engine.score(&[unveil_engine::ScoreRequest { input, responses: vec![tokens] }], 1.0).unwrap();
    let rows = geometry.attention(scored[0][0].attention.as_ref()).unwrap().rows;
    let word = |i: usize| text[spans[i].0..spans[i].1].chars().any(char::is_alphanumeric);
    let (class, rest): (Vec<usize>, Vec<usize>) =
        (0..spans.len()).partition(|i| spans[*i].1 > text.find("nodule").unwrap());
    let mute: Vec<usize> = rest.into_iter().filter(|i| !word(*i)).collect();
    assert!(mute.len() >= 2, "brackets: {text} {spans:?}");
    // The lesion is the cell with the most attention from the class tokens.
    let cells = geometry.grid.tokens();
    let seen = |j: usize| class.iter().map(|i| rows[*i][j]).sum::<f32>();
    let lesion = (0..cells).max_by(|a, b| seen(*a).total_cmp(&seen(*b))).unwrap();
    let x = lesion % geometry.grid.cols * 16;
    let y = lesion / geometry.grid.cols * 16;
    let given = [with(0, json!({"response": ANSWER, "boxes": [[x, y, x + 16, y + 16]]}))];
    let by_hand = |sink: f64| {
        let is_sink =
            |j: usize| sink > 0.0 && j != lesion && mute.iter().all(|i| f64::from(rows[*i][j]) >= sink / cells as f64);
        let kept: Vec<usize> = (0..cells).filter(|j| !is_sink(*j)).collect();
        let share = |i: &usize| f64::from(rows[*i][lesion]) / kept.iter().map(|j| f64::from(rows[*i][*j])).sum::<f64>();
        let a = 1.0 / kept.len() as f64;
        let s = class.iter().map(share).sum::<f64>() / class.len() as f64;
        (cells - kept.len(), ((s - a) / (1.0 - a)).clamp(0.0, 1.0))
    };
    let score = |sink: f64| {
        let change = |o: &mut ScoreOptions| {
            o.model.config = config.clone();
            o.model.config.reward.vision_relevance.sink = sink;
        };
        sandbox.score_with(&given, change).unwrap()[0]["vision_relevance"].as_f64().unwrap()
    };
    for sink in [0.0, 1.001, 1.01, 50.0] {
        let found = score(sink);
        let expected = by_hand(sink).1;
        assert!((found - expected).abs() < 1e-5, "{sink}: {found} {expected}");
    }
    let none = by_hand(0.0);
    let some = by_hand(1.001);
    assert!(
        some.0 > 0 && (none.1 - some.1).abs() > 1e-4,
        "some cells get a little more attention from all tokens: {none:?} {some:?}"
    );
    assert_eq!(by_hand(50.0), none);
}
