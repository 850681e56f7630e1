//! Evaluation of response files, and their combination with the output of `reward score` for the report. The reward crate reads the file,
//! so that both commands accept the same lines.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;

use unveil_config::Config;
use unveil_core::Breakdown;
use unveil_data::image_root::{ImageRoot, PathPolicy};
use unveil_report::RewardedResponse;
use unveil_reward::{GroupInput, ResponseInput, Scoring, read_responses};

use crate::{Answer, AnswerContext, EvalError, EvaluatedAnswer, evaluate_answer};

/// Compares every response of `file` whose record is in `split` (all if empty) with the truth, group by group.
///
/// Boxes are read as described at [`read_responses`] (`model.boxes` is the form). Attention needs `spans`, or a model directory whose
/// tokenizer computes them.
///
/// # Errors
/// Returns [`EvalError::Responses`] for an invalid line, [`EvalError::Empty`] if there is no response of the split.
pub fn evaluate_responses(config: &Config, file: &Path, split: &str) -> Result<Vec<EvaluatedAnswer>, EvalError> {
    let scoring = Scoring::new(config);
    let mut out = Vec::new();
    for (group, _) in read_responses(config, file)? {
        if split.is_empty() || group.record.split == split {
            let image = image_path(file, PathPolicy::new(config.data.outside), &group);
            out.extend(group.responses.iter().map(|r| evaluate_response(&group, &image, r, &scoring)));
        }
    }
    if out.is_empty() {
        return Err(EvalError::Empty { file: file.display().to_string(), split: split.to_owned() });
    }
    Ok(out)
}

/// Combines every response of `file` with its breakdown from `scores` (the output of `reward score` for that file), in the order of
/// `file`.
///
/// # Errors
/// Returns [`EvalError::Responses`] for an invalid line of `file`, [`EvalError::Scores`] for one of `scores` or a response without a
/// breakdown, [`EvalError::Empty`] if there is no response.
pub fn rewarded_responses(config: &Config, file: &Path, scores: &Path) -> Result<Vec<RewardedResponse>, EvalError> {
    let mut breakdowns = read_scores(scores)?;
    let scoring = Scoring::new(config);
    let mut out: Vec<(usize, RewardedResponse)> = Vec::new();
    for (group, lines) in read_responses(config, file)? {
        let image = image_path(file, PathPolicy::new(config.data.outside), &group);
        for (response, line) in group.responses.iter().zip(lines) {
            let key = (group.record.id.clone(), response.index);
            let b = breakdowns.remove(&key).ok_or_else(|| EvalError::Scores {
                file: scores.display().to_string(),
                what: format!(
                    "no line for response {} of \"{}\": pass the output of `reward score --data {}`",
                    key.1,
                    key.0,
                    file.display()
                ),
            })?;
            let p = evaluate_response(&group, &image, response, &scoring).prediction;
            out.push((line, RewardedResponse::new(p, b)));
        }
    }
    if out.is_empty() {
        return Err(EvalError::Empty { file: file.display().to_string(), split: String::new() });
    }
    out.sort_by_key(|(line, _)| *line);
    Ok(out.into_iter().map(|(_, shown)| shown).collect())
}

fn evaluate_response(group: &GroupInput, image: &str, r: &ResponseInput, scoring: &Scoring) -> EvaluatedAnswer {
    let context = AnswerContext { record: &group.record, image, sizes: &group.sizes, boxes: group.boxes };
    let answer = Answer { text: r.text.clone(), spans: r.spans.clone(), attention: r.attention.clone() };
    evaluate_answer(&context, answer, scoring)
}

/// Returns the image file of a group; empty if it has none that may be read.
fn image_path(file: &Path, reach: PathPolicy, group: &GroupInput) -> String {
    let path = ImageRoot::of(file, reach).file(&group.record);
    path.map_or_else(|_| String::new(), |path| std::fs::canonicalize(&path).unwrap_or(path).display().to_string())
}

/// Reads the output of `reward score`: breakdowns by record id and response index.
fn read_scores(path: &Path) -> Result<BTreeMap<(String, usize), Breakdown>, EvalError> {
    let fail = |what: String| EvalError::Scores { file: path.display().to_string(), what };
    let mut out = BTreeMap::new();
    let file = std::fs::File::open(path).map_err(|e| fail(e.to_string()))?;
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|e| fail(e.to_string()))?;
        if line.trim().is_empty() {
            continue;
        }
        let b: Breakdown =
            serde_json::from_str(&line).map_err(|e| fail(format!("line {}: not a breakdown: {e}", index + 1)))?;
        out.insert((b.id.clone(), b.index), b);
    }
    Ok(out)
}
