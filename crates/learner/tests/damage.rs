//! Damage in a learner's checkpoint: one bit in any one object is found by `verify` and by whoever reads it, and a stage goes on from the
//! checkpoint before.

mod common;
#[path = "common/stage.rs"]
mod stage;

use std::path::{Path, PathBuf};

use serde_json::Value;
use stage::{Small, StopAt};
use tokio::runtime::Runtime;
use unveil_checkpoint::{Access, Error, Store, verify};
use unveil_learner::{LearnerError, Outcome, Silent, run_sft};
use unveil_service::CancellationToken;

/// To the end.
const ALL: (&str, u64) = ("sft", u64::MAX);

/// Runs stage 1 up to the event of kind `kind` and step `step`.
fn run(small: &Small, (kind, step): (&'static str, u64)) -> Result<(Outcome, Vec<Value>), LearnerError> {
    let (model, out) = (small.model(), small.dir.path().join("out"));
    let cancel = CancellationToken::new();
    let mut events = StopAt { kind, step, cancel: cancel.clone(), seen: vec![] };
    let mut silent = Silent;
    let outcome = run_sft(small.stage(&model, &out, &mut events, &mut silent, cancel))?;
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
fn a_bit_in_any_object_is_found_by_verify_and_by_resume() {
    let mut small = Small::new(4);
    (small.config.sft.steps, small.config.sft.batch, small.config.sft.checkpoint_every) = (2, 2, 1);
    assert_eq!(run(&small, ALL).unwrap().0.step, 2);
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
    // Each start is a term of its own; what it would save is not asked for, so that the newest stays the newest.
    for (n, path) in all.iter().enumerate() {
        let good = std::fs::read(path).unwrap();
        let mut bad = good.clone();
        let at = (n * 7919 + 13) % bad.len();
        bad[at] ^= 1 << (n % 8);
        std::fs::write(path, &bad).unwrap();
        let name = path.strip_prefix(&place).unwrap().to_string_lossy().into_owned();
        let wrong: Vec<_> = checks().into_iter().filter(|c| !c.ok).map(|c| c.object).collect();
        assert_eq!(wrong, std::slice::from_ref(&name), "verify");
        small.config.run.resume = "auto".into();
        let (outcome, events) = run(&small, ("resumed", 1)).unwrap();
        assert_eq!((events[0]["kind"].as_str(), events[0]["step"].as_u64()), (Some("resumed"), Some(1)), "{name}");
        assert_eq!(outcome.step, 1);
        std::fs::write(path, &good).unwrap();
        // The lineage ends at step 1 now; a run from there to step 2 makes a new one to damage.
        break_off(&place);
    }
    // Where the one before is damaged too, none is taken, and a run is not begun afresh in silence.
    for path in [newest, place.join("checkpoints/step-1/term-1")] {
        std::fs::write(path.join("manifest.json"), "{").unwrap();
    }
    match run(&small, ALL) {
        Err(LearnerError::Checkpoint(Error::NoneUsable { reasons, .. })) => {
            assert!(reasons.contains("step 1") && reasons.contains("step 2"), "{reasons}");
        }
        other => panic!("{:?}", other.map(|o| o.0)),
    }
}

/// Takes back what the last start wrote to the log.
fn break_off(place: &Path) {
    for path in files(&place.join("log")) {
        let entry: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        if entry["term"] != 1 {
            std::fs::remove_file(path).unwrap();
        }
    }
}
