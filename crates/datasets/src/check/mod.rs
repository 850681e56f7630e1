//! Checks of record files. Problems are reported with record id and location and never repaired: errors make training refuse the file,
//! warnings do not.

mod image_cache;
mod image_scan;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use unveil_core::record::intended_key;
use unveil_core::{Record, Task, limits};
use unveil_data::finding::{Finding, Severity};
use unveil_data::image_root::PathPolicy;
use unveil_data::image_store::ContentHash;
use unveil_data::records::{ImageRef, RecordFile, RecordsError};

use self::image_scan::{ImageScan, ScanDepth, scan_images};
use crate::near_duplicates::nearest_before;

/// Error for a record file that cannot be used for training.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{first}{}", match .more { 0 => String::new(), n => format!(" (and {n} more: see `unveil data check`)") })]
pub struct CheckError {
    /// The first error.
    pub first: Finding,
    /// Number of further errors.
    pub more: usize,
}

/// Result of checking a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckReport {
    /// All problems, in the order of the file.
    pub findings: Vec<Finding>,
    /// Number of valid lines.
    pub records: usize,
    /// Number of images decoded; an image of several records counts once.
    pub images: usize,
}

impl CheckReport {
    /// Returns the number of findings of a severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|f| f.severity == severity).count()
    }
}

/// Checks a record file on disk, including invalid lines and missing or repeated ids. With `near`, images that look alike across splits
/// are reported, too. `question` is asked where a record has none (`data.question`). Decodes every image, on all cores.
///
/// # Errors
/// Returns [`RecordsError::Io`] if the file cannot be read.
pub fn check_file(path: &Path, reach: PathPolicy, near: bool, question: &str) -> Result<CheckReport, RecordsError> {
    let mut out = Vec::new();
    let file = RecordFile::load_lenient(path, reach, |e| {
        let (line, id, what) = match e {
            RecordsError::Line { line, cause, .. } => (line, cause.id, cause.what),
            RecordsError::Duplicate { line, first, id, .. } => (line, id, format!("the id is already on line {first}")),
            RecordsError::ImagePath { line, id, image, cause, .. } => (line, id, format!("image \"{image}\" {cause}")),
            // Returned as an error instead.
            RecordsError::Io { .. } => return,
        };
        out.push((line, Finding { id, file: format!("{}:{line}", path.display()), what, severity: Severity::Error }));
    })?;
    let scan = scan_images(&file, ScanDepth::pixels(near), None);
    let line_of: HashMap<String, usize> =
        file.lines.iter().enumerate().map(|(i, line)| (file.location(i), *line)).collect();
    out.extend(
        find_problems(&file, &scan, question).into_iter().map(|f| (line_of.get(&f.file).copied().unwrap_or(0), f)),
    );
    out.sort_by_key(|(line, _)| *line);
    let findings = out.into_iter().map(|(_, f)| f).collect();
    Ok(CheckReport { findings, records: file.records.len(), images: scan.decoded })
}

/// Merges two lists of findings about one file, in the order of lines; drops those of `more` about records that already have an error.
pub fn merge_findings(mut findings: Vec<Finding>, more: Vec<Finding>) -> Vec<Finding> {
    let line = |f: &Finding| f.file.rsplit(':').next().and_then(|l| l.parse::<usize>().ok()).unwrap_or(0);
    let with_error: HashSet<String> =
        findings.iter().filter(|f| f.severity == Severity::Error).map(|f| f.file.clone()).collect();
    findings.extend(more.into_iter().filter(|f| !with_error.contains(&f.file)));
    findings.sort_by_key(line);
    findings
}

/// Finds the problems of all records, given the scan of their images and the question for records without one.
fn find_problems(file: &RecordFile, scan: &ImageScan, question: &str) -> Vec<Finding> {
    let mut out = Vec::new();
    // First record with an image or a patient.
    let mut images: HashMap<(&(u32, u32), &ContentHash), usize> = HashMap::new();
    let mut patients: HashMap<String, usize> = HashMap::new();
    let mut hashes = vec![None; file.records.len()];
    for (i, r) in file.records.iter().enumerate() {
        let mut add = |severity, what: String| {
            out.push(Finding { id: r.id.clone(), file: file.location(i), what, severity });
        };
        let mut size = None;
        match scan.image_of(i) {
            None => {
                if let ImageRef::Url(url) = file.image_ref(r) {
                    add(Severity::Warning, format!("image {url} is remote and was not checked"));
                }
            }
            Some(Err(e)) => add(Severity::Error, e.to_string()),
            Some(Ok(image)) => {
                size = Some(image.size);
                if let Some(pixels) = &image.pixels {
                    let first = *images.entry((&image.size, pixels)).or_insert(i);
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
        check_record(r, size, question, &mut add);
    }
    let differs = |i: usize, j: usize| file.records[i].split != file.records[j].split;
    for (i, near) in nearest_before(&hashes, differs).into_iter().enumerate() {
        let Some(other) = near.map(|j| &file.records[j]) else { continue };
        let what = format!("its image looks like that of \"{}\" in split \"{}\"", other.id, other.split);
        let id = file.records[i].id.clone();
        let file = file.location(i);
        out.push(Finding { id, file, what, severity: Severity::Warning });
    }
    out.extend(find_misspelled_keys(file));
    out
}

/// Finds keys that are probably misspelled: each is reported once, at the first record with it.
pub fn find_misspelled_keys(file: &RecordFile) -> Vec<Finding> {
    // First record and number of records of each key.
    let mut keys: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for (i, key) in file.records.iter().enumerate().flat_map(|(i, r)| r.extra.keys().map(move |key| (i, key))) {
        keys.entry(key).or_insert((i, 0)).1 += 1;
    }
    let finding = |(key, (first, count)): (&str, (usize, usize))| {
        let intended = intended_key(key)?;
        let others = match count {
            1 => String::new(),
            n => format!(" ({n} records have it)"),
        };
        let what = format!("the key `{key}` is kept, but not used{others}: did you mean `{intended}`?");
        let id = file.records[first].id.clone();
        let file = file.location(first);
        Some(Finding { id, file, what, severity: Severity::Warning })
    };
    keys.into_iter().filter_map(finding).collect()
}

/// Finds the problems of one record, given the size of its image if known, and the question if it has none.
fn check_record(r: &Record, size: Option<(u32, u32)>, question: &str, add: &mut impl FnMut(Severity, String)) {
    if let (Some((w, h)), Some([sw, sh])) = (size, r.image_size)
        && (w, h) != (sw, sh)
    {
        add(Severity::Error, format!("image_size says {sw} x {sh}, the image has {w} x {h}"));
    }
    for problem in r.faults(size) {
        add(Severity::Error, problem.to_string());
    }
    let turns = || r.extra.get("turns").and_then(|t| t.as_array()).is_some_and(|t| !t.is_empty());
    if r.is_text() && r.answer.trim().is_empty() && !(r.task == Task::Dialogue && turns()) {
        add(Severity::Error, format!("its task is {}, which is answered in text, but it has no answer", r.task));
    }
    match serde_json::to_vec(r).map(|json| json.len()) {
        Ok(bytes) if bytes <= limits::MAX_RECORD_BYTES => {}
        Ok(bytes) => add(
            Severity::Error,
            format!(
                "it has {bytes} bytes, but rollout workers receive records of at most {}: remove what is not needed",
                limits::MAX_RECORD_BYTES
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
        add(Severity::Warning, "the box is the whole image: attention to it cannot be rewarded".to_owned());
    }
    if r.question_or(question).trim().is_empty() {
        add(Severity::Warning, "the question is empty, and so is data.question: set one of them".to_owned());
    }
    if !matches!(r.split.as_str(), "train" | "val" | "test") {
        add(Severity::Warning, format!("the split \"{}\" is not train, val or test", r.split));
    }
}

/// Result of validating a record file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ValidationSummary {
    /// Number of images decoded.
    pub decoded: usize,
    /// Number of unchanged images that an earlier run has decoded.
    pub cached: usize,
    /// Keys that are probably misspelled.
    pub misspelled_keys: Vec<Finding>,
}

/// Validates records for training. Images are decoded on all cores; unchanged images in the cache file `cache` are not decoded again.
///
/// # Errors
/// Returns the first finding of severity error, and the number of others.
pub fn require_valid(file: &RecordFile, cache: Option<&Path>) -> Result<ValidationSummary, CheckError> {
    let scan = scan_images(file, ScanDepth::Size, cache);
    // The question decides about warnings only.
    let mut errors = find_problems(file, &scan, "").into_iter().filter(|f| f.severity == Severity::Error);
    match errors.next() {
        None => Ok(ValidationSummary {
            decoded: scan.decoded,
            cached: scan.cached,
            misspelled_keys: find_misspelled_keys(file),
        }),
        Some(first) => Err(CheckError { first, more: errors.count() }),
    }
}
