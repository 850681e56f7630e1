//! The example program.

#[allow(dead_code)]
#[path = "../../examples/resume_from_bucket.rs"]
mod resume_from_bucket;

use resume_from_bucket::{Outcome, run};

#[tokio::test]
async fn resume_from_bucket_continues_from_its_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let url = url::Url::from_directory_path(dir.path().join("run")).unwrap();
    let first = run(url.as_str()).await.unwrap();
    assert_eq!((first.resumed_from, first.saved, first.value), (None, 1, 1.0));
    assert!(first.verified >= 2, "the manifest and a shard: {first:?}");
    let second = run(url.as_str()).await.unwrap();
    assert_eq!(second, Outcome { resumed_from: Some(1), saved: 2, value: 2.0, verified: first.verified });
}

#[tokio::test]
async fn resume_from_bucket_skips_a_damaged_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().to_str().unwrap();
    run(run_dir).await.unwrap();
    run(run_dir).await.unwrap();
    let shard = dir.path().join("checkpoints/step-2/term-2/shards/0.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let third = run(run_dir).await.unwrap();
    assert_eq!((third.resumed_from, third.saved, third.value), (Some(1), 2, 2.0));
}
