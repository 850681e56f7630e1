//! Application of the decisions made on the review pages to the collected records.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use unveil_core::Record;
use unveil_data::image_folder::ImageFolder;
use unveil_data::records::{self, RecordFile};

use crate::answer::{clean_answer, is_usable_answer, with_answer};
use crate::{COLLECTED, CollectError};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum DecisionKind {
    Accept,
    Edit,
    Reject,
}

#[derive(Debug, Clone, Deserialize)]
struct Decision {
    id: String,
    /// Key of the answer that was reviewed.
    key: String,
    decision: DecisionKind,
    #[serde(default)]
    answer: String,
}

/// Result of a review.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ReviewSummary {
    /// Number of records written.
    pub records: usize,
    /// Number of answers accepted unchanged.
    pub accepted: usize,
    /// Number of answers edited by the reviewer.
    pub edited: usize,
    /// Number of records without a region, which are copied unchanged.
    pub not_asked: usize,
    /// Number of answers rejected; not written.
    pub rejected: usize,
    /// Number of answers without a decision; not written unless requested.
    pub unreviewed: usize,
    /// Number of records with a region but no answer; not written.
    pub unanswered: usize,
    /// Ids of records whose decision was ignored, by reason.
    pub ignored: BTreeMap<String, Vec<String>>,
    /// The record file.
    pub file: PathBuf,
}

/// Applies decision files to the records collected in `dir` and writes the final records to `out`. The last decision about a record
/// counts. With `keep_unreviewed`, usable answers without a decision are written, too.
///
/// # Errors
/// Returns [`CollectError::Records`] or [`CollectError::Io`] if a file cannot be read or written, [`CollectError::Line`] if a line is not
/// a decision.
pub fn review(
    dir: &Path,
    decisions: &[PathBuf],
    out: &Path,
    keep_unreviewed: bool,
) -> Result<ReviewSummary, CollectError> {
    let file = RecordFile::load(&dir.join(COLLECTED))?;
    let mut report = ReviewSummary { file: out.to_owned(), ..ReviewSummary::default() };
    let mut decision_of_record: HashMap<String, Decision> = HashMap::new();
    for path in decisions {
        for d in read_decisions(path)? {
            decision_of_record.insert(d.id.clone(), d);
        }
    }
    let io = |(path, cause)| CollectError::Io { path, cause };
    let mut images = ImageFolder::new(file.folder(), out).map_err(io)?;
    let root = file.root();
    let mut list = Vec::new();
    for record in &file.records {
        let decision = decision_of_record.remove(&record.id);
        let Some(mut kept) = apply_decision(record, decision, keep_unreviewed, &mut report) else { continue };
        if let Ok(image) = root.file(record) {
            kept.image = images.link(&image).map_err(io)?;
        }
        list.push(kept);
    }
    let mut unknown: Vec<String> = decision_of_record.into_keys().collect();
    unknown.sort();
    if !unknown.is_empty() {
        report.ignored.insert("no record has this id".to_owned(), unknown);
    }
    report.records = list.len();
    records::write(out, &list)?;
    Ok(report)
}

/// Returns the final record, if it is written.
fn apply_decision(
    record: &Record,
    decision: Option<Decision>,
    keep_unreviewed: bool,
    report: &mut ReviewSummary,
) -> Option<Record> {
    let Some(collected) = record.extra.get("collect") else {
        if record.boxes.is_empty() {
            report.not_asked += 1;
            return Some(record.clone());
        }
        report.unanswered += 1;
        return None;
    };
    let text = |key: &str| collected[key].as_str().unwrap_or_default().to_owned();
    let mut ignore = |why: &str| report.ignored.entry(why.to_owned()).or_default().push(record.id.clone());
    let decision = decision.filter(|d| {
        let current = d.key == text("key");
        if !current {
            ignore("the answer has changed since");
        }
        current
    });
    let (answer, status) = match &decision {
        Some(d) if d.decision == DecisionKind::Reject => {
            report.rejected += 1;
            return None;
        }
        Some(d) if d.decision == DecisionKind::Edit => (clean_answer(&d.answer), "edited"),
        Some(_) => (text("reflection"), "accepted"),
        None => (text("reflection"), "unreviewed"),
    };
    let valid = !answer.is_empty() && is_usable_answer(record, &answer);
    if decision.is_some() && !valid {
        ignore("the answer is empty or contains coordinates");
    }
    let count = match status {
        "edited" if valid => &mut report.edited,
        "accepted" if valid => &mut report.accepted,
        _ => &mut report.unreviewed,
    };
    *count += 1;
    if !valid || (decision.is_none() && !keep_unreviewed) {
        return None;
    }
    let mut out = with_answer(record, &answer);
    if let Some(collected) = out.extra.get_mut("collect") {
        collected["status"] = status.into();
    }
    Some(out)
}

/// Parses a decision file.
fn read_decisions(path: &Path) -> Result<Vec<Decision>, CollectError> {
    let text = std::fs::read_to_string(path).map_err(CollectError::io(path))?;
    let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
    lines
        .map(|(k, l)| {
            serde_json::from_str(l).map_err(|e| CollectError::Line {
                path: path.to_owned(),
                line: k + 1,
                what: format!("not a decision: {e}"),
            })
        })
        .collect()
}
