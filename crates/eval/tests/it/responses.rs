//! Tests of response files: errors name the file and the problem; with scores they become samples of the report.

use std::path::{Path, PathBuf};

use serde_json::json;
use unveil_config::Config;
use unveil_config::schema::Suite;
use unveil_eval::{Bootstrap, Evaluation, LesionAttention, evaluate_responses, measure_suite, rewarded_responses};
use unveil_reward::run_score;

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn line(id: &str, index: usize, response: &str) -> String {
    json!({"id": id, "image_size": [100, 80], "category": "nodule", "boxes": [[10, 20, 50, 60]], "split": "test",
        "index": index, "response": response})
    .to_string()
        + "\n"
}

#[test]
fn errors_and_missing_values_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::default();
    let evaluate =
        |name: &str, text: &str, split: &str| evaluate_responses(&config, &write(dir.path(), name, text), split);
    let e = evaluate("empty.jsonl", "\n", "").unwrap_err().to_string();
    assert!(e.contains("empty.jsonl") && e.contains("nothing to evaluate"), "{e}");
    let e = evaluate("r.jsonl", &line("a", 0, "x"), "val").unwrap_err().to_string();
    assert!(e.contains("r.jsonl") && e.contains("`val`"), "{e}");
    let e = evaluate("torn.jsonl", &(line("a", 0, "x") + "{"), "").unwrap_err().to_string();
    assert!(e.contains("torn.jsonl:2"), "{e}");
    let answers = evaluate("r.jsonl", &line("a", 0, "[10,20,50,60] nodule"), "test").unwrap();
    assert_eq!(
        (answers[0].attention, answers[0].prediction.iou),
        (LesionAttention::NoRows, Some(1.0)),
        "no rows is not 0"
    );
    let result = json!(measure_suite(Suite::Grounding, &answers, None, &Bootstrap::default()).unwrap());
    assert!(result["metrics"]["pointing_game"]["value"].is_null() && result.get("withheld").is_none(), "{result}");
    assert_eq!((&result["without_rows"], &result["metrics"]["mean_iou"]["low"]), (&json!(1), &json!(1.0)));
    let e = measure_suite(Suite::Mau, &answers, None, &Bootstrap::default()).unwrap_err().to_string();
    assert!(e.contains("\"a\"") && e.contains("`source`"), "{e}");
    assert!(measure_suite(Suite::Grounding, &[], None, &Bootstrap::default()).is_err());
    let answers = evaluate("b.jsonl", &(line("a", 0, "what?") + &line("a", 1, "")), "").unwrap();
    let result = measure_suite(Suite::Grounding, &answers, Some(&answers), &Bootstrap::default()).unwrap();
    let shown = json!(result);
    let table = result.table();
    assert_eq!((&shown["n"], &shown["records"]), (&json!(2), &json!(1)));
    assert_eq!(shown["metrics"], shown["withheld"]["metrics"]);
    assert_eq!(shown["faults"], json!({"empty": 1, "no_box": 1}));
    assert_eq!(shown["metrics"]["in_box_energy"]["value"], 0.0, "an answer that does not name the class counts as 0");
    for part in ["mean_iou", "image withheld (black)", "0.000 [0.000, 0.000]", "2 answers to 1 records"] {
        assert!(table.contains(part), "{part} is not in\n{table}");
    }
    assert_eq!(result.values()["withheld"]["parse_failures"], 1.0);
    assert_eq!(Evaluation::new(answers).metrics.n, 2);
}

#[test]
fn text_answers_are_counted_separately() {
    let dir = tempfile::tempdir().unwrap();
    let text = |index: usize, response: &str| {
        json!({"id": "q", "task": "vqa", "answer": "MRI", "image_size": [100, 80], "boxes": [], "split": "test", "index": index,
            "response": response})
        .to_string()
            + "\n"
    };
    let file =
        write(dir.path(), "r.jsonl", &(line("a", 0, "[10,20,50,60] mass") + &text(0, "MRI") + &text(1, "no finding")));
    let answers = evaluate_responses(&Config::default(), &file, "").unwrap();
    let m = json!(Evaluation::new(answers.clone()).metrics);
    assert_eq!(
        (&m["accuracy"], &m["soft_f1"], &m["n"], &m["n_text"]),
        (&json!(0.0), &json!(1.0), &json!(1), &json!(2)),
        "{m}"
    );
    let result = measure_suite(Suite::Grounding, &answers, Some(&answers), &Bootstrap::default()).unwrap();
    let shown = json!(result);
    assert_eq!((&shown["n"], &shown["n_text"], &shown["records"]), (&json!(1), &json!(2), &json!(1)), "{shown}");
    for (name, n) in [("soft_f1", 1), ("parse_failures", 1), ("boxes_per_answer", 1), ("invalid_boxes", 1)] {
        assert_eq!(shown["metrics"][name]["n"], n, "{name}");
    }
    assert!(result.table().contains("and 2 in text"), "{}", result.table());
    // Text records need no source; a suite over text records only is empty.
    let only = write(dir.path(), "t.jsonl", &text(0, "no finding"));
    let answers = evaluate_responses(&Config::default(), &only, "").unwrap();
    let shown = json!(measure_suite(Suite::Mau, &answers, None, &Bootstrap::default()).unwrap());
    assert_eq!(
        (&shown["n"], &shown["n_text"], &shown["accuracy"]["value"]),
        (&json!(0), &json!(1), &serde_json::Value::Null)
    );
}

#[test]
fn responses_are_combined_with_their_scores() {
    let dir = tempfile::tempdir().unwrap();
    let text = line("a", 0, "[10,20,50,60] nodule") + &line("b", 0, "no finding") + &line("a", 1, "[0,0,5,5] nodule");
    let config = Config::default();
    let file = write(dir.path(), "r.jsonl", &text);
    let mut scored = Vec::new();
    assert_eq!(run_score(&config, &file, &mut scored).unwrap(), 3);
    let scored = String::from_utf8(scored).unwrap();
    let shown = rewarded_responses(&config, &file, &write(dir.path(), "s.jsonl", &scored)).unwrap();
    let order: Vec<(&str, usize)> = shown.iter().map(|s| (s.id.as_str(), s.index)).collect();
    assert_eq!(order, [("a", 0), ("b", 0), ("a", 1)], "in the order of the file");
    assert_eq!(shown[0].predicted, shown[0].truth);
    assert_eq!(shown[2].components["localization"].value, Some(0.0));
    assert!(shown[0].components["vision_relevance"].masked && shown[0].total > shown[2].total);
    let first = scored.lines().next().unwrap();
    let e = rewarded_responses(&config, &file, &write(dir.path(), "few.jsonl", first)).unwrap_err().to_string();
    assert!(e.contains("few.jsonl") && e.contains("response 1 of \"a\"") && e.contains("reward score"), "{e}");
    let e = rewarded_responses(&config, &file, &write(dir.path(), "bad.jsonl", "{}")).unwrap_err().to_string();
    assert!(e.contains("bad.jsonl") && e.contains("line 1"), "{e}");
}
