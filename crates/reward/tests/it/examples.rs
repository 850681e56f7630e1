//! The example program.

#[allow(dead_code)]
#[path = "../../examples/score_file.rs"]
mod score_file;

use serde_json::json;

#[tokio::test]
async fn score_file_prints_breakdowns_and_means() {
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
    let mut out = Vec::new();
    score_file::score_file(&rewards, &responses, &mut out).await.unwrap();
    let text = String::from_utf8(out).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("a 0 total ") && lines[0].contains(", localization 1.000"), "{text}");
    assert!(lines[0].contains("vision_relevance masked (NoAttention)"), "{text}");
    assert!(lines[1].starts_with("a 1 total ") && lines[1].contains(", category 0.000"), "{text}");
    assert!(lines[2..].contains(&"mean localization 0.500 of 2"), "{text}");

    std::fs::write(&rewards, "[reward.localisation]\nweight = 1.0\n").unwrap();
    let e = score_file::score_file(&rewards, &responses, &mut Vec::new()).await.unwrap_err().to_string();
    assert!(e.contains("reward.localisation") && e.contains("rewards.toml"), "{e}");
}
