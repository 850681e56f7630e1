//! Damaged checkpoints: a flipped bit in any object is found by `verify` and when resuming, and the stage resumes from
//! the previous checkpoint.

use std::path::{Path, PathBuf};

use crate::common::small_run::{SmallRun, StopAt};
use serde_json::Value;
use tokio::runtime::Runtime;
use unveil_checkpoint::{Access, Error, Store, verify};
use unveil_learner::{LearnerError, Outcome, SilentProgress, run_sft};
use unveil_service::CancellationToken;

/// Stop condition that is never met.
const TO_THE_END: (&str, u64) = ("sft", u64::MAX);

/// Runs stage 1 up to the event of kind `kind` and step `step`.
fn run(small: &SmallRun, (kind, step): (&'static str, u64)) -> Result<(Outcome, Vec<Value>), LearnerError> {
    let model = small.model();
    let out = small.dir.path().join("out");
    let cancel = CancellationToken::new();
    let mut events = StopAt { kind, step, cancel: cancel.clone(), seen: vec![] };
    let mut silent = SilentProgress;
    let outcome = run_sft(small.stage(&model, &out, &mut events, &mut silent, cancel), |_| ())?;
    Ok((outcome, events.seen))
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { out.extend(files(&path)) } else { out.push(path) }
    }
    out.sort();
    out
}

#[test]
fn a_flipped_bit_is_found_by_verify_and_by_resume() {
    let mut small = SmallRun::new(4);
    small.config.sft.steps = 2;
    small.config.sft.batch = 2;
    small.config.sft.checkpoint_every = 1;
    assert_eq!(run(&small, TO_THE_END).unwrap().0.step, 2);
    let place = small.run().join("sft");
    let newest = place.join("checkpoints/step-2/term-1");
    let all = files(&newest);
    assert!(all.iter().any(|p| p.to_string_lossy().contains("shards/")) && all.len() > 5, "{all:?}");
    let checks = || {
        Runtime::new().unwrap().block_on(async {
            let none: [(&str, &str); 0] = [];
            let store = Store::open(&place.to_string_lossy(), none, Access::Read).await.unwrap();
            verify(&store, None).await.unwrap()
        })
    };
    let sound = checks();
    assert!(sound.len() > all.len() && sound.iter().all(|c| c.ok));
    // Each start claims a new term. It stops before it saves, so that the newest checkpoint stays the newest.
    for (n, path) in all.iter().enumerate() {
        let good = std::fs::read(path).unwrap();
        let mut damaged = good.clone();
        let offset = (n * 7919 + 13) % damaged.len();
        damaged[offset] ^= 1 << (n % 8);
        std::fs::write(path, &damaged).unwrap();
        let name = path.strip_prefix(&place).unwrap().to_string_lossy().into_owned();
        let wrong: Vec<_> = checks().into_iter().filter(|c| !c.ok).map(|c| c.object).collect();
        assert_eq!(wrong, std::slice::from_ref(&name), "verify");
        small.config.run.resume = "auto".into();
        let (outcome, events) = run(&small, ("resumed", 1)).unwrap();
        assert_eq!((events[0]["kind"].as_str(), events[0]["step"].as_u64()), (Some("resumed"), Some(1)), "{name}");
        assert_eq!(outcome.step, 1);
        std::fs::write(path, &good).unwrap();
        // The lineage now ends at step 1; removing the later terms restores the checkpoint of step 2.
        remove_later_terms(&place);
    }
    // If the previous checkpoint is damaged too, the run fails instead of silently starting over.
    for path in [newest, place.join("checkpoints/step-1/term-1")] {
        std::fs::write(path.join("manifest.json"), "{").unwrap();
    }
    match run(&small, TO_THE_END) {
        Err(LearnerError::Checkpoint(Error::NoUsableCheckpoint { reasons, .. })) => {
            assert!(reasons.contains("step 1") && reasons.contains("step 2"), "{reasons}");
        }
        other => panic!("{:?}", other.map(|o| o.0)),
    }
}

/// Removes the log entries of the last start.
fn remove_later_terms(place: &Path) {
    for path in files(&place.join("log")) {
        let entry: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        if entry["term"] != 1 {
            std::fs::remove_file(path).unwrap();
        }
    }
}
