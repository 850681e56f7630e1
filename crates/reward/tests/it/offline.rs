//! `reward score` over files: order, groups, attention, and every kind of invalid line.

use std::path::PathBuf;

use serde_json::{Value, json};
use unveil_config::Config;
use unveil_reward::run_score;

struct Sandbox {
    dir: tempfile::TempDir,
}

impl Sandbox {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn file(&self, lines: &[Value]) -> PathBuf {
        let path = self.dir.path().join("r.jsonl");
        let text: Vec<String> = lines.iter().map(Value::to_string).collect();
        std::fs::write(&path, text.join("\n")).unwrap();
        path
    }

    fn score(&self, lines: &[Value]) -> Result<Vec<Value>, String> {
        let mut out = Vec::new();
        run_score(&Config::default(), &self.file(lines), &mut out).map_err(|e| e.to_string())?;
        Ok(String::from_utf8(out).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect())
    }
}

fn line(id: &str, index: usize, response: &str) -> Value {
    json!({"id": id, "image_size": [96, 96], "category": "nodule", "boxes": [[16, 16, 32, 32]], "index": index,
           "response": response})
}

#[test]
fn responses_are_scored_in_file_order() {
    let s = Sandbox::new();
    let out = s
        .score(&[line("a", 0, "[16,16,32,32] nodule"), line("b", 0, "no finding"), line("a", 1, "no finding")])
        .unwrap();
    let keys: Vec<(&str, u64)> =
        out.iter().map(|o| (o["id"].as_str().unwrap(), o["index"].as_u64().unwrap())).collect();
    assert_eq!(keys, [("a", 0), ("b", 0), ("a", 1)]);
    assert_eq!(out[0]["components"]["localization"]["value"], 1.0);
    assert_eq!(out[0]["components"]["vision_relevance"]["masked"], true, "no attention was given");
    assert_eq!(out[0]["components"]["vision_relevance"]["reason"], "no_attention");
    assert_eq!(out[2]["components"]["vision_relevance"]["reason"], "group_masked");
    assert_eq!(out[1]["components"]["vision_relevance"]["value"], 0.0, "no mention");
}

#[test]
fn images_outside_the_folder_need_permission() {
    let s = Sandbox::new();
    let set = s.dir.path().join("set");
    std::fs::create_dir(&set).unwrap();
    let png = s.dir.path().join("out.png");
    std::fs::write(&png, unveil_data::image_store::Image::new(96, 96).to_png().unwrap()).unwrap();
    std::os::unix::fs::symlink(&png, set.join("link.png")).unwrap();
    let file = set.join("r.jsonl");
    for (image, why) in [("../out.png", "\"..\""), (png.to_str().unwrap(), "absolute"), ("link.png", "link")] {
        let mut l = line("a", 0, "[16,16,32,32] nodule");
        l.as_object_mut().unwrap().remove("image_size");
        l["image"] = image.into();
        std::fs::write(&file, l.to_string()).unwrap();
        let score = |outside: bool| {
            let mut c = Config::default();
            c.data.outside = outside;
            run_score(&c, &file, &mut Vec::new())
        };
        let e = score(false).unwrap_err().to_string();
        assert!(e.contains("r.jsonl:1") && e.contains(why) && e.contains("data.outside"), "{e}");
        assert_eq!(score(true).unwrap(), 1, "{image}");
    }
}

#[test]
fn attention_is_scored_with_spans() {
    let s = Sandbox::new();
    let mut l = line("a", 0, "[16,16,32,32] nodule");
    let mut row = vec![0.0; 36];
    row[7] = 1.0;
    l["attention"] = json!({"grid": [6, 6], "tokens": [1], "rows": [row]});
    l["spans"] = json!([[0, 13], [13, 20]]);
    let out = s.score(&[l]).unwrap();
    assert_eq!(out[0]["components"]["vision_relevance"]["value"], 1.0);
}

#[test]
fn image_size_falls_back_to_the_image() {
    let s = Sandbox::new();
    let png = unveil_data::image_store::Image::new(96, 96).to_png().unwrap();
    std::fs::write(s.dir.path().join("x.png"), png).unwrap();
    let mut l = line("a", 0, "[8,8,16,16] nodule");
    l.as_object_mut().unwrap().remove("image_size");
    l["image"] = json!("x.png");
    l["resized_size"] = json!([48, 48]);
    let out = s.score(&[l.clone()]).unwrap();
    assert_eq!(out[0]["components"]["localization"]["value"], 1.0);
    l["image"] = json!("missing.png");
    let e = s.score(&[l]).unwrap_err();
    assert!(e.contains("r.jsonl:1") && e.contains("missing.png"), "{e}");
}

#[test]
fn invalid_lines_are_named() {
    let s = Sandbox::new();
    let good = line("a", 0, "x");
    let with = |key: &str, value: Value| {
        let mut l = line("a", 1, "x");
        l[key] = value;
        l
    };
    let without = |key: &str| {
        let mut l = line("a", 1, "x");
        l.as_object_mut().unwrap().remove(key);
        l
    };
    let tokens_only = {
        let mut l = without("response");
        l["tokens"] = json!([1, 2, 3]);
        l
    };
    for (bad, word) in [
        (without("id"), "id"),
        (with("id", json!("")), "no id"),
        (without("index"), "index"),
        (with("index", json!(0)), "twice"),
        (with("index", json!(-1)), "`index`"),
        (without("response"), "tokens"),
        (tokens_only, "model.dir"),
        (with("category", json!("mass")), "differs"),
        (with("attention", json!({"grid": 3})), "`attention`"),
        (with("spans", json!([[0, 99]])), "spans"),
        (with("resized_size", json!([0, 1])), "resized_size"),
        (json!(["not", "a", "record"]), "record"),
    ] {
        let e = s.score(&[good.clone(), bad.clone()]).unwrap_err();
        assert!(e.contains("r.jsonl:2:") && e.contains(word), "{bad}: {e}");
    }
    let mut outside = good.clone();
    outside["boxes"] = json!([[16, 16, 320, 32]]);
    let e = s.score(&[outside]).unwrap_err();
    assert!(e.contains("r.jsonl:1:") && e.contains("outside"), "{e}");
}

#[test]
fn missing_file_is_named() {
    let e = run_score(&Config::default(), &PathBuf::from("/no/such/r.jsonl"), &mut Vec::new()).unwrap_err();
    assert!(e.to_string().contains("/no/such/r.jsonl"));
}

/// Uses a model directory without weights: scoring reads the tokenizer and the processor only.
#[test]
fn tokens_and_mentions_through_a_tokenizer() {
    let s = Sandbox::new();
    let model = s.dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    unveil_preprocess::tokenizer::tiny::write_tiny(&model, &Default::default()).unwrap();
    let tokenizer = unveil_preprocess::tokenizer::Tokenizer::load(&model).unwrap();
    let text = "[16,16,32,32] nodule";
    let tokens = tokenizer.encode(&format!("{text}<|im_end|>")).unwrap();
    let spans = unveil_core::mention::byte_spans(text, &tokenizer.decode_offsets(&tokens).spans);
    let mention = unveil_core::mention::overlapping_tokens(&(14..20), &spans);
    assert!(!mention.is_empty());
    let row = |cell: usize| (0..36).map(|j| f64::from(u8::from(j == cell))).collect::<Vec<_>>();
    // Only the tokens of the mention attend to the lesion.
    let rows: Vec<_> = (0..tokens.len()).map(|t| row(if mention.contains(&t) { 7 } else { 0 })).collect();
    let attention = json!({"grid": [6, 6], "tokens": (0..tokens.len()).collect::<Vec<_>>(), "rows": rows});
    let mut by_tokens = line("a", 0, "");
    by_tokens.as_object_mut().unwrap().remove("response");
    by_tokens["tokens"] = json!(tokens);
    by_tokens["attention"] = attention.clone();
    let mut by_text = line("a", 1, text);
    by_text["attention"] = attention;
    let mut config = Config::default();
    config.model.dir = model.display().to_string();
    let mut out = Vec::new();
    run_score(&config, &s.file(&[by_tokens, by_text]), &mut out).unwrap();
    for l in String::from_utf8(out).unwrap().lines() {
        let v: Value = serde_json::from_str(l).unwrap();
        for name in unveil_reward::COMPONENTS {
            assert_eq!(v["components"][name]["value"], 1.0, "{name}: {l}");
        }
    }
    config.model.dir = "/no/such/model".into();
    let e = run_score(&config, &s.file(&[line("a", 0, text)]), &mut Vec::new()).unwrap_err().to_string();
    assert!(e.contains("/no/such/model"), "{e}");
}

/// The box form is the configured one, else the form of the model directory's family, else of the configured family.
#[test]
fn box_form_is_configured_or_the_familys() {
    use unveil_core::{BoxForm, Family};
    use unveil_preprocess::tokenizer::tiny::{TinyProcessorSpec, write_tiny};
    let s = Sandbox::new();
    let localization = |config: &Config, text: &str| {
        let mut out = Vec::new();
        run_score(config, &s.file(&[line("a", 0, text)]), &mut out).unwrap();
        let v: Value = serde_json::from_slice(&out).unwrap();
        v["components"]["localization"]["value"].as_f64().unwrap()
    };
    let right = |form| match form {
        BoxForm::Absolute => "[16,16,32,32] nodule",
        BoxForm::PerMille => "[167,167,333,333] nodule",
        BoxForm::Qwen2Vl => "<|object_ref_start|>nodule<|object_ref_end|><|box_start|>(167,167),(333,333)<|box_end|>",
        BoxForm::Llava => "[0.167,0.167,0.333,0.333] nodule",
    };
    let mut config = Config::default();
    for form in BoxForm::ALL {
        config.model.boxes = Some(form);
        for other in BoxForm::ALL {
            assert_eq!(localization(&config, right(other)) > 0.98, form == other, "{form} {other}");
        }
    }
    config.model.boxes = None;
    for family in Family::ALL {
        config.model.family = family.name().into();
        config.model.dir = String::new();
        assert!(localization(&config, right(family.box_form())) > 0.98, "{}", family.name());
        let dir = s.dir.path().join(family.name());
        std::fs::create_dir(&dir).unwrap();
        write_tiny(&dir, &TinyProcessorSpec { family, ..TinyProcessorSpec::default() }).unwrap();
        config.model.dir = dir.display().to_string();
        config.model.family = "another".into();
        assert!(localization(&config, right(family.box_form())) > 0.98, "{}", family.name());
    }
    config.model.boxes = Some(BoxForm::Qwen2Vl);
    let e = run_score(&config, &s.file(&[line("a", 0, "x")]), &mut Vec::new()).unwrap_err().to_string();
    assert!(e.contains("<|object_ref_start|>") && e.contains("qwen3_vl"), "{e}");
}
