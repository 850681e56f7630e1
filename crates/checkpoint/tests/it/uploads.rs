//! Uploads in parts: what fails goes again alone, what a dead learner left is ended by the next one, and several writers make one
//! checkpoint that any number of readers takes in ranges of its own.

use std::collections::BTreeMap;
use std::sync::Arc;

use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use unveil_checkpoint::{Access, Checkpoints, Error, Object, Reader, Store, Task, Want, verify, write};

use crate::world::{COUNT, FaultyParts, objects, pieces, retention, shards, snapshot, value};

const PART: usize = 16 << 20;

fn store() -> (Store, Arc<InMemory>, Arc<FaultyParts>) {
    let inner = Arc::new(InMemory::new());
    let parts = Arc::new(FaultyParts {
        inner: inner.clone(),
        failing: Default::default(),
        sent: Default::default(),
        open: Default::default(),
    });
    let store = Store::from_object_store(inner.clone(), "runs/a", "mem://runs/a").unwrap();
    (store.with_multipart(parts.clone()), inner, parts)
}

fn large(name: &str, size: usize) -> Object {
    let bytes: Vec<u8> = (0..size).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect();
    Object { name: name.into(), bytes: bytes.into(), layout: None }
}

#[tokio::test]
async fn a_part_that_fails_goes_again_alone() {
    let (store, inner, parts) = store();
    let mut c = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    parts.failing.lock().unwrap().insert(1, 2);
    let mut all = objects(1);
    all.push(large("big.bin", 3 * PART + 5));
    c.save(snapshot(1), all).await.unwrap();
    let sent = parts.sent.lock().unwrap().clone();
    assert_eq!(sent.values().copied().collect::<Vec<_>>(), [1, 3, 1, 1]);
    assert!(sent.keys().all(|(name, _)| name.ends_with("big.bin")), "small objects go as one");
    assert!(verify(&store, None).await.unwrap().iter().all(|o| o.ok));
    assert!(parts.open.lock().unwrap().is_empty());
    let left = Path::from("runs/a/uploads/step-1-term-1-rank-0.json");
    assert!(inner.get(&left).await.is_err(), "the list of ids goes when all is whole");
    // A part that is never taken ends the save; nothing stays open.
    parts.failing.lock().unwrap().insert(2, 100);
    let e = c.save(snapshot(2), vec![large("big.bin", 3 * PART)]).await.unwrap_err();
    assert!(matches!(&e, Error::Write { cause, .. } if cause.contains("part 2") && cause.contains("closed")), "{e}");
    assert!(parts.open.lock().unwrap().is_empty());
    assert!(inner.get(&left).await.is_err());
}

#[tokio::test]
async fn uploads_of_a_dead_learner_are_ended() {
    let (store, inner, parts) = store();
    let old = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    parts.failing.lock().unwrap().insert(0, 1000);
    let task = Task { step: 3, term: old.term(), rank: 2, objects: vec![large("big.bin", PART + 1)] };
    // It dies while the first part is tried again.
    let cut = tokio::time::timeout(std::time::Duration::from_millis(120), write(&store, task)).await;
    assert!(cut.is_err());
    let begun = parts.open.lock().unwrap().clone();
    assert_eq!(begun.len(), 1);
    let record = Path::from("runs/a/uploads/step-3-term-1-rank-2.json");
    let text = inner.get(&record).await.unwrap().bytes().await.unwrap();
    let text = String::from_utf8(text.to_vec()).unwrap();
    assert!(text.contains("checkpoints/step-3/term-1/big.bin") && text.contains(&begun[0]), "{text}");
    let new = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    assert_eq!(new.term(), 2);
    assert!(parts.open.lock().unwrap().is_empty(), "the upload stays open");
    assert!(inner.get(&record).await.is_err());
}

/// Three writers; then readers of other numbers, each of which reads its own range of both kinds.
#[tokio::test]
async fn many_writers_and_other_readers() {
    let (store, ..) = store();
    let mut c = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    let numbers = |p: &unveil_checkpoint::Piece| (p.begin..p.begin + p.count).map(|i| value(4, &p.kind, i)).collect();
    let own = |rank: u64| {
        let (begin, count) = (rank * COUNT / 3, COUNT / 3);
        pieces(&[("weight", begin, count), ("exp_avg", begin, count)])
    };
    let mut reports = Vec::new();
    for rank in 0..3 {
        let objects = shards(rank, own(rank as u64), 1000, numbers);
        assert!(objects.len() >= 4);
        reports.push(write(&store, Task { step: 4, term: c.term(), rank, objects }).await.unwrap());
    }
    // Reports travel as text.
    let text = serde_json::to_string(&reports).unwrap();
    assert_eq!(serde_json::from_str::<Vec<unveil_checkpoint::Report>>(&text).unwrap(), reports);
    let e = c.commit(snapshot(4), reports[..2].to_vec()).await.unwrap_err();
    assert!(matches!(e, Error::Parts { step: 4, .. }), "{e}");
    for rank in 0..3 {
        write(&store, Task { step: 4, term: 1, rank, objects: shards(rank, own(rank as u64), 1000, numbers) })
            .await
            .unwrap();
    }
    let info = c.commit(snapshot(4), reports).await.unwrap();
    let reader = Reader::open(&store, &info).await.unwrap();
    for readers in [1u64, 2, 4, 5] {
        for r in 0..readers {
            let (begin, end) = (COUNT * r / readers, COUNT * (r + 1) / readers);
            let bytes = ((end - begin) * 4) as usize;
            let want =
                |kind: &str, to: usize| Want { kind: kind.into(), name: "w".into(), begin, count: end - begin, to };
            let mut to = vec![0; 2 * bytes];
            reader.read(&[want("weight", bytes), want("exp_avg", 0)], &mut to).await.unwrap();
            let found: Vec<f32> = to.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let wanted: Vec<f32> =
                ["exp_avg", "weight"].iter().flat_map(|k| (begin..end).map(|i| value(4, k, i))).collect();
            assert_eq!(found, wanted, "{r} of {readers}");
        }
    }
    let want = |kind: &str, count| Want { kind: kind.into(), name: "w".into(), begin: 0, count, to: 0 };
    let mut to = vec![0; 4 * COUNT as usize];
    for (bad, why) in [(want("exp_avg_sq", 1), "not there"), (want("weight", COUNT + 1), "[30, 40]")] {
        let e = reader.read(&[bad], &mut to).await.unwrap_err();
        assert!(matches!(e, Error::NoTensor { .. }) && e.to_string().contains(why), "{e}");
    }
}

/// A rank that writes to a place of its own must not be taken for one that wrote to ours.
#[tokio::test]
async fn what_another_place_holds_is_not_committed() {
    let (store, ..) = store();
    let (other, ..) = self::store();
    let mut c = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    let report = write(&other, Task { step: 1, term: 1, rank: 0, objects: objects(1) }).await.unwrap();
    let e = c.commit(snapshot(1), vec![report]).await.unwrap_err();
    assert!(matches!(&e, Error::Lost { found: None, .. }) && e.to_string().contains("checkpoint.url"), "{e}");
}

#[tokio::test]
async fn every_kind_of_url_opens_with_credentials_of_the_environment() {
    let secret = "c2VjcmV0";
    let env = [
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", secret),
        ("AWS_REGION", "us-east-1"),
        ("AZURE_STORAGE_ACCOUNT_NAME", "account"),
        ("AZURE_STORAGE_ACCOUNT_KEY", secret),
        ("GOOGLE_SKIP_SIGNATURE", "true"),
        ("PATH", "/bin"),
    ];
    for url in ["s3://bucket/runs/a", "gs://bucket/runs/a", "az://container/runs/a"] {
        let store = Store::open(url, env, Access::Write).await.unwrap();
        assert_eq!(store.place(), url);
        assert!(!format!("{store:?}").contains(secret));
    }
    // An account is needed to know where a container is.
    let none: BTreeMap<String, String> = BTreeMap::new();
    let e = Store::open("az://container/x", none, Access::Write).await.unwrap_err();
    assert!(matches!(e, Error::Open { .. }) && e.to_string().contains("az://container/x"), "{e}");
}
