//! The example program.

use std::process::Command;

use unveil_testkit::example;

/// Runs the program once and returns its output up to the number of objects, and that number.
fn run(url: &str) -> (String, usize) {
    let output = Command::new(example("resume_from_bucket")).arg(url).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let line = text.trim_end().strip_suffix(" objects verified").unwrap();
    let (outcome, verified) = line.rsplit_once(", ").unwrap();
    (outcome.to_owned(), verified.parse().unwrap())
}

#[test]
fn resume_from_bucket_continues_from_its_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let url = url::Url::from_directory_path(dir.path().join("run")).unwrap();
    let (outcome, verified) = run(url.as_str());
    assert_eq!(outcome, "resumed from None, saved step 1, value 1");
    assert!(verified >= 2, "the manifest and a shard: {verified}");
    assert_eq!(run(url.as_str()), ("resumed from Some(1), saved step 2, value 2".to_owned(), verified));
}

#[test]
fn resume_from_bucket_skips_a_damaged_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().to_str().unwrap();
    run(run_dir);
    run(run_dir);
    let shard = dir.path().join("checkpoints/step-2/term-2/shards/0.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    assert_eq!(run(run_dir).0, "resumed from Some(1), saved step 2, value 2");
}

#[test]
fn resume_from_bucket_refuses_an_unknown_scheme() {
    let output = Command::new(example("resume_from_bucket")).arg("ftp://bucket/run").output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("ftp"), "{error}");
}
