//! Multipart uploads: failed parts are retried alone, the next learner aborts the uploads of a dead one, and several writers create one
//! checkpoint that any number of readers loads in ranges.

use std::collections::BTreeMap;
use std::sync::Arc;

use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use unveil_checkpoint::{
    Access, Checkpoints, Error, Object, ReadRequest, Reader, Store, TensorSlice, WriteReport, WriteTask, verify, write,
};

use crate::common::{COUNT, FaultyMultipart, header, objects, retention, shards, tensor_slices, value};

const PART_BYTES: usize = 16 << 20;

fn store() -> (Store, Arc<InMemory>, Arc<FaultyMultipart>) {
    let inner = Arc::new(InMemory::new());
    let multipart = Arc::new(FaultyMultipart {
        inner: inner.clone(),
        failing: Default::default(),
        sent: Default::default(),
        open: Default::default(),
    });
    let store = Store::from_object_store(inner.clone(), "runs/a", "mem://runs/a").unwrap();
    (store.with_multipart(multipart.clone()), inner, multipart)
}

fn large_object(name: &str, size: usize) -> Object {
    let bytes: Vec<u8> = (0..size).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect();
    Object { name: name.into(), bytes: bytes.into(), layout: None }
}

#[tokio::test]
async fn failed_part_is_retried_alone() {
    let (store, inner, multipart) = store();
    let mut c = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    multipart.failing.lock().unwrap().insert(1, 2);
    let mut with_large = objects(1);
    with_large.push(large_object("big.bin", 3 * PART_BYTES + 5));
    c.save(header(1), with_large).await.unwrap();
    let sent = multipart.sent.lock().unwrap().clone();
    assert_eq!(sent.values().copied().collect::<Vec<_>>(), [1, 3, 1, 1]);
    assert!(sent.keys().all(|(name, _)| name.ends_with("big.bin")), "small objects are uploaded whole");
    assert!(verify(&store, None).await.unwrap().iter().all(|o| o.ok));
    assert!(multipart.open.lock().unwrap().is_empty());
    let record = Path::from("runs/a/uploads/step-1-term-1-rank-0.json");
    assert!(inner.get(&record).await.is_err(), "the record is deleted after the upload");
    // A part that always fails ends the save, and the upload is aborted.
    multipart.failing.lock().unwrap().insert(2, 100);
    let e = c.save(header(2), vec![large_object("big.bin", 3 * PART_BYTES)]).await.unwrap_err();
    assert!(matches!(&e, Error::Write { cause, .. } if cause.contains("part 2") && cause.contains("closed")), "{e}");
    assert!(multipart.open.lock().unwrap().is_empty());
    assert!(inner.get(&record).await.is_err());
}

#[tokio::test]
async fn uploads_of_a_dead_learner_are_aborted() {
    let (store, inner, multipart) = store();
    let old = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    multipart.failing.lock().unwrap().insert(0, 1000);
    let objects = vec![large_object("big.bin", PART_BYTES + 1)];
    let task = WriteTask { step: 3, term: old.term(), rank: 2, objects };
    // The learner dies while it retries the first part.
    let interrupted = tokio::time::timeout(std::time::Duration::from_millis(120), write(&store, task)).await;
    assert!(interrupted.is_err());
    let open = multipart.open.lock().unwrap().clone();
    assert_eq!(open.len(), 1);
    let record = Path::from("runs/a/uploads/step-3-term-1-rank-2.json");
    let text = inner.get(&record).await.unwrap().bytes().await.unwrap();
    let text = String::from_utf8(text.to_vec()).unwrap();
    assert!(text.contains("checkpoints/step-3/term-1/big.bin") && text.contains(&open[0]), "{text}");
    let new = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    assert_eq!(new.term(), 2);
    assert!(multipart.open.lock().unwrap().is_empty(), "the upload stays open");
    assert!(inner.get(&record).await.is_err());
}

/// Three writers save; then different numbers of readers each read their own range of both kinds.
#[tokio::test]
async fn readers_may_differ_in_number_from_writers() {
    let (store, ..) = store();
    let mut c = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    let values = |s: &TensorSlice| (s.begin..s.begin + s.count).map(|i| value(4, &s.kind, i)).collect();
    let slices_of = |rank: u64| {
        let begin = rank * COUNT / 3;
        let count = COUNT / 3;
        tensor_slices(&[("weight", begin, count), ("exp_avg", begin, count)])
    };
    let mut reports = Vec::new();
    for rank in 0..3 {
        let objects = shards(rank, slices_of(rank as u64), 1000, values);
        assert!(objects.len() >= 4);
        reports.push(write(&store, WriteTask { step: 4, term: c.term(), rank, objects }).await.unwrap());
    }
    // Reports are sent as JSON.
    let text = serde_json::to_string(&reports).unwrap();
    assert_eq!(serde_json::from_str::<Vec<WriteReport>>(&text).unwrap(), reports);
    let e = c.commit(header(4), reports[..2].to_vec()).await.unwrap_err();
    assert!(matches!(e, Error::IncompleteTensors { step: 4, .. }), "{e}");
    for rank in 0..3 {
        let objects = shards(rank, slices_of(rank as u64), 1000, values);
        write(&store, WriteTask { step: 4, term: 1, rank, objects }).await.unwrap();
    }
    let info = c.commit(header(4), reports).await.unwrap();
    let reader = Reader::open(&store, &info).await.unwrap();
    for readers in [1u64, 2, 4, 5] {
        for r in 0..readers {
            let begin = COUNT * r / readers;
            let end = COUNT * (r + 1) / readers;
            let bytes = ((end - begin) * 4) as usize;
            let request = |kind: &str, destination: usize| ReadRequest {
                kind: kind.into(),
                name: "w".into(),
                begin,
                count: end - begin,
                destination,
            };
            let mut buffer = vec![0; 2 * bytes];
            reader.read(&[request("weight", bytes), request("exp_avg", 0)], &mut buffer).await.unwrap();
            let actual: Vec<f32> = buffer.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let expected: Vec<f32> =
                ["exp_avg", "weight"].iter().flat_map(|k| (begin..end).map(|i| value(4, k, i))).collect();
            assert_eq!(actual, expected, "{r} of {readers}");
        }
    }
    let request =
        |kind: &str, count| ReadRequest { kind: kind.into(), name: "w".into(), begin: 0, count, destination: 0 };
    let mut buffer = vec![0; 4 * COUNT as usize];
    for (invalid, why) in
        [(request("exp_avg_sq", 1), "there is no such tensor"), (request("weight", COUNT + 1), "[30, 40]")]
    {
        let e = reader.read(&[invalid], &mut buffer).await.unwrap_err();
        assert!(matches!(e, Error::NoSuchTensor { .. }) && e.to_string().contains(why), "{e}");
    }
}

/// Objects that a rank has written to another store must not be committed.
#[tokio::test]
async fn objects_in_another_store_are_not_committed() {
    let (store, ..) = store();
    let (other, ..) = self::store();
    let mut c = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    let report = write(&other, WriteTask { step: 1, term: 1, rank: 0, objects: objects(1) }).await.unwrap();
    let e = c.commit(header(1), vec![report]).await.unwrap_err();
    assert!(matches!(&e, Error::ObjectMismatch { found: None, .. }) && e.to_string().contains("checkpoint.url"), "{e}");
}

#[tokio::test]
async fn all_url_schemes_open_with_environment_credentials() {
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
        assert_eq!(store.location(), url);
        assert!(!format!("{store:?}").contains(secret));
    }
    // The address of a container depends on the account.
    let no_options: BTreeMap<String, String> = BTreeMap::new();
    let e = Store::open("az://container/x", no_options, Access::Write).await.unwrap_err();
    assert!(matches!(e, Error::Open { .. }) && e.to_string().contains("az://container/x"), "{e}");
}
