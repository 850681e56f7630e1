//! Local directories: opening, saving, exporting, and directories that cannot be used.

use crate::world::snapshot;
use unveil_checkpoint::{Access, Checkpoints, Error, Resume, Retention, Store, export, list, load, verify};

const NONE: [(&str, &str); 0] = [];

#[tokio::test]
async fn a_path_and_its_file_url_are_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("a run");
    let path = run.to_str().unwrap();
    let e = Store::open(path, NONE, Access::Read).await.unwrap_err().to_string();
    assert!(e.contains(path) && e.contains("No such file"), "{e}");
    assert!(!run.exists(), "reading creates nothing");
    let store = Store::open(path, NONE, Access::Write).await.unwrap();
    assert!(list(&store).await.unwrap().is_empty());
    let mut c = Checkpoints::claim(store, Retention { keep: 1, keep_best: true }).await.unwrap();
    c.save(snapshot(1)).await.unwrap();
    c.save(snapshot(2)).await.unwrap();
    assert!(run.join("checkpoints/step-2/term-1/model/model.safetensors").is_file());
    assert!(run.join("checkpoints/step-2/term-1/manifest.json").is_file());
    assert!(!run.join("checkpoints/step-1").exists(), "no empty folders stay");
    assert!(run.join("log/00000001.json").is_file());
    let url = url::Url::from_directory_path(&run).unwrap();
    let again = Store::open(url.as_str(), NONE, Access::Read).await.unwrap();
    assert_eq!(load(&again, Resume::Auto).await.unwrap().unwrap().info.step, 2);
    assert!(verify(&again, None).await.unwrap().iter().all(|o| o.ok));

    let mut c = Checkpoints::claim(again.clone(), Retention { keep: 1, keep_best: true }).await.unwrap();
    assert_eq!(c.term(), 2);
    c.resume(Resume::Auto).await.unwrap();

    let out = dir.path().join("export/model");
    let files = export(&again, None, &out, "model/").await.unwrap();
    assert_eq!(files.len(), 2);
    assert_eq!(std::fs::read(out.join("config.json")).unwrap(), b"{\"step\":2}");
    let e = export(&again, None, &out, "model/").await.unwrap_err().to_string();
    assert!(e.contains("not empty"), "{e}");
    assert!(export(&again, None, &dir.path().join("x"), "nothing/").await.is_err());
    let left: Vec<_> = std::fs::read_dir(dir.path().join("export")).unwrap().collect();
    assert_eq!(left.len(), 1, "no partial directory stays");
}

#[tokio::test]
async fn a_large_object_goes_up_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().to_str().unwrap(), NONE, Access::Write).await.unwrap();
    let mut c = Checkpoints::claim(store.clone(), Retention { keep: 1, keep_best: true }).await.unwrap();
    let mut s = snapshot(1);
    let big: Vec<u8> = (0..(65 << 20) + 12345).map(|i: u32| (i >> 3) as u8 ^ (i >> 17) as u8).collect();
    s.objects.push(("big.bin".into(), big.clone().into()));
    c.save(s).await.unwrap();
    let got = load(&store, Resume::Auto).await.unwrap().unwrap();
    assert!(got.objects["big.bin"] == big);
}

#[tokio::test]
async fn a_directory_that_cannot_be_used_is_an_error_that_says_which_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let below_a_file = file.join("run");
    // /proc takes no directories, not even from root
    for bad in [below_a_file.to_str().unwrap(), "/proc/unveil-run"] {
        let e = Store::open(bad, NONE, Access::Write).await.unwrap_err();
        assert!(matches!(e, Error::Open { .. }));
        assert!(e.to_string().contains(bad) && e.to_string().contains("os error"), "{e}");
    }
    for (bad, why) in [("", "empty"), ("gopher://x/y", "recognise"), ("s3://user:secret@bucket/x", "credentials")] {
        let e = Store::open(bad, NONE, Access::Write).await.unwrap_err().to_string();
        assert!(e.contains(why) && !e.contains("secret"), "{e}");
    }
}

#[tokio::test]
async fn a_folder_that_turns_unwritable_fails_the_save_and_keeps_the_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().to_str().unwrap(), NONE, Access::Write).await.unwrap();
    let mut c = Checkpoints::claim(store.clone(), Retention { keep: 1, keep_best: true }).await.unwrap();
    c.save(snapshot(1)).await.unwrap();
    // a plain file where the folder of the next step must go: refused for root too
    std::fs::write(dir.path().join("checkpoints/step-2"), "in the way").unwrap();
    let e = c.save(snapshot(2)).await.unwrap_err();
    assert!(matches!(e, Error::Write { .. }), "{e}");
    assert!(e.to_string().contains("checkpoints/step-2/term-1/") && e.to_string().contains("os error"), "{e}");
    assert_eq!(load(&store, Resume::Auto).await.unwrap().unwrap().info.step, 1);
    c.save(snapshot(3)).await.unwrap();
    assert_eq!(load(&store, Resume::Auto).await.unwrap().unwrap().info.step, 3);
}
