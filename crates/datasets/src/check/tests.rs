//! Tests of the checks.

use unveil_data::image_root::PathPolicy;
use unveil_data::image_store::Image;
use unveil_data::records::RecordFile;

use super::*;
use crate::synth::{RECORDS_FILE, SynthSpec, generate};

#[test]
fn synthetic_data_is_clean() {
    let dir = tempfile::tempdir().unwrap();
    generate(&SynthSpec::new(40, 5), dir.path(), |_, _| {}).unwrap();
    let path = dir.path().join(RECORDS_FILE);
    let clean = CheckReport { findings: vec![], records: 40, images: 40 };
    assert_eq!(check_file(&path, PathPolicy::Folder, false, "").unwrap(), clean);
    let required = require_valid(&RecordFile::load(&path).unwrap(), None).unwrap();
    assert_eq!(required, ValidationSummary { decoded: 40, ..ValidationSummary::default() });
}

#[test]
fn equal_and_similar_images_across_splits_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    let records = generate(&SynthSpec::new(3, 5), dir.path(), |_, _| {}).unwrap();
    let image = unveil_data::image_root::ImageRoot::of(&dir.path().join(RECORDS_FILE), PathPolicy::Folder)
        .open(&records[0])
        .unwrap();
    let mut brighter = image.clone();
    brighter.rgb_mut().iter_mut().for_each(|v| *v = v.saturating_add(2));
    std::fs::write(dir.path().join("a.png"), image.to_png().unwrap()).unwrap();
    std::fs::write(dir.path().join("b.png"), brighter.to_png().unwrap()).unwrap();
    // The same pixels as an RGB file.
    let colour = image::RgbImage::from_raw(image.width(), image.height(), image.rgb().to_vec()).unwrap();
    colour.save(dir.path().join("c.png")).unwrap();
    let line =
        |name: &str, split: &str| format!(r#"{{"id":"{name}","image":"{name}.png","question":"q","split":"{split}"}}"#);
    let path = dir.path().join("r.jsonl");
    std::fs::write(&path, [line("a", "train"), line("b", "val"), line("c", "test")].join("\n")).unwrap();
    let findings_of = |near: bool| {
        let list = check_file(&path, PathPolicy::Folder, near, "").unwrap().findings;
        list.into_iter().map(|f| format!("{} {}", f.id, f.what)).collect::<Vec<_>>()
    };
    let equal = "c its image is also that of \"a\" in split \"train\"";
    assert_eq!(findings_of(false), [equal]);
    assert_eq!(findings_of(true), ["b its image looks like that of \"a\" in split \"train\"", equal]);
}

#[test]
fn every_problem_is_found_with_its_location() {
    let dir = tempfile::tempdir().unwrap();
    let png = Image::new(20, 10).to_png().unwrap();
    std::fs::write(dir.path().join("a.png"), &png).unwrap();
    std::fs::write(dir.path().join("cut.png"), &png[..png.len() / 2]).unwrap();
    let ok = r#""question":"q","split":"train""#;
    let lines = [
        format!(r#"{{"id":"a","image":"a.png","category":"x","boxes":[[0,0,5,5]],{ok}}}"#),
        format!(r#"{{"image":"a.png",{ok}}}"#),
        format!(r#"{{"id":"a","image":"a.png",{ok}}}"#),
        format!(r#"{{"id":"out","image":"a.png","category":"x","boxes":[[0,0,25,5],[3,3,3,9]],{ok}}}"#),
        format!(r#"{{"id":"gone","image":"gone.png",{ok}}}"#),
        format!(r#"{{"id":"cut","image":"cut.png",{ok}}}"#),
        format!(r#"{{"id":"size","image":"a.png","image_size":[10,10],{ok}}}"#),
        format!(r#"{{"id":"nocat","image":"a.png","boxes":[[0,0,5,5]],{ok}}}"#),
        format!(r#"{{"id":"labels","image":"a.png","category":"x","boxes":[[0,0,5,5]],"labels":["x","y"],{ok}}}"#),
        format!(r#"{{"id":"up","image":"../a.png",{ok}}}"#),
        format!(r#"{{"id":"bare",{ok}}}"#),
        r#"{"id":"soft","image":"a.png","category":"x","boxes":[[0,0,20,10]],"split":"test","patient":"7"}"#.to_owned(),
        format!(r#"{{"id":"url","image":"s3://b/k.png","patient":"7",{ok}}}"#),
        format!(r#"{{"id":"text","image":"a.png","task":"vqa",{ok}}}"#),
        format!(r#"{{"id":"also","image":"gone.png",{ok}}}"#),
        format!(r#"{{"id":"typo","image":"a.png","category":"x","bboxes":[[0,0,5,5]],{ok}}}"#),
        format!(r#"{{"id":"absent","image":"a.png","category":"x","boxes":null,{ok}}}"#),
        format!(r#"{{"id":"slip","image":"a.png","patient_id":"7",{ok}}}"#),
        format!(r#"{{"id":"slips","image":"a.png","patient_id":"7","image_path":"b.png",{ok}}}"#),
        format!(r#"{{"id":"kind","image":"a.png","task":"vga",{ok}}}"#),
        format!(r#"{{"id":"talk","image":"a.png","task":"dialogue","turns":[{{"question":"q","answer":"a"}}],{ok}}}"#),
        format!(r#"{{"id":"long","image":"a.png","note":"{}",{ok}}}"#, "x".repeat(limits::MAX_RECORD_BYTES)),
    ];
    let path = dir.path().join("r.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    let findings = check_file(&path, PathPolicy::Folder, false, "").unwrap().findings;
    let lines_found: Vec<String> = findings
        .iter()
        .map(|f| format!("{} {} {:?} {}", f.file.rsplit(':').next().unwrap(), f.id, f.severity, f.what))
        .collect();
    let expected = [
        ("2  Error", "missing field `id`"),
        ("3 a Error", "already on line 1"),
        ("4 out Error", "box 0 [0.0, 0.0, 25.0, 5.0] lies outside the image"),
        ("4 out Error", "box 1 [3.0, 3.0, 3.0, 9.0] has no area"),
        ("5 gone Error", "gone.png"),
        ("6 cut Error", "cut.png: cannot be decoded"),
        ("7 size Error", "image_size says 10 x 10, the image has 20 x 10"),
        ("8 nocat Error", "category is empty"),
        ("9 labels Error", "2 labels for 1 boxes"),
        ("10 up Error", "leaves the folder"),
        ("11 bare Error", "neither `image` nor `image_size`"),
        ("12 soft Warning", "also that of \"a\" in split \"train\""),
        ("12 soft Warning", "whole image"),
        ("12 soft Warning", "question is empty"),
        ("13 url Warning", "not checked"),
        ("13 url Warning", "patient \"7\" is also in split \"test\""),
        ("14 text Error", "no answer"),
        ("15 also Error", "gone.png of record \"also\""),
        ("16 typo Error", "`bboxes`, which is ignored"),
        ("17 absent Error", "has no `boxes`"),
        ("18 slip Warning", "`patient_id` is kept, but not used (2 records have it): did you mean `patient`?"),
        ("19 slips Warning", "`image_path` is kept, but not used: did you mean `image`?"),
        ("20 kind Error", "`vga` is not a task: use grounding, vqa, choice, caption, report or dialogue"),
        ("22 long Error", "rollout workers receive records of at most 16777216"),
    ];
    assert_eq!(lines_found.len(), expected.len(), "{lines_found:#?}");
    for (s, (head, tail)) in lines_found.iter().zip(expected) {
        assert!(s.starts_with(head) && s.contains(tail), "{s}");
    }
    std::fs::write(&path, format!("{}\n{}\n{}", lines[0], lines[4], lines[5])).unwrap();
    let e = require_valid(&RecordFile::load(&path).unwrap(), None).unwrap_err().to_string();
    assert!(e.contains("r.jsonl:2: record \"gone\"") && e.contains("and 1 more"), "{e}");
}

#[test]
fn question_is_missing_only_without_a_default() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.jsonl");
    let line = |id: &str, more: &str| format!(r#"{{"id":"{id}","image_size":[9,9],"split":"train"{more}}}"#);
    let lines = [line("absent", ""), line("blank", r#","question":" ""#), line("asked", r#","question":"q""#)];
    std::fs::write(&path, lines.join("\n")).unwrap();
    let ids = |question: &str| {
        let findings = check_file(&path, PathPolicy::Folder, false, question).unwrap().findings;
        assert!(findings.iter().all(|f| f.severity == Severity::Warning && f.what.contains("data.question")));
        findings.into_iter().map(|f| f.id).collect::<Vec<_>>()
    };
    assert_eq!(ids("What is abnormal?"), [""; 0]);
    assert_eq!((ids(""), ids(" \t")), (vec!["absent".into(), "blank".into()], vec!["absent".into(), "blank".into()]));
}

/// A patient may be a number or a text.
#[test]
fn patients_are_compared_as_number_or_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.jsonl");
    let line = |id: &str, patient: &str, split: &str| {
        format!(r#"{{"id":"{id}","image_size":[9,9],"question":"q","patient":{patient},"split":"{split}"}}"#)
    };
    for (train, test) in [("7", "7"), ("\"7\"", "\"7\""), ("7", "\"7\""), ("7.0", "7"), ("-3", "\" -3 \"")] {
        std::fs::write(&path, [line("a", train, "train"), line("b", test, "test")].join("\n")).unwrap();
        let findings = check_file(&path, PathPolicy::Folder, false, "").unwrap().findings;
        assert!(
            matches!(&findings[..], [f] if f.id == "b" && f.what.contains("also in split \"train\"")),
            "{findings:?}"
        );
    }
    std::fs::write(&path, [line("a", "7", "train"), line("b", "70", "test"), line("c", "null", "val")].join("\n"))
        .unwrap();
    assert_eq!(check_file(&path, PathPolicy::Folder, false, "").unwrap().findings, []);
}

/// Writes four images and a record file with five records, which uses the first image twice.
fn five_records(dir: &Path) -> RecordFile {
    let mut lines = Vec::new();
    for (i, name) in ["a", "b", "c", "d", "a"].iter().enumerate() {
        std::fs::write(dir.join(format!("{name}.png")), Image::new(20, 10).to_png().unwrap()).unwrap();
        lines.push(format!(r#"{{"id":"{i}","image":"{name}.png","question":"q","split":"train"}}"#));
    }
    std::fs::write(dir.join("r.jsonl"), lines.join("\n")).unwrap();
    RecordFile::load(&dir.join("r.jsonl")).unwrap()
}

#[test]
fn restart_decodes_changed_images_only() {
    let dir = tempfile::tempdir().unwrap();
    let file = five_records(dir.path());
    let cache = dir.path().join("run/data/images.json");
    let counts = || require_valid(&file, Some(&cache)).map(|r| (r.decoded, r.cached));
    assert_eq!((counts(), counts()), (Ok((4, 0)), Ok((0, 4))));
    // Damaged, with length and modification time unchanged: only the status change time reveals it.
    let path = dir.path().join("b.png");
    let mut bytes = std::fs::read(&path).unwrap();
    let old = std::fs::metadata(&path).unwrap().modified().unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(&path, &bytes).unwrap();
    std::fs::File::options().append(true).open(&path).unwrap().set_modified(old).unwrap();
    let e = counts().unwrap_err();
    assert!(e.first.id == "1" && e.first.what.contains("b.png") && e.more == 0, "{e}");
    // Valid images are cached in spite of the error; the damaged one is decoded until it is valid.
    assert!(counts().is_err());
    std::fs::write(&path, Image::new(20, 10).to_png().unwrap()).unwrap();
    assert_eq!(counts(), Ok((1, 3)));
    std::fs::remove_file(dir.path().join("d.png")).unwrap();
    assert!(counts().unwrap_err().first.what.contains("d.png"));
    std::fs::write(dir.path().join("d.png"), Image::new(20, 10).to_png().unwrap()).unwrap();
    // Without a cache, or with a truncated one, all images are decoded.
    assert_eq!(require_valid(&file, None).unwrap().decoded, 4);
    std::fs::write(&cache, &std::fs::read(&cache).unwrap()[..40]).unwrap();
    assert_eq!(counts(), Ok((4, 0)));
    assert_eq!(check_file(&file.path, PathPolicy::Folder, false, "").unwrap().images, 4);
}

#[test]
fn cached_sizes_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let file = five_records(dir.path());
    let cache = dir.path().join("images.json");
    require_valid(&file, Some(&cache)).unwrap();
    let mut other = file.clone();
    other.records[2].boxes = vec![[0.0, 0.0, 30.0, 5.0].into()];
    other.records[2].category = "x".into();
    let e = require_valid(&other, Some(&cache)).unwrap_err();
    assert!(e.first.id == "2" && e.first.what.contains("outside"), "{e}");
    other.records[2].boxes = vec![[0.0, 0.0, 19.0, 9.0].into()];
    assert_eq!(require_valid(&other, Some(&cache)).map(|r| r.cached), Ok(4), "inside the cached size");
}

#[test]
fn fifo_does_not_block() {
    let dir = tempfile::tempdir().unwrap();
    let file = five_records(dir.path());
    std::fs::remove_file(dir.path().join("c.png")).unwrap();
    nix::unistd::mkfifo(&dir.path().join("c.png"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let e = require_valid(&file, Some(&dir.path().join("images.json"))).unwrap_err();
    assert!(e.first.id == "2" && e.first.what.contains("c.png") && e.first.what.contains("FIFO"), "{e}");
    let records = dir.path().join("fifo.jsonl");
    nix::unistd::mkfifo(&records, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let e = check_file(&records, PathPolicy::Folder, false, "").unwrap_err().to_string();
    assert!(e.contains("fifo.jsonl") && e.contains("FIFO"), "{e}");
}

/// Returns a grey DICOM image of 34 x 21 pixels.
fn dicom(frames: u8) -> Vec<u8> {
    let rows = 21u16;
    let columns = 34u16;
    let pixels: Vec<u8> = (0..rows * columns).map(|i| (i % 251) as u8).collect();
    let mut out: Vec<u8> = vec![0; 128];
    out.extend(b"DICM");
    let mut put = |element: u16, representation: &[u8; 2], value: &[u8]| {
        out.extend(0x28u16.to_le_bytes());
        out.extend(element.to_le_bytes());
        out.extend(representation);
        out.extend((value.len() as u16).to_le_bytes());
        out.extend(value);
    };
    put(0x02, b"US", &1u16.to_le_bytes());
    put(0x04, b"CS", b"MONOCHROME2 ");
    put(0x08, b"IS", format!("{frames:<2}").as_bytes());
    put(0x10, b"US", &rows.to_le_bytes());
    put(0x11, b"US", &columns.to_le_bytes());
    put(0x100, b"US", &8u16.to_le_bytes());
    put(0x101, b"US", &8u16.to_le_bytes());
    put(0x102, b"US", &7u16.to_le_bytes());
    put(0x103, b"US", &0u16.to_le_bytes());
    out.extend([0xe0, 0x7f, 0x10, 0, b'O', b'B', 0, 0]);
    out.extend((pixels.len() as u32).to_le_bytes());
    out.extend(pixels);
    out
}

#[test]
fn check_and_stats_read_dicom() {
    let dir = tempfile::tempdir().unwrap();
    let images = [("whole.dcm", dicom(1)), ("frames.dcm", dicom(12)), ("other.gif", b"GIF89a".to_vec())];
    let mut lines = Vec::new();
    for (name, bytes) in images {
        std::fs::write(dir.path().join(name), bytes).unwrap();
        lines.push(format!(
            r#"{{"id":"{name}","image":"{name}","category":"x","boxes":[[1,1,30,20]],"question":"q","split":"train"}}"#
        ));
    }
    let path = dir.path().join("r.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    let findings = check_file(&path, PathPolicy::Folder, false, "").unwrap().findings;
    let message: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert_eq!(message.len(), 2, "{message:?}");
    assert!(message[0].contains("12 frames") && message[1].contains("other.gif"), "{message:?}");
    let stats = crate::stats::stats(&RecordFile::load(&path).unwrap());
    assert_eq!((stats.image_sizes["34x21"], stats.image_sizes["unknown"]), (2, 1));
}
