//! Local directories: opening, saving, exporting, and directories that cannot be used.

use crate::common::{header, load, objects, retention, save, value};
use unveil_checkpoint::{Access, Checkpoints, Error, Object, Resume, Store, export, list, verify};

const NO_OPTIONS: [(&str, &str); 0] = [];

#[tokio::test]
async fn path_and_file_url_open_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("a run");
    let path = run.to_str().unwrap();
    let e = Store::open(path, NO_OPTIONS, Access::Read).await.unwrap_err().to_string();
    assert!(e.contains(path) && e.contains("No such file"), "{e}");
    assert!(!run.exists(), "opening for reading creates nothing");
    let store = Store::open(path, NO_OPTIONS, Access::Write).await.unwrap();
    assert!(list(&store).await.unwrap().is_empty());
    let mut c = Checkpoints::claim(store, retention(1)).await.unwrap();
    save(&mut c, 1).await.unwrap();
    save(&mut c, 2).await.unwrap();
    assert!(run.join("checkpoints/step-2/term-1/shards/0-0.safetensors").is_file());
    assert!(run.join("checkpoints/step-2/term-1/manifest.json").is_file());
    assert!(!run.join("checkpoints/step-1").exists(), "empty folders are removed");
    assert!(run.join("log/00000001.json").is_file());
    let url = url::Url::from_directory_path(&run).unwrap();
    let again = Store::open(url.as_str(), NO_OPTIONS, Access::Read).await.unwrap();
    assert_eq!(load(&again, Resume::Auto).await.unwrap().unwrap().info.step, 2);
    assert!(verify(&again, None).await.unwrap().iter().all(|o| o.ok));

    let c = Checkpoints::claim(again.clone(), retention(1)).await.unwrap();
    assert_eq!(c.term(), 2);
    assert_eq!(c.resume_candidates(Resume::Auto).unwrap().next_candidate().unwrap().unwrap().step, 2);

    let out = dir.path().join("export/model");
    let files = export(&again, None, &out, "model", "model").await.unwrap();
    assert_eq!(files.len(), 3);
    let weights = std::fs::read(out.join("model.safetensors")).unwrap();
    let weights = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let w = weights.tensor("w").unwrap();
    assert_eq!((weights.len(), w.shape()), (1, &[30, 40][..]));
    assert_eq!(w.data()[4 * 41..4 * 42], value(2, "weight", 41).to_le_bytes());
    assert_eq!(std::fs::read(out.join("config.json")).unwrap(), b"{\"step\":2}");
    let e = export(&again, None, &out, "model", "model").await.unwrap_err().to_string();
    assert!(e.contains("not empty"), "{e}");
    assert!(export(&again, None, &dir.path().join("x"), "nothing", "x").await.is_err());
    let entries: Vec<_> = std::fs::read_dir(dir.path().join("export")).unwrap().collect();
    assert_eq!(entries.len(), 1, "partial directories are removed");
}

/// The store does not list files that a killed writer had staged; the next save removes them.
#[tokio::test]
async fn staged_files_are_removed_by_the_next_save() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().to_str().unwrap(), NO_OPTIONS, Access::Write).await.unwrap();
    let staged = dir.path().join("checkpoints/step-4/term-1/shards");
    std::fs::create_dir_all(&staged).unwrap();
    std::fs::write(staged.join("0-0.safetensors#1"), "half").unwrap();
    std::fs::create_dir_all(dir.path().join("checkpoints/step-5")).unwrap();
    let later = dir.path().join("checkpoints/step-9/term-7");
    std::fs::create_dir_all(&later).unwrap();
    let mut c = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    save(&mut c, 1).await.unwrap();
    assert!(!dir.path().join("checkpoints/step-4").exists(), "staged files remain");
    assert!(!dir.path().join("checkpoints/step-5").exists(), "an empty folder remains");
    assert!(later.exists(), "objects of a later term are untouched");
    assert!(dir.path().join("checkpoints/step-1/term-1/manifest.json").exists());
}

/// An object with several parts is saved, loaded and verified.
#[tokio::test]
async fn large_object_is_verified_part_by_part() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().to_str().unwrap(), NO_OPTIONS, Access::Write).await.unwrap();
    let mut c = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    let big: Vec<u8> = (0..(33 << 20) + 12345).map(|i: u32| (i >> 3) as u8 ^ (i >> 17) as u8).collect();
    let mut with_big = objects(1);
    with_big.push(Object { name: "big.bin".into(), bytes: big.clone().into(), layout: None });
    c.save(header(1), with_big).await.unwrap();
    let loaded = load(&store, Resume::Auto).await.unwrap().unwrap();
    assert!(loaded.files["big.bin"] == big);
    let details = unveil_checkpoint::show(&store, None).await.unwrap();
    let object = details.manifest.objects.iter().find(|o| o.name == "big.bin").unwrap();
    assert_eq!((object.blake3.clone(), object.parts.len()), (blake3::hash(&big).to_hex().to_string(), 3));
    // Flip one bit in the last part.
    let path = dir.path().join("checkpoints/step-1/term-1/big.bin");
    let mut bytes = big;
    *bytes.last_mut().unwrap() ^= 128;
    std::fs::write(&path, &bytes).unwrap();
    let damaged: Vec<_> = verify(&store, None).await.unwrap().into_iter().filter(|o| !o.ok).collect();
    assert!(damaged.len() == 1 && damaged[0].object.ends_with("big.bin"), "{damaged:?}");
}

#[tokio::test]
async fn unusable_locations_are_named_with_the_cause() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let inside_file = file.join("run");
    // Not even root can create directories in /proc.
    for target in [inside_file.to_str().unwrap(), "/proc/unveil-run"] {
        let e = Store::open(target, NO_OPTIONS, Access::Write).await.unwrap_err();
        assert!(matches!(e, Error::Open { .. }));
        assert!(e.to_string().contains(target) && e.to_string().contains("os error"), "{e}");
    }
    for (target, why) in [
        ("", "empty"),
        ("gopher://x/y", "recognise"),
        ("https://example.com/x", "s3://, gs://, az://"),
        ("s3://user:secret@bucket/x", "credentials"),
    ] {
        let e = Store::open(target, NO_OPTIONS, Access::Write).await.unwrap_err().to_string();
        assert!(e.contains(why) && !e.contains("secret"), "{e}");
    }
}

#[tokio::test]
async fn unwritable_folder_fails_the_save_only() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().to_str().unwrap(), NO_OPTIONS, Access::Write).await.unwrap();
    let mut c = Checkpoints::claim(store.clone(), retention(1)).await.unwrap();
    save(&mut c, 1).await.unwrap();
    // A plain file instead of the next step's folder fails for root too.
    std::fs::write(dir.path().join("checkpoints/step-2"), "in the way").unwrap();
    let e = save(&mut c, 2).await.unwrap_err();
    assert!(matches!(e, Error::Write { .. }), "{e}");
    assert!(e.to_string().contains("checkpoints/step-2/term-1/") && e.to_string().contains("os error"), "{e}");
    assert_eq!(load(&store, Resume::Auto).await.unwrap().unwrap().info.step, 1);
    save(&mut c, 3).await.unwrap();
    assert_eq!(load(&store, Resume::Auto).await.unwrap().unwrap().info.step, 3);
}
