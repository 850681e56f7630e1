//! The example program.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::json;
use unveil_testkit::example;

fn score_file(rewards: &Path, responses: &Path) -> Output {
    Command::new(example("score_file")).args([rewards, responses]).output().unwrap()
}

#[test]
fn score_file_prints_breakdowns_and_means() {
    let dir = tempfile::tempdir().unwrap();
    let rewards = dir.path().join("rewards.toml");
    std::fs::write(&rewards, "[reward.localization]\nweight = 1.0\n[reward.category]\nweight = 1.0\n").unwrap();
    let line = |index: usize, response: &str| {
        json!({"id": "a", "image_size": [96, 96], "category": "nodule", "boxes": [[16, 16, 32, 32]], "index": index,
               "response": response})
        .to_string()
    };
    let responses = dir.path().join("r.jsonl");
    std::fs::write(&responses, [line(0, "[16,16,32,32] nodule"), line(1, "no finding")].join("\n")).unwrap();
    let scored = score_file(&rewards, &responses);
    let text = String::from_utf8(scored.stdout).unwrap();
    assert!(scored.status.success(), "{text}{}", String::from_utf8_lossy(&scored.stderr));
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("a 0 total ") && lines[0].contains(", localization 1.000"), "{text}");
    assert!(lines[0].contains("vision_relevance masked (NoAttention)"), "{text}");
    assert!(lines[1].starts_with("a 1 total ") && lines[1].contains(", category 0.000"), "{text}");
    assert!(lines[2..].contains(&"mean localization 0.500 of 2"), "{text}");

    std::fs::write(&rewards, "[reward.localisation]\nweight = 1.0\n").unwrap();
    let refused = score_file(&rewards, &responses);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success(), "an unknown key is accepted");
    assert!(error.contains("reward.localisation") && error.contains("rewards.toml"), "{error}");
}
