//! Saves that fail, are interrupted or race; damage; fencing. The newest committed checkpoint must always survive.

use std::time::Duration;

use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use unveil_checkpoint::{
    CheckpointHeader, CheckpointInfo, Checkpoints, Error, Object, Resume, Retention, RunLog, best, list, prune, show,
    verify,
};

use crate::common::{COUNT, Fault, FaultyRun, header, load, objects, retention, save, value};

fn steps(infos: &[CheckpointInfo]) -> Vec<u64> {
    infos.iter().map(|c| c.step).collect()
}

/// Returns the step that `auto` resumes from.
async fn resumed_step(run: &FaultyRun) -> u64 {
    load(&run.store, Resume::Auto).await.unwrap().unwrap().info.step
}

#[tokio::test]
async fn saved_checkpoints_load_back() {
    let run = FaultyRun::in_memory();
    assert!(load(&run.store, Resume::Auto).await.unwrap().is_none());
    let mut c = run.claim(2).await;
    assert!(c.resume_candidates(Resume::Auto).unwrap().next_candidate().unwrap().is_none());
    let info = save(&mut c, 1).await.unwrap();
    assert_eq!((info.step, info.term, info.objects), (1, 1, 4));
    save(&mut c, 2).await.unwrap();
    let loaded = load(&run.store, Resume::Auto).await.unwrap().unwrap();
    assert_eq!(loaded.meta["step"], 2);
    assert!(loaded.warnings.is_empty());
    for o in objects(2).iter().filter(|o| o.layout.is_none()) {
        assert_eq!(loaded.files[&o.name], o.bytes);
    }
    for kind in ["weight", "exp_avg"] {
        assert_eq!(loaded.tensors[kind], (0..COUNT).map(|i| value(2, kind, i)).collect::<Vec<_>>());
    }
    assert_eq!(load(&run.store, Resume::Step(1)).await.unwrap().unwrap().meta["step"], 1);
    let e = load(&run.store, Resume::Step(7)).await.unwrap_err().to_string();
    assert!(e.contains("step 7") && e.contains("1, 2"), "{e}");
    assert!(load(&run.store, Resume::Never).await.unwrap().is_none());
    assert!(matches!(save(&mut c, 2).await, Err(Error::StepAlreadySaved { step: 2, .. })));
    assert_eq!(show(&run.store, None).await.unwrap().manifest.objects.len(), 4);
}

#[tokio::test]
async fn full_disk_names_the_object_and_keeps_the_checkpoint() {
    let run = FaultyRun::in_memory();
    let mut c = run.claim(1).await;
    save(&mut c, 1).await.unwrap();
    for object in ["shards/0-1", "manifest.json"] {
        run.inject(Fault::DiskFull, object, 1);
        let e = save(&mut c, 2).await.unwrap_err().to_string();
        assert!(e.contains(&format!("checkpoints/step-2/term-1/{object}")), "{e}");
        assert!(e.contains("No space left on device") && e.contains("mem://runs/a"), "{e}");
        assert_eq!(resumed_step(&run).await, 1);
        assert!(verify(&run.store, None).await.unwrap().iter().all(|o| o.ok));
        assert!(run.names("checkpoints/step-2").await.is_empty(), "objects of the failed save are deleted");
    }
    run.inject(Fault::DiskFull, "log/", 100);
    let e = save(&mut c, 2).await.unwrap_err().to_string();
    assert!(e.contains("run log") && e.contains("No space left"), "{e}");
    assert_eq!(resumed_step(&run).await, 1);
    run.plan.lock().unwrap().clear();
    save(&mut c, 2).await.unwrap();
    assert_eq!(resumed_step(&run).await, 2);
}

#[tokio::test]
async fn interrupted_save_keeps_the_previous_one_and_is_swept() {
    for object in ["config.json", "shards/0-1", "manifest.json", "log/"] {
        let run = FaultyRun::in_memory();
        let mut c = run.claim(3).await;
        save(&mut c, 1).await.unwrap();
        run.inject(Fault::Hang, object, 1);
        let interrupted = tokio::time::timeout(Duration::from_millis(50), save(&mut c, 2)).await;
        assert!(interrupted.is_err(), "the save must hang at {object}");
        drop(c);
        assert_eq!(resumed_step(&run).await, 1);
        assert!(!run.names("checkpoints/step-2").await.is_empty() || object == "config.json");

        let (mut c, loaded) = run.resume(3, Resume::Auto).await;
        assert_eq!(loaded.unwrap().info.step, 1);
        save(&mut c, 3).await.unwrap();
        assert!(run.names("checkpoints/step-2").await.is_empty(), "orphaned objects remain after {object}");
        assert!(verify(&run.store, None).await.unwrap().iter().all(|o| o.ok));
    }
}

#[tokio::test]
async fn damage_to_any_object_is_detected_and_skipped() {
    let run = FaultyRun::in_memory();
    let mut c = run.claim(5).await;
    save(&mut c, 1).await.unwrap();
    save(&mut c, 2).await.unwrap();
    for name in run.names("checkpoints/step-2").await {
        let path = Path::from(format!("runs/a/{name}"));
        let original = run.raw.get(&path).await.unwrap().bytes().await.unwrap();
        let mut flipped = original.to_vec();
        flipped[original.len() / 2] ^= 1;
        let truncated = original[..original.len() - 1].to_vec();
        for damage in [Some(flipped), Some(truncated), None] {
            match damage {
                Some(bytes) => drop(run.raw.put(&path, bytes.into()).await.unwrap()),
                None => run.raw.delete(&path).await.unwrap(),
            }
            let checks = verify(&run.store, Some(2)).await.unwrap();
            let damaged: Vec<_> = checks.iter().filter(|o| !o.ok).collect();
            assert_eq!(damaged.len(), 1);
            assert_eq!(damaged[0].object, name);
            let loaded = load(&run.store, Resume::Auto).await.unwrap().unwrap();
            assert_eq!(loaded.info.step, 1);
            assert!(
                loaded.warnings[0].contains("step 2") && loaded.warnings[0].contains(&name),
                "{:?}",
                loaded.warnings
            );
            assert!(load(&run.store, Resume::Step(2)).await.is_err(), "a requested step has no alternatives");
        }
        run.raw.put(&path, original.into()).await.unwrap();
        assert_eq!(resumed_step(&run).await, 2);
    }
}

#[tokio::test]
async fn run_never_silently_starts_from_scratch() {
    let run = FaultyRun::in_memory();
    let mut c = run.claim(5).await;
    save(&mut c, 1).await.unwrap();
    run.inject(Fault::Unreadable, "step-1/", 1);
    assert!(matches!(load(&run.store, Resume::Auto).await, Err(Error::Read { .. })));
    assert_eq!(resumed_step(&run).await, 1);
    run.raw.delete(&Path::from("runs/a/checkpoints/step-1/term-1/shards/0-0.safetensors")).await.unwrap();
    let e = load(&run.store, Resume::Auto).await.unwrap_err().to_string();
    assert!(e.contains("shards/0-0.safetensors") && e.contains("never"), "{e}");
}

#[tokio::test]
async fn older_of_two_learners_is_fenced() {
    let run = FaultyRun::in_memory();
    let mut old = run.claim(2).await;
    save(&mut old, 1).await.unwrap();
    let (mut new, loaded) = run.resume(2, Resume::Auto).await;
    assert_eq!((new.term(), loaded.unwrap().info.step), (2, 1));
    let e = save(&mut old, 2).await.unwrap_err();
    assert_eq!(e, Error::Fenced { location: "mem://runs/a".into(), ours: 1, theirs: 2 });
    assert!(old.check_fence().await.is_err());
    assert!(e.to_string().contains("another learner"));
    save(&mut new, 2).await.unwrap();
    assert!(old.mark_best(1).await.is_err());
    assert_eq!(steps(&list(&run.store).await.unwrap()), [1, 2]);
    assert!(verify(&run.store, None).await.unwrap().iter().all(|o| o.ok));
}

#[tokio::test]
async fn learner_paused_during_a_save_cannot_commit_it() {
    let run = FaultyRun::in_memory();
    let mut old = run.claim(2).await;
    save(&mut old, 1).await.unwrap();
    // It has uploaded everything, and pauses right before its log entry.
    run.inject(Fault::ServerError, "log/", 1);
    let mut saving = Box::pin(save(&mut old, 2));
    let paused = tokio::time::timeout(Duration::from_millis(20), &mut saving).await;
    assert!(paused.is_err());
    let (mut new, _) = run.resume(2, Resume::Auto).await;
    save(&mut new, 2).await.unwrap();
    assert!(matches!(saving.await, Err(Error::Fenced { ours: 1, theirs: 2, .. })));
    let infos = list(&run.store).await.unwrap();
    assert_eq!(infos.iter().map(|c| (c.step, c.term)).collect::<Vec<_>>(), [(1, 1), (2, 2)]);
    assert!(verify(&run.store, None).await.unwrap().iter().all(|o| o.ok));
}

#[tokio::test]
async fn log_entry_reported_as_failed_is_not_repeated() {
    let run = FaultyRun::in_memory();
    run.inject(Fault::DoneButFailed, "log/", 1);
    let mut c = run.claim(5).await;
    assert_eq!(c.term(), 1);
    run.inject(Fault::DoneButFailed, "log/", 1);
    save(&mut c, 1).await.unwrap();
    run.inject(Fault::ServerError, "log/", 2);
    save(&mut c, 2).await.unwrap();
    let log = RunLog::read(&run.store).await.unwrap();
    assert_eq!(log.entries().iter().map(|e| e.seq).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(steps(&list(&run.store).await.unwrap()), [1, 2]);
}

#[tokio::test]
async fn concurrent_claims_get_different_terms() {
    let run = FaultyRun::in_memory();
    let claim = || Checkpoints::claim(run.store.clone(), retention(1));
    let all = futures::future::join_all((0..8).map(|_| claim())).await;
    let mut terms: Vec<u64> = all.iter().flatten().map(Checkpoints::term).collect();
    terms.sort_unstable();
    let n = terms.len();
    terms.dedup();
    assert!(n >= 1 && terms.len() == n, "{terms:?}");
    assert!(all.iter().all(|r| matches!(r, Ok(_) | Err(Error::Fenced { .. }))));
}

#[tokio::test]
async fn retention_keeps_the_newest_and_the_best() {
    let run = FaultyRun::in_memory();
    let mut c = run.claim(2).await;
    for step in 1..=6 {
        let best = step == 2;
        c.save(CheckpointHeader { best, ..header(step) }, objects(step)).await.unwrap();
    }
    assert_eq!(steps(&list(&run.store).await.unwrap()), [2, 5, 6]);
    assert_eq!(best(&run.store).await.unwrap().unwrap().step, 2);
    assert!(run.names("checkpoints").await.iter().all(|n| !n.contains("step-4/")));
    c.mark_best(6).await.unwrap();
    save(&mut c, 7).await.unwrap();
    assert_eq!(steps(&list(&run.store).await.unwrap()), [6, 7]);
    let pruned = prune(&run.store, Retention { keep_best: false, ..retention(1) }, true).await.unwrap();
    assert_eq!((steps(&pruned.removed), pruned.orphans), (vec![6], 0));
    save(&mut c, 8).await.unwrap();
    assert_eq!(steps(&c.list()), [7, 8], "a learner reads the entries that maintenance has written");
}

#[tokio::test]
async fn milestones_are_kept() {
    let run = FaultyRun::in_memory();
    let milestones = Retention { keep_every: 3, ..retention(1) };
    let mut c = Checkpoints::claim(run.store.clone(), milestones).await.unwrap();
    for step in 1..=8 {
        save(&mut c, step).await.unwrap();
    }
    assert_eq!(steps(&list(&run.store).await.unwrap()), [3, 6, 8]);
    assert!(verify(&run.store, None).await.unwrap().iter().all(|o| o.ok));
    // Checkpoints of an abandoned lineage are not milestones.
    let (c, _) = run.resume(1, Resume::Step(3)).await;
    drop(c);
    let mut c = Checkpoints::claim(run.store.clone(), milestones).await.unwrap();
    save(&mut c, 4).await.unwrap();
    assert_eq!(steps(&list(&run.store).await.unwrap()), [3, 4]);
}

#[tokio::test]
async fn resume_from_an_earlier_step_abandons_later_ones() {
    let run = FaultyRun::in_memory();
    let mut c = run.claim(9).await;
    for step in 1..=3 {
        save(&mut c, step).await.unwrap();
    }
    let (mut c, loaded) = run.resume(2, Resume::Step(1)).await;
    assert_eq!(loaded.unwrap().info.step, 1);
    assert_eq!(resumed_step(&run).await, 1, "the lineage now ends at step 1");
    save(&mut c, 2).await.unwrap();
    let infos = list(&run.store).await.unwrap();
    assert_eq!(infos.iter().map(|c| (c.step, c.term)).collect::<Vec<_>>(), [(1, 1), (2, 2)]);
    let (mut c, loaded) = run.resume(2, Resume::Never).await;
    assert!(loaded.is_none());
    assert!(load(&run.store, Resume::Auto).await.unwrap().is_none());
    save(&mut c, 1).await.unwrap();
    let loaded = load(&run.store, Resume::Auto).await.unwrap().unwrap();
    assert_eq!((loaded.info.step, loaded.info.term), (1, 3));
}

#[tokio::test]
async fn other_manifest_format_is_rejected() {
    let run = FaultyRun::in_memory();
    let mut c = run.claim(9).await;
    let info = save(&mut c, 1).await.unwrap();
    let path = Path::from("runs/a/checkpoints/step-1/term-1/manifest.json");
    let text = run.raw.get(&path).await.unwrap().bytes().await.unwrap();
    let old = String::from_utf8(text.to_vec()).unwrap().replace("\"format\": 2", "\"format\": 1");
    run.raw.put(&path, old.clone().into()).await.unwrap();
    // The log has the hash of the changed manifest, as in a run of that version.
    let log = Path::from(format!("runs/a/log/{:08}.json", info.seq));
    let text = run.raw.get(&log).await.unwrap().bytes().await.unwrap();
    let entry = String::from_utf8(text.to_vec()).unwrap();
    let hash = blake3::hash(old.as_bytes()).to_hex().to_string();
    run.raw.put(&log, entry.replace(&info.manifest_blake3, &hash).into()).await.unwrap();
    let e = load(&run.store, Resume::Auto).await.unwrap_err().to_string();
    assert!(e.contains("its format is 1, this version reads 2") && e.contains("export the run"), "{e}");
}

#[tokio::test]
async fn damaged_log_entry_is_named() {
    let run = FaultyRun::in_memory();
    let mut c = run.claim(9).await;
    save(&mut c, 1).await.unwrap();
    save(&mut c, 2).await.unwrap();
    let path = Path::from("runs/a/log/00000002.json");
    let original = run.raw.get(&path).await.unwrap().bytes().await.unwrap();
    run.raw.put(&path, "{\"seq\":2,".into()).await.unwrap();
    assert!(list(&run.store).await.unwrap_err().to_string().contains("log/00000002.json"));
    run.raw.delete(&path).await.unwrap();
    assert!(list(&run.store).await.unwrap_err().to_string().contains("log/00000002.json"));
    run.raw.put(&path, original.into()).await.unwrap();
    run.raw.put(&Path::from("runs/a/log/notes.txt"), "x".into()).await.unwrap();
    assert_eq!(steps(&list(&run.store).await.unwrap()), [1, 2]);
}

#[tokio::test]
async fn unsafe_object_names_are_rejected() {
    let run = FaultyRun::in_memory();
    let mut c = run.claim(1).await;
    for name in ["", "/x", "a//b", "../x", "a/../b", "a b", "manifest.json", "x#1", "é"] {
        let mut with_invalid = objects(1);
        with_invalid.push(Object { name: name.into(), bytes: "x".into(), layout: None });
        assert!(matches!(c.save(header(1), with_invalid).await, Err(Error::BadName { .. })), "{name}");
    }
    let mut with_invalid = objects(1);
    with_invalid.push(with_invalid[0].clone());
    assert!(matches!(c.save(header(1), with_invalid).await, Err(Error::BadName { .. })));
    assert!("auto".parse() == Ok(Resume::Auto) && "12".parse() == Ok(Resume::Step(12)));
    assert!("newest".parse::<Resume>().unwrap_err().to_string().contains("auto, never"));
}

#[tokio::test]
async fn store_without_conditional_writes_is_rejected_unchanged() {
    for (fault, word) in [
        (Fault::ConditionIgnored, "ignores the condition"),
        (Fault::ConditionRejected, "does not support conditional writes"),
        (Fault::ConditionUnimplemented, "does not support conditional writes"),
    ] {
        let run = FaultyRun::in_memory();
        run.inject(fault, "runs/a/", usize::MAX);
        let e = Checkpoints::claim(run.store.clone(), retention(1)).await.unwrap_err();
        let text = e.to_string();
        assert!(
            matches!(e, Error::NoConditionalWrites { .. }) && text.contains(word) && text.contains("mem://runs/a"),
            "{text}"
        );
        assert!(text.contains("If-None-Match") && !text.contains("<Code>"), "{text}");
        let objects: Vec<_> = run.raw.list(None).try_collect().await.unwrap();
        assert!(objects.is_empty(), "{objects:?}");
    }
    let run = FaultyRun::in_memory();
    run.inject(Fault::DoneButFailed, "probe", 1);
    Checkpoints::claim(run.store.clone(), retention(1)).await.unwrap_err();
    run.claim(1).await;
    let objects: Vec<_> = run.raw.list(Some(&"runs/a/probe".into())).try_collect().await.unwrap();
    assert!(objects.is_empty(), "{objects:?}");
}
