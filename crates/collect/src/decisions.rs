//! Reads back what a person decided on the pages, and makes the final records of it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use unveil_core::Record;
use unveil_data::reach::ImageFolder;
use unveil_data::records::{self, RecordFile};

use crate::answer::{answered, clean, usable};
use crate::{COLLECTED, CollectError};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Accept,
    Edit,
    Reject,
}

#[derive(Debug, Clone, Deserialize)]
struct Decision {
    id: String,
    /// The answer that was decided about.
    key: String,
    decision: Verdict,
    #[serde(default)]
    answer: String,
}

/// What a review came to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Reviewed {
    /// Records written.
    pub records: usize,
    /// Of these, answers taken as they were.
    pub accepted: usize,
    /// Answers that a person changed.
    pub edited: usize,
    /// Records without a region, which were not asked about and are taken over.
    pub not_asked: usize,
    /// Answers that were turned down; not written.
    pub rejected: usize,
    /// Answers that nobody decided about; not written unless asked for.
    pub unreviewed: usize,
    /// Records with a region that have no answer; not written.
    pub unanswered: usize,
    /// Decisions that were not followed, by reason.
    pub ignored: BTreeMap<String, Vec<String>>,
    /// The record file.
    pub file: PathBuf,
}

/// Applies decision files to the records collected in `dir` and writes the final records to `out`. The last decision about a record
/// counts. With `keep_unreviewed`, usable answers that nobody decided about are written, too.
///
/// # Errors
/// A file that cannot be read or written, a line that is no decision.
pub fn review(dir: &Path, decisions: &[PathBuf], out: &Path, keep_unreviewed: bool) -> Result<Reviewed, CollectError> {
    let file = RecordFile::load(&dir.join(COLLECTED))?;
    let mut report = Reviewed { file: out.to_owned(), ..Reviewed::default() };
    let mut of_id: HashMap<String, Decision> = HashMap::new();
    for path in decisions {
        for d in read(path)? {
            of_id.insert(d.id.clone(), d);
        }
    }
    let io = |(path, cause)| CollectError::Io { path, cause };
    let mut images = ImageFolder::new(file.folder(), out).map_err(io)?;
    let (root, mut list) = (file.root(), Vec::new());
    for record in &file.records {
        let decision = of_id.remove(&record.id);
        let Some(mut kept) = decide(record, decision, keep_unreviewed, &mut report) else { continue };
        if let Ok(image) = root.file(record) {
            kept.image = images.reach(&image).map_err(io)?;
        }
        list.push(kept);
    }
    let mut unknown: Vec<String> = of_id.into_keys().collect();
    unknown.sort();
    if !unknown.is_empty() {
        report.ignored.insert("no record has this id".to_owned(), unknown);
    }
    report.records = list.len();
    records::write(out, &list)?;
    Ok(report)
}

/// The final record, where it is one.
fn decide(record: &Record, decision: Option<Decision>, keep_unreviewed: bool, report: &mut Reviewed) -> Option<Record> {
    let Some(about) = record.extra.get("collect") else {
        if record.boxes.is_empty() {
            report.not_asked += 1;
            return Some(record.clone());
        }
        report.unanswered += 1;
        return None;
    };
    let text = |key: &str| about[key].as_str().unwrap_or_default().to_owned();
    let mut ignore = |why: &str| report.ignored.entry(why.to_owned()).or_default().push(record.id.clone());
    let decision = decision.filter(|d| {
        let fresh = d.key == text("key");
        if !fresh {
            ignore("the answer has changed since");
        }
        fresh
    });
    let (answer, status) = match &decision {
        Some(d) if d.decision == Verdict::Reject => {
            report.rejected += 1;
            return None;
        }
        Some(d) if d.decision == Verdict::Edit => (clean(&d.answer), "edited"),
        Some(_) => (text("reflection"), "accepted"),
        None => (text("reflection"), "unreviewed"),
    };
    let good = !answer.is_empty() && usable(record, &answer);
    if decision.is_some() && !good {
        ignore("the answer is empty or holds coordinates of its own");
    }
    let count = match status {
        "edited" if good => &mut report.edited,
        "accepted" if good => &mut report.accepted,
        _ => &mut report.unreviewed,
    };
    *count += 1;
    if !good || (decision.is_none() && !keep_unreviewed) {
        return None;
    }
    let mut out = answered(record, &answer);
    if let Some(about) = out.extra.get_mut("collect") {
        about["status"] = status.into();
    }
    Some(out)
}

fn read(path: &Path) -> Result<Vec<Decision>, CollectError> {
    let text = std::fs::read_to_string(path).map_err(CollectError::io(path))?;
    let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
    lines
        .map(|(k, l)| {
            serde_json::from_str(l).map_err(|e| CollectError::Line {
                path: path.to_owned(),
                line: k + 1,
                what: format!("no decision: {e}"),
            })
        })
        .collect()
}
