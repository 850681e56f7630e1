//! Damaged and hostile annotation files: an import returns an error or valid records, never panics, and never reads or links files
//! outside the source folder.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use unveil_data::records::RecordFile;

use super::{DatasetFixture, Format, ImportOptions, fixtures};

/// Returns all files of a data set that are not images.
fn annotations(set: &DatasetFixture) -> Vec<PathBuf> {
    fn walk(folder: &Path, out: &mut Vec<PathBuf>) {
        for path in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
            if path.is_dir() {
                walk(&path, out);
            } else if !["png", "jpg"].contains(&path.extension().and_then(|e| e.to_str()).unwrap_or_default()) {
                out.push(path);
            }
        }
    }
    let mut out = Vec::new();
    walk(&set.src(), &mut out);
    out.sort();
    out
}

/// Imports; if that succeeds, the records must be valid and their images inside the data set.
fn check_import(set: &DatasetFixture, format: Format) {
    let outside = set.dir.path().join("secret.png");
    let Ok(report) = set.try_import(format, &ImportOptions::default()) else { return };
    let file = RecordFile::load(&set.out()).unwrap();
    assert_eq!(report.records, file.records.len());
    for r in &file.records {
        let size = r.image_size.map(|[w, h]| (w, h));
        assert_eq!(r.faults(size), [], "{}", r.id);
        let image = set.out().parent().unwrap().join(&r.image);
        assert!(image.canonicalize().unwrap().starts_with(set.dir.path().canonicalize().unwrap()));
        if outside.exists() {
            assert_ne!(
                std::fs::read(&image).unwrap(),
                std::fs::read(&outside).unwrap(),
                "{} shows a file from outside",
                r.id
            );
        }
    }
}

#[derive(Debug, Clone)]
enum Damage {
    Bytes(Vec<u8>),
    Cut(f64),
    Flip(Vec<(f64, u8)>),
    Swap(String, String),
}

fn damage() -> impl Strategy<Value = Damage> {
    let value = prop_oneof![
        Just("null".to_owned()),
        Just("-1".to_owned()),
        Just("1e39".to_owned()),
        Just("NaN".to_owned()),
        Just("[]".to_owned()),
        Just("{}".to_owned()),
        Just("\"\"".to_owned()),
        Just("99999999999999999999".to_owned()),
        Just("<!DOCTYPE x [<!ENTITY a \"aaaa\">]>&a;".to_owned()),
        Just("\u{0}".to_owned()),
        Just(",,,,,,\n".to_owned()),
        Just("\"\n\"".to_owned()),
    ];
    let part = prop_oneof![
        Just("1".to_owned()),
        Just("2".to_owned()),
        Just("[".to_owned()),
        Just("\"".to_owned()),
        Just("<".to_owned()),
        Just(":".to_owned()),
        Just(",".to_owned()),
        Just("0.5".to_owned()),
    ];
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300).prop_map(Damage::Bytes),
        (0.0..1.0).prop_map(Damage::Cut),
        prop::collection::vec((0.0..1.0, any::<u8>()), 1..12).prop_map(Damage::Flip),
        (part, value).prop_map(|(a, b)| Damage::Swap(a, b)),
    ]
}

fn apply(damage: &Damage, content: Vec<u8>) -> Vec<u8> {
    match damage {
        Damage::Bytes(bytes) => bytes.clone(),
        Damage::Cut(at) => content[..(content.len() as f64 * at) as usize].to_vec(),
        Damage::Flip(list) => {
            let mut out = content;
            let len = out.len();
            for (at, byte) in list.iter().filter(|_| len > 0) {
                out[(len as f64 * at) as usize] = *byte;
            }
            out
        }
        Damage::Swap(a, b) => String::from_utf8_lossy(&content).replacen(a, b, 5).into_bytes(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 160, ..ProptestConfig::default() })]

    #[test]
    fn damaged_annotations_never_panic(format in prop::sample::select(Format::ALL.to_vec()), which in 0.0f64..1.0, damage in damage()) {
        let set = fixtures::dataset(format);
        let files = annotations(&set);
        let file = &files[(files.len() as f64 * which) as usize];
        let content = std::fs::read(file).unwrap();
        std::fs::write(file, apply(&damage, content)).unwrap();
        check_import(&set, format);
    }
}

#[test]
fn paths_that_leave_the_folder_are_refused() {
    for format in Format::ALL {
        for escape in ["../secret.png", "..\\\\secret.png", "/SECRET", "a/../../secret.png", "file:///SECRET"] {
            let set = fixtures::dataset(format);
            let secret = set.dir.path().join("secret.png");
            std::fs::write(&secret, unveil_data::image_store::Image::new(33, 44).to_png().unwrap()).unwrap();
            let escape = escape.replace("/SECRET", &secret.display().to_string());
            for file in annotations(&set) {
                let mut text = String::from_utf8(std::fs::read(&file).unwrap()).unwrap();
                for name in [
                    "a.jpg",
                    "b.jpg",
                    "images/a.jpg",
                    "xmlab0/source.jpg",
                    "synpic1.jpg",
                    "PMC1_fig1.jpg",
                    "medvh_1.jpg",
                    "tb/tb0005.png",
                ] {
                    text = text.replace(name, &escape);
                }
                std::fs::write(&file, text).unwrap();
            }
            check_import(&set, format);
        }
    }
}

#[test]
fn folder_with_a_link_to_itself_is_searched_once() {
    let set = fixtures::dataset(Format::NihChestXray);
    std::os::unix::fs::symlink(set.src(), set.src().join("round")).unwrap();
    set.import(Format::NihChestXray, &ImportOptions::default());
}

/// Opening a FIFO would block indefinitely.
#[test]
fn fifo_in_a_data_set_does_not_block() {
    for format in Format::ALL {
        let set = fixtures::dataset(format);
        for file in annotations(&set) {
            let content = std::fs::read(&file).unwrap();
            std::fs::remove_file(&file).unwrap();
            nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
            check_import(&set, format);
            std::fs::remove_file(&file).unwrap();
            std::fs::write(&file, content).unwrap();
        }
    }
}
