//! Data by the command line: the same seed gives the same bytes, and the real set imports whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use unveil_testkit::{Sandbox, json_lines, workspace};

/// Every file under `root` by its relative path.
fn tree(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut out, mut todo) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(dir) = todo.pop() {
        for path in std::fs::read_dir(&dir).expect("a folder").flatten().map(|e| e.path()) {
            if path.is_dir() {
                todo.push(path);
            } else {
                let name = path.strip_prefix(root).expect("under the root").to_owned();
                out.insert(name, std::fs::read(&path).expect("a file"));
            }
        }
    }
    out
}

#[test]
fn synthetic_data_repeats_by_seed() {
    let s = Sandbox::new();
    for (folder, seed) in [("a", 3), ("b", 3), ("c", 4)] {
        s.synth(folder, 30, seed);
    }
    let [a, b, c] = ["a", "b", "c"].map(|f| tree(&s.path(f)));
    assert_eq!(a.len(), 31, "30 images and the records");
    assert!(a == b, "the same seed gives the same bytes");
    let [a, c] = [a, c].map(|t| t.into_values().collect::<Vec<_>>());
    assert!(a.iter().all(|file| !c.contains(file)), "another seed gives other images and records");
    s.unveil(&["data", "check", &s.path("a/records.jsonl").to_string_lossy()]).ok();
    let stats = s.unveil(&["data", "stats", &s.path("a/records.jsonl").to_string_lossy()]).ok().json();
    assert_eq!(stats[0]["records"], 30, "{}", stats[0]);
}

#[test]
fn bccd_imports_whole() {
    let source = std::env::var_os("UNVEIL_BCCD").map_or_else(|| workspace().join("../shared/data/bccd"), PathBuf::from);
    assert!(source.join("Annotations").is_dir(), "{} holds no BCCD: set UNVEIL_BCCD to its folder", source.display());
    let s = Sandbox::new();
    let out = s.path("bccd/records.jsonl");
    std::fs::create_dir(s.path("bccd")).expect("a folder");
    let (src, file) = (source.to_string_lossy(), out.to_string_lossy());
    let done = s.unveil(&["data", "import", "voc", "--src", &src, "--out", &file]).ok();
    let report = &done.json()[0];
    assert_eq!((&report["records"], &report["boxes"]), (&364.into(), &4886.into()), "{report}");
    let left: Vec<&str> = done.stderr.lines().filter(|l| l.starts_with("left out: ")).collect();
    assert_eq!(left.len(), 2, "{}", done.stderr);
    for (line, image) in left.iter().zip(["BloodImage_00338", "BloodImage_00343"]) {
        assert!(line.contains(image) && line.contains("area"), "{line}");
    }
    let records = json_lines(&std::fs::read_to_string(&out).expect("records"));
    assert_eq!(records.len(), 364);
    let boxes: usize = records.iter().filter_map(|r| r["boxes"].as_array()).map(Vec::len).sum();
    assert_eq!(boxes, 4886);
    s.unveil(&["data", "check", &file]).ok();
}
