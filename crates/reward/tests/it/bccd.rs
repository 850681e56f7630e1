//! Real images from import to reward: answers with the boxes of BCCD's records score high in every box form, others do not.

use serde_json::{Value, json};
use unveil_config::Config;
use unveil_core::{BBox, BoxForm, Record};
use unveil_data::records::RecordFile;
use unveil_datasets::import::{ClassFilter, Format, ImportOptions, import};
use unveil_preprocess::codec::{Sizes, answer_text, codec};
use unveil_testkit::bccd;

#[test]
fn bccd_answers_score_by_their_boxes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("wbc.jsonl");
    let class = Some(ClassFilter { class: "WBC".into(), category: "white blood cell".into() });
    let options = ImportOptions { split: Some("test".into()), class, ..ImportOptions::default() };
    assert_eq!(import(Format::Voc, &bccd(), &file, &options).unwrap().records, 72);
    let records = RecordFile::load(&file).unwrap().records;
    for form in BoxForm::ALL {
        let mut lines = Vec::new();
        for r in &records {
            let [w, h] = r.image_size.unwrap();
            let sizes = Sizes { original: (w, h), resized: (w, h) };
            let whole = Record { boxes: vec![BBox::from([0.0, 0.0, w as f32, h as f32])], ..r.clone() };
            for (index, answered) in [r, &whole].into_iter().enumerate() {
                let mut line = serde_json::to_value(r).unwrap();
                line["index"] = json!(index);
                line["response"] = json!(answer_text(codec(form), answered, &sizes).unwrap());
                lines.push(line.to_string());
            }
        }
        let responses = dir.path().join("responses.jsonl");
        std::fs::write(&responses, lines.join("\n")).unwrap();
        let mut config = Config::default();
        config.model.boxes = Some(form);
        let mut out = Vec::new();
        assert_eq!(unveil_reward::run_score(&config, &responses, &mut out).unwrap(), 144);
        let scores: Vec<Value> =
            String::from_utf8(out).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let localization = |k: usize| scores[k]["components"]["localization"]["value"].as_f64().unwrap();
        for (k, r) in records.iter().enumerate() {
            // Cells have sides of about a hundred pixels; an edge is off by a third of a pixel at most.
            assert!(localization(2 * k) > 0.97, "{form}: {} {}", r.id, localization(2 * k));
            // A cell covers a twentieth of the image.
            assert!(localization(2 * k + 1) < 0.4, "{form}: {} {}", r.id, localization(2 * k + 1));
        }
    }
}
