//! The example program.

#[allow(dead_code)]
#[path = "../../examples/generate.rs"]
mod generate;

use std::path::Path;

use unveil_core::Finish;
use unveil_data::image_store::Image;
use unveil_model::{InitSpec, SpecialIds, init};
use unveil_preprocess::tokenizer::tiny::{TinyProcessorSpec, write_tiny};

/// Writes a tiny model directory with random weights.
fn write_model(dir: &Path) {
    let vocabulary = write_tiny(dir, &TinyProcessorSpec::default()).unwrap();
    let ids = &vocabulary.special;
    let special = SpecialIds {
        image_pad: ids.image_pad,
        video_pad: ids.video_pad,
        vision_start: ids.vision_start,
        vision_end: ids.vision_end,
        bos: None,
        eos: ids.im_end,
        pad: ids.end_of_text,
    };
    let family = "qwen2_5_vl".into();
    let spec = InitSpec { family, preset: "tiny".into(), vocab_size: vocabulary.vocab_size, seed: 3, special };
    init(&spec, dir).unwrap();
}

#[test]
fn generate_responds_to_the_first_record() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    write_model(&model);
    std::fs::write(dir.path().join("a.png"), Image::new(96, 96).to_png().unwrap()).unwrap();
    let records = dir.path().join("records.jsonl");
    std::fs::write(&records, r#"{"id": "a", "image": "a.png", "question": "What is abnormal, and where?"}"#).unwrap();

    let responses = generate::generate(&model, &records, 3).unwrap();
    assert_eq!(responses.len(), 3);
    for r in &responses {
        assert!(!r.text.is_empty() && r.logprob < 0.0 && r.finish != Finish::Cancelled, "{r:?}");
        assert!(r.looks_at.is_some(), "{r:?}");
    }
    assert_ne!(responses[0].text, responses[1].text, "responses of a group are drawn independently");
    assert_eq!(generate::generate(&model, &records, 3).unwrap(), responses, "the seed determines the responses");
    let e = generate::generate(&model, &dir.path().join("none.jsonl"), 1).unwrap_err().to_string();
    assert!(e.contains("none.jsonl"), "{e}");
}
