//! The example program.

use std::path::Path;
use std::process::{Command, Output};

use unveil_data::image_store::Image;
use unveil_testkit::example;
use unveil_testkit_model::write_model_directory;

fn generate(model: &Path, records: &Path, n: &str) -> Output {
    Command::new(example("generate")).args([model, records, Path::new(n)]).env("OMP_NUM_THREADS", "1").output().unwrap()
}

/// Returns the lines of a successful run.
fn lines(output: &Output) -> Vec<String> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn generate_responds_to_the_first_record() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write_model_directory(&model, 3);
    std::fs::write(dir.path().join("a.png"), Image::new(96, 96).to_png().unwrap()).unwrap();
    let records = dir.path().join("records.jsonl");
    std::fs::write(&records, r#"{"id": "a", "image": "a.png", "question": "What is abnormal, and where?"}"#).unwrap();

    let responses = lines(&generate(&model, &records, "3"));
    assert_eq!(responses.len(), 3);
    for line in &responses {
        assert!(!line.starts_with(r#""" "#), "the text is empty: {line}");
        assert!(line.contains("log-probability -") && !line.contains("Cancelled"), "{line}");
        assert!(line.contains("looks at Some(["), "{line}");
    }
    assert_ne!(responses[0], responses[1], "responses of a group are drawn independently");
    assert_eq!(lines(&generate(&model, &records, "3")), responses, "the seed determines the responses");
}

#[test]
fn generate_refuses_bad_input() {
    let dir = tempfile::tempdir().unwrap();
    write_model_directory(dir.path(), 3);
    let none = dir.path().join("none.jsonl");
    std::fs::write(dir.path().join("empty.jsonl"), "").unwrap();
    let empty = dir.path().join("empty.jsonl");
    for (records, n, word) in [(&none, "1", "none.jsonl"), (&empty, "1", "no record"), (&empty, "many", "InvalidDigit")]
    {
        let output = generate(dir.path(), records, n);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(word), "{word}: {error}");
    }
}
