//! Judges record files: every fault with id and place, none repaired. What training refuses and what it only wonders at.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde::Serialize;
use unveil_core::Record;

use crate::near::{dhash, nearest_before};
use crate::records::{ImageRef, RecordFile, RecordsError};
use crate::root::Reach;
use crate::store::{ContentHash, Image};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth a look; training goes on.
    Warning,
    /// The record cannot be used.
    Error,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The record; empty when it has no id.
    pub id: String,
    /// `file:line`.
    pub file: String,
    /// What is wrong with it.
    pub what: String,
    /// How bad it is.
    pub severity: Severity,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: record \"{}\": {}", self.file, self.id, self.what)
    }
}

/// A record file that cannot be trained on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{first}{}", match .more { 0 => String::new(), n => format!(" (and {n} more: see `unveil data check`)") })]
pub struct CheckError {
    /// The first error.
    pub first: Finding,
    /// How many more there are.
    pub more: usize,
}

/// Checks a record file from disk: also lines that are no records, missing and repeated ids. Errors first by line. `near` also names
/// images that look alike across splits.
///
/// # Errors
/// Only when the file itself cannot be read.
pub fn check_file(path: &Path, reach: Reach, near: bool) -> Result<Vec<Finding>, RecordsError> {
    let mut out = Vec::new();
    let file = RecordFile::scan(path, reach, |e| {
        let (line, id, what) = match e {
            RecordsError::Line { line, cause, .. } => (line, String::new(), cause),
            RecordsError::Duplicate { line, first, id, .. } => (line, id, format!("the id is already on line {first}")),
            RecordsError::ImagePath { line, id, image, cause, .. } => (line, id, format!("image \"{image}\" {cause}")),
            io @ RecordsError::Io { .. } => return Err(io),
        };
        out.push((line, Finding { id, file: format!("{}:{line}", path.display()), what, severity: Severity::Error }));
        Ok(())
    })?;
    let line_of: HashMap<String, usize> =
        file.lines.iter().enumerate().map(|(i, line)| (file.place(i), *line)).collect();
    out.extend(examine(&file, near).into_iter().map(|f| (line_of.get(&f.file).copied().unwrap_or(0), f)));
    out.sort_by_key(|(line, _)| *line);
    Ok(out.into_iter().map(|(_, f)| f).collect())
}

/// Checks loaded records; decodes every image.
pub fn check(file: &RecordFile) -> Vec<Finding> {
    examine(file, false)
}

fn examine(file: &RecordFile, near: bool) -> Vec<Finding> {
    let mut out = Vec::new();
    let mut seen: HashMap<((u32, u32), ContentHash), usize> = HashMap::new();
    let mut patients: HashMap<&str, usize> = HashMap::new();
    let (root, mut hashes) = (file.root(), vec![None; file.records.len()]);
    for (i, r) in file.records.iter().enumerate() {
        let mut add = |severity, what: String| {
            out.push(Finding { id: r.id.clone(), file: file.place(i), what, severity });
        };
        let mut size = None;
        match file.image_ref(r) {
            ImageRef::None => {}
            ImageRef::Url(url) => add(Severity::Warning, format!("image {url} is remote and was not checked")),
            ImageRef::File(path) => match root.read(r).and_then(|b| Image::decode(&b, &path.display().to_string())) {
                Err(e) => add(Severity::Error, e.to_string()),
                Ok(image) => {
                    size = Some((image.width, image.height));
                    let key = ((image.width, image.height), ContentHash::of(&image.rgb));
                    let first = *seen.entry(key).or_insert(i);
                    let other = &file.records[first];
                    if other.split != r.split {
                        let what = format!("its image is also that of \"{}\" in split \"{}\"", other.id, other.split);
                        add(Severity::Warning, what);
                    } else if near && first == i {
                        hashes[i] = dhash(&image);
                    }
                }
            },
        }
        if let Some(patient) = r.extra.get("patient").and_then(|p| p.as_str()).filter(|p| !p.is_empty()) {
            let other = &file.records[*patients.entry(patient).or_insert(i)];
            if other.split != r.split && other.source == r.source {
                let what = format!("patient \"{patient}\" is also in split \"{}\" (\"{}\")", other.split, other.id);
                add(Severity::Warning, what);
            }
        }
        judge(r, size, &mut add);
    }
    let differs = |i: usize, j: usize| file.records[i].split != file.records[j].split;
    for (i, near) in nearest_before(&hashes, differs).into_iter().enumerate() {
        let Some(other) = near.map(|j| &file.records[j]) else { continue };
        let what = format!("its image looks like that of \"{}\" in split \"{}\"", other.id, other.split);
        let (id, file) = (file.records[i].id.clone(), file.place(i));
        out.push(Finding { id, file, what, severity: Severity::Warning });
    }
    out
}

/// What can be said of one record, given the size of its image where that is known.
fn judge(r: &Record, size: Option<(u32, u32)>, add: &mut impl FnMut(Severity, String)) {
    if let (Some((w, h)), Some([sw, sh])) = (size, r.image_size)
        && (w, h) != (sw, sh)
    {
        add(Severity::Error, format!("image_size says {sw} x {sh}, the image has {w} x {h}"));
    }
    for fault in r.faults(size) {
        add(Severity::Error, fault.to_string());
    }
    if r.is_text() && r.answer.trim().is_empty() {
        add(Severity::Error, "its question is one in text, but it has no answer".to_owned());
    }
    if !r.boxes.is_empty() && r.category.trim().is_empty() {
        add(Severity::Error, format!("the category is empty but there are {} boxes", r.boxes.len()));
    }
    if let (Some((w, h)), [b]) = (size, r.boxes.as_slice())
        && b.x1 <= 0.0
        && b.y1 <= 0.0
        && b.x2 >= w as f32
        && b.y2 >= h as f32
    {
        add(Severity::Warning, "the box is the whole image: looking at it cannot be rewarded".to_owned());
    }
    if r.question.trim().is_empty() {
        add(Severity::Warning, "the question is empty".to_owned());
    }
    if !matches!(r.split.as_str(), "train" | "val" | "test") {
        add(Severity::Warning, format!("the split \"{}\" is none of train, val, test", r.split));
    }
}

/// Findings of one file and more of the same, by line; a record that has an error already is not blamed twice.
pub fn joined(mut findings: Vec<Finding>, more: Vec<Finding>) -> Vec<Finding> {
    let line = |f: &Finding| f.file.rsplit(':').next().and_then(|l| l.parse::<usize>().ok()).unwrap_or(0);
    let faulty: HashSet<String> =
        findings.iter().filter(|f| f.severity == Severity::Error).map(|f| f.file.clone()).collect();
    findings.extend(more.into_iter().filter(|f| !faulty.contains(&f.file)));
    findings.sort_by_key(line);
    findings
}

/// Refuses records that cannot be trained on.
///
/// # Errors
/// The first finding of severity error, and how many more there are.
pub fn require(file: &RecordFile) -> Result<(), CheckError> {
    let mut errors = check(file).into_iter().filter(|f| f.severity == Severity::Error);
    match errors.next() {
        None => Ok(()),
        Some(first) => Err(CheckError { first, more: errors.count() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::{RECORDS_FILE, SynthSpec, generate};

    #[test]
    fn synthetic_data_is_clean() {
        let dir = tempfile::tempdir().unwrap();
        generate(&SynthSpec::new(40, 5), dir.path(), |_, _| {}).unwrap();
        let path = dir.path().join(RECORDS_FILE);
        assert_eq!(check_file(&path, Reach::Folder, false).unwrap(), vec![]);
        assert_eq!(require(&RecordFile::load(&path).unwrap()), Ok(()));
    }

    #[test]
    fn equal_pixels_and_likeness_across_splits() {
        let dir = tempfile::tempdir().unwrap();
        let records = generate(&SynthSpec::new(3, 5), dir.path(), |_, _| {}).unwrap();
        let image = crate::root::Root::of(&dir.path().join(RECORDS_FILE), Reach::Folder).open(&records[0]).unwrap();
        let mut brighter = image.clone();
        brighter.rgb.iter_mut().for_each(|v| *v = v.saturating_add(2));
        std::fs::write(dir.path().join("a.png"), image.to_png().unwrap()).unwrap();
        std::fs::write(dir.path().join("b.png"), brighter.to_png().unwrap()).unwrap();
        // The same pixels as colour, in other bytes.
        let colour = image::RgbImage::from_raw(image.width, image.height, image.rgb.clone()).unwrap();
        colour.save(dir.path().join("c.png")).unwrap();
        let line = |name: &str, split: &str| {
            format!(r#"{{"id":"{name}","image":"{name}.png","question":"q","split":"{split}"}}"#)
        };
        let path = dir.path().join("r.jsonl");
        std::fs::write(&path, [line("a", "train"), line("b", "val"), line("c", "test")].join("\n")).unwrap();
        let told = |near: bool| {
            let list = check_file(&path, Reach::Folder, near).unwrap();
            list.into_iter().map(|f| format!("{} {}", f.id, f.what)).collect::<Vec<_>>()
        };
        let equal = "c its image is also that of \"a\" in split \"train\"";
        assert_eq!(told(false), [equal]);
        assert_eq!(told(true), ["b its image looks like that of \"a\" in split \"train\"", equal]);
    }

    #[test]
    fn every_fault_is_found_with_its_place() {
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
            r#"{"id":"soft","image":"a.png","category":"x","boxes":[[0,0,20,10]],"split":"test","patient":"7"}"#
                .to_owned(),
            format!(r#"{{"id":"url","image":"s3://b/k.png","patient":"7",{ok}}}"#),
            format!(r#"{{"id":"text","image":"a.png","task":"vqa",{ok}}}"#),
        ];
        let path = dir.path().join("r.jsonl");
        std::fs::write(&path, lines.join("\n")).unwrap();
        let found = check_file(&path, Reach::Folder, false).unwrap();
        let say: Vec<String> = found
            .iter()
            .map(|f| format!("{} {} {:?} {}", f.file.rsplit(':').next().unwrap(), f.id, f.severity, f.what))
            .collect();
        let want = [
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
        ];
        assert_eq!(say.len(), want.len(), "{say:#?}");
        for (s, (head, tail)) in say.iter().zip(want) {
            assert!(s.starts_with(head) && s.contains(tail), "{s}");
        }
        std::fs::write(&path, format!("{}\n{}\n{}", lines[0], lines[4], lines[5])).unwrap();
        let e = require(&RecordFile::load(&path).unwrap()).unwrap_err().to_string();
        assert!(e.contains("r.jsonl:2: record \"gone\"") && e.contains("and 1 more"), "{e}");
    }
}
