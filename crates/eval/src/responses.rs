//! Answers of a file: compared with the truth like a model's own, and, with the scores of `reward score`, as the report shows them.
//!
//! Must not know: engines. The file is read by the reward room, so that both commands take the same lines.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;

use unveil_config::Config;
use unveil_core::Breakdown;
use unveil_data::root::{Reach, Root};
use unveil_report::Shown;
use unveil_reward::{GroupInput, ResponseInput, Scoring, read_responses};

use crate::{Answer, EvalError, Judged, Subject, judge};

/// Compares every response of `file` whose record is of `split` (all when empty) with the truth, group by group.
///
/// Boxes are read as [`read_responses`] says (`model.boxes` names the form). Attention needs `spans` beside it, or a model
/// directory whose tokenizer finds them.
///
/// # Errors
/// A line that cannot be used; no response of the split.
pub fn judge_responses(config: &Config, file: &Path, split: &str) -> Result<Vec<Judged>, EvalError> {
    let scoring = Scoring::new(config);
    let mut out = Vec::new();
    for (group, _) in read_responses(config, file)? {
        if split.is_empty() || group.record.split == split {
            let image = image_path(file, Reach::new(config.data.outside), &group);
            out.extend(group.responses.iter().map(|r| judged(&group, &image, r, &scoring)));
        }
    }
    if out.is_empty() {
        return Err(EvalError::Empty { file: file.display().to_string(), split: split.to_owned() });
    }
    Ok(out)
}

/// Every response of `file` with its breakdown from `scores` (the output of `reward score` for that file), in the order of the file.
///
/// # Errors
/// A line of either file that cannot be used; a response without a breakdown.
pub fn shown_responses(config: &Config, file: &Path, scores: &Path) -> Result<Vec<Shown>, EvalError> {
    let mut breakdowns = read_scores(scores)?;
    let scoring = Scoring::new(config);
    let mut out: Vec<(usize, Shown)> = Vec::new();
    for (group, lines) in read_responses(config, file)? {
        let image = image_path(file, Reach::new(config.data.outside), &group);
        for (response, line) in group.responses.iter().zip(lines) {
            let key = (group.record.id.clone(), response.index);
            let b = breakdowns.remove(&key).ok_or_else(|| EvalError::Scores {
                file: scores.display().to_string(),
                what: format!(
                    "no line for response {} of \"{}\": give the output of `reward score --data {}`",
                    key.1,
                    key.0,
                    file.display()
                ),
            })?;
            let p = judged(&group, &image, response, &scoring).prediction;
            out.push((line, Shown::new(p, b)));
        }
    }
    if out.is_empty() {
        return Err(EvalError::Empty { file: file.display().to_string(), split: String::new() });
    }
    out.sort_by_key(|(line, _)| *line);
    Ok(out.into_iter().map(|(_, shown)| shown).collect())
}

fn judged(group: &GroupInput, image: &str, r: &ResponseInput, scoring: &Scoring) -> Judged {
    let subject = Subject { record: &group.record, image, sizes: &group.sizes, boxes: group.boxes };
    let answer = Answer { text: r.text.clone(), spans: r.spans.clone(), attention: r.attention.clone() };
    judge(&subject, answer, scoring)
}

/// The image file of a group; empty where it has none that may be read from here.
fn image_path(file: &Path, reach: Reach, group: &GroupInput) -> String {
    let path = Root::of(file, reach).file(&group.record);
    path.map_or_else(|_| String::new(), |path| std::fs::canonicalize(&path).unwrap_or(path).display().to_string())
}

fn read_scores(path: &Path) -> Result<BTreeMap<(String, usize), Breakdown>, EvalError> {
    let fail = |what: String| EvalError::Scores { file: path.display().to_string(), what };
    let mut out = BTreeMap::new();
    let file = std::fs::File::open(path).map_err(|e| fail(e.to_string()))?;
    for (at, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|e| fail(e.to_string()))?;
        if line.trim().is_empty() {
            continue;
        }
        let b: Breakdown =
            serde_json::from_str(&line).map_err(|e| fail(format!("line {}: no breakdown: {e}", at + 1)))?;
        out.insert((b.id.clone(), b.index), b);
    }
    Ok(out)
}
