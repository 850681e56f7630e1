//! Judges record files: every fault with id and place, none repaired. What training refuses and what it only wonders at.

mod look;
mod memory;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde::Serialize;
use unveil_core::record::meant;
use unveil_core::{Record, Task, limits};

use self::look::{Depth, Looked};
use crate::near::nearest_before;
use crate::records::{ImageRef, RecordFile, RecordsError};
use crate::root::Reach;
use crate::store::ContentHash;

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

/// What was looked at, and what was found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Checked {
    /// Everything that is wrong, in the order of the file.
    pub findings: Vec<Finding>,
    /// Lines that are records.
    pub records: usize,
    /// Images that were decoded; one that several records show counts once.
    pub images: usize,
}

impl Checked {
    /// How many findings are so bad.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|f| f.severity == severity).count()
    }
}

/// Checks a record file from disk: also lines that are no records, missing and repeated ids. `near` also names images that look alike
/// across splits. Every image is decoded, on all cores.
///
/// # Errors
/// Only when the file itself cannot be read.
pub fn check_file(path: &Path, reach: Reach, near: bool) -> Result<Checked, RecordsError> {
    let mut out = Vec::new();
    let file = RecordFile::scan(path, reach, |e| {
        let (line, id, what) = match e {
            RecordsError::Line { line, cause, .. } => (line, cause.id, cause.what),
            RecordsError::Duplicate { line, first, id, .. } => (line, id, format!("the id is already on line {first}")),
            RecordsError::ImagePath { line, id, image, cause, .. } => (line, id, format!("image \"{image}\" {cause}")),
            io @ RecordsError::Io { .. } => return Err(io),
        };
        out.push((line, Finding { id, file: format!("{}:{line}", path.display()), what, severity: Severity::Error }));
        Ok(())
    })?;
    let looked = look::look(&file, Depth::pixels(near), None);
    let line_of: HashMap<String, usize> =
        file.lines.iter().enumerate().map(|(i, line)| (file.place(i), *line)).collect();
    out.extend(examine(&file, &looked).into_iter().map(|f| (line_of.get(&f.file).copied().unwrap_or(0), f)));
    out.sort_by_key(|(line, _)| *line);
    let findings = out.into_iter().map(|(_, f)| f).collect();
    Ok(Checked { findings, records: file.records.len(), images: looked.decoded })
}

/// Joins findings of one file with more of the same, by line; a record that has an error already is not blamed twice.
pub fn joined(mut findings: Vec<Finding>, more: Vec<Finding>) -> Vec<Finding> {
    let line = |f: &Finding| f.file.rsplit(':').next().and_then(|l| l.parse::<usize>().ok()).unwrap_or(0);
    let faulty: HashSet<String> =
        findings.iter().filter(|f| f.severity == Severity::Error).map(|f| f.file.clone()).collect();
    findings.extend(more.into_iter().filter(|f| !faulty.contains(&f.file)));
    findings.sort_by_key(line);
    findings
}

/// Checks loaded records; decodes every image.
pub fn check(file: &RecordFile) -> Vec<Finding> {
    examine(file, &look::look(file, Depth::pixels(false), None))
}

/// What can be said of all records, given what was seen of their images.
fn examine(file: &RecordFile, looked: &Looked) -> Vec<Finding> {
    let mut out = Vec::new();
    let mut seen: HashMap<(&(u32, u32), &ContentHash), usize> = HashMap::new();
    let mut patients: HashMap<String, usize> = HashMap::new();
    let mut hashes = vec![None; file.records.len()];
    for (i, r) in file.records.iter().enumerate() {
        let mut add = |severity, what: String| {
            out.push(Finding { id: r.id.clone(), file: file.place(i), what, severity });
        };
        let mut size = None;
        match looked.of(i) {
            None => {
                if let ImageRef::Url(url) = file.image_ref(r) {
                    add(Severity::Warning, format!("image {url} is remote and was not checked"));
                }
            }
            Some(Err(e)) => add(Severity::Error, e.to_string()),
            Some(Ok(image)) => {
                size = Some(image.size);
                if let Some(pixels) = &image.pixels {
                    let first = *seen.entry((&image.size, pixels)).or_insert(i);
                    let other = &file.records[first];
                    if other.split != r.split {
                        let what = format!("its image is also that of \"{}\" in split \"{}\"", other.id, other.split);
                        add(Severity::Warning, what);
                    } else if first == i {
                        hashes[i] = image.likeness;
                    }
                }
            }
        }
        if let Some(patient) = r.patient() {
            let what = format!("patient \"{patient}\" is also in split");
            let other = &file.records[*patients.entry(patient).or_insert(i)];
            if other.split != r.split && other.source == r.source {
                add(Severity::Warning, format!("{what} \"{}\" (\"{}\")", other.split, other.id));
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
    out.extend(slips(file));
    out
}

/// Keys that are likely slips for others: each once, at the first record that has it.
pub fn slips(file: &RecordFile) -> Vec<Finding> {
    let mut found: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for (i, key) in file.records.iter().enumerate().flat_map(|(i, r)| r.extra.keys().map(move |key| (i, key))) {
        found.entry(key).or_insert((i, 0)).1 += 1;
    }
    let slip = |(key, (first, count)): (&str, (usize, usize))| {
        let stands_for = meant(key)?;
        let others = match count {
            1 => String::new(),
            n => format!(" ({n} records have it)"),
        };
        let what = format!("the key `{key}` is kept, but not read{others}: did you mean `{stands_for}`?");
        let (id, file) = (file.records[first].id.clone(), file.place(first));
        Some(Finding { id, file, what, severity: Severity::Warning })
    };
    found.into_iter().filter_map(slip).collect()
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
    let turns = || r.extra.get("turns").and_then(|t| t.as_array()).is_some_and(|t| !t.is_empty());
    if r.is_text() && r.answer.trim().is_empty() && !(r.task == Task::Dialogue && turns()) {
        add(Severity::Error, format!("its task is {}, which is answered in text, but it has no answer", r.task));
    }
    match serde_json::to_vec(r).map(|json| json.len()) {
        Ok(bytes) if bytes <= limits::RECORD => {}
        Ok(bytes) => add(
            Severity::Error,
            format!(
                "it has {bytes} bytes, but rollout workers are sent records of {} at most: take out what is not needed",
                limits::RECORD
            ),
        ),
        Err(e) => add(Severity::Error, format!("it cannot be written as JSON: {e}")),
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

/// What a start looked at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Required {
    /// Images that were decoded now.
    pub decoded: usize,
    /// Images that an earlier start had found whole, and that have not changed since.
    pub known: usize,
    /// Keys that are likely slips for others.
    pub slips: Vec<Finding>,
}

/// Refuses records that cannot be trained on. Images are decoded on all cores; with a `memory`, a file that says which images were found
/// whole, those among them are not that are as large and as old as then.
///
/// # Errors
/// The first finding of severity error, and how many more there are.
pub fn require(file: &RecordFile, memory: Option<&Path>) -> Result<Required, CheckError> {
    let looked = look::look(file, Depth::Whole, memory);
    let mut errors = examine(file, &looked).into_iter().filter(|f| f.severity == Severity::Error);
    match errors.next() {
        None => Ok(Required { decoded: looked.decoded, known: looked.known, slips: slips(file) }),
        Some(first) => Err(CheckError { first, more: errors.count() }),
    }
}
