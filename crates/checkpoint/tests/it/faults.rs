//! Saves that fail, are cut off or race; damage; fencing. The newest committed checkpoint must always be there.

use std::time::Duration;

use crate::world::{COUNT, Fault, World, load, objects, retention, save, snapshot, value};
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use unveil_checkpoint::{Checkpoints, Error, Object, Resume, Retention, RunLog, best, list, prune, show, verify};

fn steps(infos: &[unveil_checkpoint::CheckpointInfo]) -> Vec<u64> {
    infos.iter().map(|c| c.step).collect()
}

async fn auto(w: &World) -> u64 {
    load(&w.store, Resume::Auto).await.unwrap().unwrap().info.step
}

#[tokio::test]
async fn saves_load_back_whole() {
    let w = World::memory();
    assert!(load(&w.store, Resume::Auto).await.unwrap().is_none());
    let mut c = w.claim(2).await;
    assert!(c.choice(Resume::Auto).unwrap().take().unwrap().is_none());
    let info = save(&mut c, 1).await.unwrap();
    assert_eq!((info.step, info.term, info.objects), (1, 1, 4));
    save(&mut c, 2).await.unwrap();
    let got = load(&w.store, Resume::Auto).await.unwrap().unwrap();
    assert_eq!(got.meta["step"], 2);
    assert!(got.warnings.is_empty());
    for o in objects(2).iter().filter(|o| o.layout.is_none()) {
        assert_eq!(got.files[&o.name], o.bytes);
    }
    for kind in ["weight", "exp_avg"] {
        assert_eq!(got.tensors[kind], (0..COUNT).map(|i| value(2, kind, i)).collect::<Vec<_>>());
    }
    assert_eq!(load(&w.store, Resume::Step(1)).await.unwrap().unwrap().meta["step"], 1);
    let e = load(&w.store, Resume::Step(7)).await.unwrap_err().to_string();
    assert!(e.contains("step 7") && e.contains("1, 2"), "{e}");
    assert!(load(&w.store, Resume::Never).await.unwrap().is_none());
    assert!(matches!(save(&mut c, 2).await, Err(Error::StepTaken { step: 2, .. })));
    assert_eq!(show(&w.store, None).await.unwrap().manifest.objects.len(), 4);
}

#[tokio::test]
async fn a_full_disk_names_the_object_and_leaves_the_previous_checkpoint() {
    let w = World::memory();
    let mut c = w.claim(1).await;
    save(&mut c, 1).await.unwrap();
    for place in ["shards/0-1", "manifest.json"] {
        w.fault(Fault::Full, place, 1);
        let e = save(&mut c, 2).await.unwrap_err().to_string();
        assert!(e.contains(&format!("checkpoints/step-2/term-1/{place}")), "{e}");
        assert!(e.contains("No space left on device") && e.contains("mem://runs/a"), "{e}");
        assert_eq!(auto(&w).await, 1);
        assert!(verify(&w.store, None).await.unwrap().iter().all(|o| o.ok));
        assert!(w.names("checkpoints/step-2").await.is_empty(), "the space of the failed save is given back");
    }
    w.fault(Fault::Full, "log/", 100);
    let e = save(&mut c, 2).await.unwrap_err().to_string();
    assert!(e.contains("run log") && e.contains("No space left"), "{e}");
    assert_eq!(auto(&w).await, 1);
    w.plan.lock().unwrap().clear();
    save(&mut c, 2).await.unwrap();
    assert_eq!(auto(&w).await, 2);
}

#[tokio::test]
async fn a_save_cut_off_anywhere_leaves_the_previous_one_and_its_rest_is_swept() {
    for place in ["config.json", "shards/0-1", "manifest.json", "log/"] {
        let w = World::memory();
        let mut c = w.claim(3).await;
        save(&mut c, 1).await.unwrap();
        w.fault(Fault::Hang, place, 1);
        let cut = tokio::time::timeout(Duration::from_millis(50), save(&mut c, 2)).await;
        assert!(cut.is_err(), "the save must be cut off at {place}");
        drop(c);
        assert_eq!(auto(&w).await, 1);
        assert!(!w.names("checkpoints/step-2").await.is_empty() || place == "config.json");

        let (mut c, loaded) = w.resume(3, Resume::Auto).await;
        assert_eq!(loaded.unwrap().info.step, 1);
        save(&mut c, 3).await.unwrap();
        assert!(w.names("checkpoints/step-2").await.is_empty(), "left-over objects stay after {place}");
        assert!(verify(&w.store, None).await.unwrap().iter().all(|o| o.ok));
    }
}

#[tokio::test]
async fn damage_to_any_one_object_is_found_and_passed_over() {
    let w = World::memory();
    let mut c = w.claim(5).await;
    save(&mut c, 1).await.unwrap();
    save(&mut c, 2).await.unwrap();
    for name in w.names("checkpoints/step-2").await {
        let path = Path::from(format!("runs/a/{name}"));
        let good = w.raw.get(&path).await.unwrap().bytes().await.unwrap();
        let mut flipped = good.to_vec();
        flipped[good.len() / 2] ^= 1;
        let cut = good[..good.len() - 1].to_vec();
        for bad in [Some(flipped), Some(cut), None] {
            match bad {
                Some(bytes) => drop(w.raw.put(&path, bytes.into()).await.unwrap()),
                None => w.raw.delete(&path).await.unwrap(),
            }
            let checks = verify(&w.store, Some(2)).await.unwrap();
            let wrong: Vec<_> = checks.iter().filter(|o| !o.ok).collect();
            assert_eq!(wrong.len(), 1);
            assert_eq!(wrong[0].object, name);
            let got = load(&w.store, Resume::Auto).await.unwrap().unwrap();
            assert_eq!(got.info.step, 1);
            assert!(got.warnings[0].contains("step 2") && got.warnings[0].contains(&name), "{:?}", got.warnings);
            assert!(load(&w.store, Resume::Step(2)).await.is_err(), "an asked-for step is that step or an error");
        }
        w.raw.put(&path, good.into()).await.unwrap();
        assert_eq!(auto(&w).await, 2);
    }
}

#[tokio::test]
async fn a_run_is_never_silently_started_afresh() {
    let w = World::memory();
    let mut c = w.claim(5).await;
    save(&mut c, 1).await.unwrap();
    w.fault(Fault::Unreadable, "step-1/", 1);
    assert!(matches!(load(&w.store, Resume::Auto).await, Err(Error::Read { .. })));
    assert_eq!(auto(&w).await, 1);
    w.raw.delete(&Path::from("runs/a/checkpoints/step-1/term-1/shards/0-0.safetensors")).await.unwrap();
    let e = load(&w.store, Resume::Auto).await.unwrap_err().to_string();
    assert!(e.contains("shards/0-0.safetensors") && e.contains("never"), "{e}");
}

#[tokio::test]
async fn of_two_learners_the_older_is_fenced_and_nothing_is_mixed() {
    let w = World::memory();
    let mut old = w.claim(2).await;
    save(&mut old, 1).await.unwrap();
    let (mut new, loaded) = w.resume(2, Resume::Auto).await;
    assert_eq!((new.term(), loaded.unwrap().info.step), (2, 1));
    let e = save(&mut old, 2).await.unwrap_err();
    assert_eq!(e, Error::Fenced { place: "mem://runs/a".into(), ours: 1, theirs: 2 });
    assert!(old.check_fence().await.is_err());
    assert!(e.to_string().contains("another learner"));
    save(&mut new, 2).await.unwrap();
    assert!(old.mark_best(1).await.is_err());
    assert_eq!(steps(&list(&w.store).await.unwrap()), [1, 2]);
    assert!(verify(&w.store, None).await.unwrap().iter().all(|o| o.ok));
}

#[tokio::test]
async fn a_learner_paused_in_the_middle_of_a_save_cannot_commit_it() {
    let w = World::memory();
    let mut old = w.claim(2).await;
    save(&mut old, 1).await.unwrap();
    // it has uploaded everything and stops right before its log entry
    w.fault(Fault::ServerError, "log/", 1);
    let mut saving = Box::pin(save(&mut old, 2));
    let paused = tokio::time::timeout(Duration::from_millis(20), &mut saving).await;
    assert!(paused.is_err());
    let (mut new, _) = w.resume(2, Resume::Auto).await;
    save(&mut new, 2).await.unwrap();
    assert!(matches!(saving.await, Err(Error::Fenced { ours: 1, theirs: 2, .. })));
    let infos = list(&w.store).await.unwrap();
    assert_eq!(infos.iter().map(|c| (c.step, c.term)).collect::<Vec<_>>(), [(1, 1), (2, 2)]);
    assert!(verify(&w.store, None).await.unwrap().iter().all(|o| o.ok));
}

#[tokio::test]
async fn a_log_entry_that_was_written_but_reported_lost_counts_once() {
    let w = World::memory();
    w.fault(Fault::DoneButFailed, "log/", 1);
    let mut c = w.claim(5).await;
    assert_eq!(c.term(), 1);
    w.fault(Fault::DoneButFailed, "log/", 1);
    save(&mut c, 1).await.unwrap();
    w.fault(Fault::ServerError, "log/", 2);
    save(&mut c, 2).await.unwrap();
    let log = RunLog::read(&w.store).await.unwrap();
    assert_eq!(log.entries().iter().map(|e| e.seq).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(steps(&list(&w.store).await.unwrap()), [1, 2]);
}

#[tokio::test]
async fn claims_at_the_same_moment_give_different_terms() {
    let w = World::memory();
    let claim = || Checkpoints::claim(w.store.clone(), retention(1));
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
    let w = World::memory();
    let mut c = w.claim(2).await;
    for step in 1..=6 {
        let best = step == 2;
        c.save(unveil_checkpoint::Snapshot { best, ..snapshot(step) }, objects(step)).await.unwrap();
    }
    assert_eq!(steps(&list(&w.store).await.unwrap()), [2, 5, 6]);
    assert_eq!(best(&w.store).await.unwrap().unwrap().step, 2);
    assert!(w.names("checkpoints").await.iter().all(|n| !n.contains("step-4/")));
    c.mark_best(6).await.unwrap();
    save(&mut c, 7).await.unwrap();
    assert_eq!(steps(&list(&w.store).await.unwrap()), [6, 7]);
    let gone = prune(&w.store, Retention { keep_best: false, ..retention(1) }, true).await.unwrap();
    assert_eq!((steps(&gone.removed), gone.orphans), (vec![6], 0));
    save(&mut c, 8).await.unwrap();
    assert_eq!(steps(&c.list()), [7, 8], "a learner takes in what maintenance wrote");
}

#[tokio::test]
async fn milestones_stay() {
    let w = World::memory();
    let milestones = Retention { keep_every: 3, ..retention(1) };
    let mut c = Checkpoints::claim(w.store.clone(), milestones).await.unwrap();
    for step in 1..=8 {
        save(&mut c, step).await.unwrap();
    }
    assert_eq!(steps(&list(&w.store).await.unwrap()), [3, 6, 8]);
    assert!(verify(&w.store, None).await.unwrap().iter().all(|o| o.ok));
    // Those of a lineage that was left are none.
    let (c, _) = w.resume(1, Resume::Step(3)).await;
    drop(c);
    let mut c = Checkpoints::claim(w.store.clone(), milestones).await.unwrap();
    save(&mut c, 4).await.unwrap();
    assert_eq!(steps(&list(&w.store).await.unwrap()), [3, 4]);
}

#[tokio::test]
async fn resuming_from_an_earlier_step_leaves_later_ones_aside() {
    let w = World::memory();
    let mut c = w.claim(9).await;
    for step in 1..=3 {
        save(&mut c, step).await.unwrap();
    }
    let (mut c, loaded) = w.resume(2, Resume::Step(1)).await;
    assert_eq!(loaded.unwrap().info.step, 1);
    assert_eq!(auto(&w).await, 1, "the lineage now ends at step 1");
    save(&mut c, 2).await.unwrap();
    let infos = list(&w.store).await.unwrap();
    assert_eq!(infos.iter().map(|c| (c.step, c.term)).collect::<Vec<_>>(), [(1, 1), (2, 2)]);
    let (mut c, loaded) = w.resume(2, Resume::Never).await;
    assert!(loaded.is_none());
    assert!(load(&w.store, Resume::Auto).await.unwrap().is_none());
    save(&mut c, 1).await.unwrap();
    let got = load(&w.store, Resume::Auto).await.unwrap().unwrap();
    assert_eq!((got.info.step, got.info.term), (1, 3));
}

#[tokio::test]
async fn another_format_is_refused_and_says_so() {
    let w = World::memory();
    let mut c = w.claim(9).await;
    let info = save(&mut c, 1).await.unwrap();
    let path = Path::from("runs/a/checkpoints/step-1/term-1/manifest.json");
    let text = w.raw.get(&path).await.unwrap().bytes().await.unwrap();
    let old = String::from_utf8(text.to_vec()).unwrap().replace("\"format\": 2", "\"format\": 1");
    w.raw.put(&path, old.clone().into()).await.unwrap();
    // Its hash is the one in the log, as in a run of that time.
    let log = Path::from(format!("runs/a/log/{:08}.json", info.seq));
    let text = w.raw.get(&log).await.unwrap().bytes().await.unwrap();
    let entry = String::from_utf8(text.to_vec()).unwrap();
    let hash = blake3::hash(old.as_bytes()).to_hex().to_string();
    w.raw.put(&log, entry.replace(&info.manifest_blake3, &hash).into()).await.unwrap();
    let e = load(&w.store, Resume::Auto).await.unwrap_err().to_string();
    assert!(e.contains("its format is 1, this version reads 2") && e.contains("export that run"), "{e}");
}

#[tokio::test]
async fn a_damaged_log_is_an_error_that_names_the_entry() {
    let w = World::memory();
    let mut c = w.claim(9).await;
    save(&mut c, 1).await.unwrap();
    save(&mut c, 2).await.unwrap();
    let path = Path::from("runs/a/log/00000002.json");
    let good = w.raw.get(&path).await.unwrap().bytes().await.unwrap();
    w.raw.put(&path, "{\"seq\":2,".into()).await.unwrap();
    assert!(list(&w.store).await.unwrap_err().to_string().contains("log/00000002.json"));
    w.raw.delete(&path).await.unwrap();
    assert!(list(&w.store).await.unwrap_err().to_string().contains("log/00000002.json"));
    w.raw.put(&path, good.into()).await.unwrap();
    w.raw.put(&Path::from("runs/a/log/notes.txt"), "x".into()).await.unwrap();
    assert_eq!(steps(&list(&w.store).await.unwrap()), [1, 2]);
}

#[tokio::test]
async fn names_that_could_lead_elsewhere_are_refused() {
    let w = World::memory();
    let mut c = w.claim(1).await;
    for name in ["", "/x", "a//b", "../x", "a/../b", "a b", "manifest.json", "x#1", "é"] {
        let mut all = objects(1);
        all.push(Object { name: name.into(), bytes: "x".into(), layout: None });
        assert!(matches!(c.save(snapshot(1), all).await, Err(Error::BadName { .. })), "{name}");
    }
    let mut all = objects(1);
    all.push(all[0].clone());
    assert!(matches!(c.save(snapshot(1), all).await, Err(Error::BadName { .. })));
    assert!("auto".parse() == Ok(Resume::Auto) && "12".parse() == Ok(Resume::Step(12)));
    assert!("newest".parse::<Resume>().unwrap_err().to_string().contains("auto, never"));
}

#[tokio::test]
async fn a_store_that_knows_no_conditional_writes_is_refused_before_anything_is_written() {
    for (fault, word) in [
        (Fault::Unconditional, "writes over it"),
        (Fault::NoConditions, "does not know the condition"),
        (Fault::NoneBuilt, "does not know the condition"),
    ] {
        let w = World::memory();
        w.fault(fault, "runs/a/", usize::MAX);
        let e = Checkpoints::claim(w.store.clone(), retention(1)).await.unwrap_err();
        let said = e.to_string();
        assert!(
            matches!(e, Error::NoCondition { .. }) && said.contains(word) && said.contains("mem://runs/a"),
            "{said}"
        );
        assert!(said.contains("If-None-Match") && !said.contains("<Code>"), "{said}");
        let left: Vec<_> = w.raw.list(None).try_collect().await.unwrap();
        assert!(left.is_empty(), "{left:?}");
    }
    let w = World::memory();
    w.fault(Fault::DoneButFailed, "probe", 1);
    Checkpoints::claim(w.store.clone(), retention(1)).await.unwrap_err();
    w.claim(1).await;
    let left: Vec<_> = w.raw.list(Some(&"runs/a/probe".into())).try_collect().await.unwrap();
    assert!(left.is_empty(), "{left:?}");
}
