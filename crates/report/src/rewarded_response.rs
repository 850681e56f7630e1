//! Rewarded responses as the sample page shows them, and the reader of those that a run keeps in `rollouts/`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use unveil_core::{Attention, BBox, Breakdown, Component, Grid};

use crate::{Prediction, ReportError};

/// A response with image, boxes, attention and reward.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardedResponse {
    /// Update of stage 2 that trained on it; `None` for a response outside a run.
    pub step: Option<u64>,
    /// Record id.
    pub id: String,
    /// Index within its group.
    pub index: usize,
    /// Image file, absolute or relative to the run directory; empty if there is none.
    pub image: PathBuf,
    /// `[width, height]` in pixels, to which the boxes refer.
    pub size: [u32; 2],
    /// True category.
    pub category: String,
    /// Reference answer of a text record; `None` for grounding records.
    pub reference: Option<String>,
    /// True boxes.
    pub truth: Vec<BBox>,
    /// Boxes of the answer, as written.
    pub predicted: Vec<BBox>,
    /// Text of the response.
    pub text: String,
    /// Grid of `heat`.
    pub grid: Grid,
    /// Attention of the tokens that name the class over the image tokens, row-major; empty if unknown.
    pub heat: Vec<f32>,
    /// Weighted total; `None` if all components are masked.
    pub total: Option<f64>,
    /// Reward components by name.
    pub components: BTreeMap<String, Component>,
}

impl RewardedResponse {
    /// Combines a prediction and its reward.
    pub fn new(p: Prediction, b: Breakdown) -> Self {
        Self {
            step: None,
            id: p.id,
            index: b.index,
            image: p.image.into(),
            size: p.size,
            category: p.category,
            reference: p.reference,
            truth: p.truth,
            predicted: p.boxes,
            text: p.text,
            grid: p.grid,
            heat: p.heat,
            total: b.total,
            components: b.components,
        }
    }
}

/// The keys of a line of `rollouts/step-N.jsonl` that are shown.
#[derive(Deserialize)]
struct RolloutLine {
    step: u64,
    id: String,
    index: usize,
    text: String,
    category: String,
    boxes: Vec<BBox>,
    image_size: [u32; 2],
    total: Option<f64>,
    components: Option<BTreeMap<String, Component>>,
    /// Image that the policy saw. Older lines only name the record's image, which augmentation may have changed.
    #[serde(default)]
    seen: PathBuf,
    #[serde(default)]
    reference: Option<String>,
    #[serde(default)]
    predicted: Vec<BBox>,
    #[serde(default)]
    attention: Option<Attention>,
}

impl From<RolloutLine> for RewardedResponse {
    fn from(line: RolloutLine) -> Self {
        let (grid, heat) = line.attention.as_ref().map_or((Grid { rows: 0, cols: 0 }, Vec::new()), mean_row);
        Self {
            step: Some(line.step),
            id: line.id,
            index: line.index,
            image: line.seen,
            size: line.image_size,
            category: line.category,
            reference: line.reference,
            truth: line.boxes,
            predicted: line.predicted,
            text: line.text,
            grid,
            heat,
            total: line.total,
            components: line.components.unwrap_or_default(),
        }
    }
}

/// Averages the rows that fit the grid.
fn mean_row(a: &Attention) -> (Grid, Vec<f32>) {
    let grid = Grid { rows: a.grid[0], cols: a.grid[1] };
    let cells = grid.rows.checked_mul(grid.cols);
    let rows: Vec<&Vec<f32>> = a.rows.iter().filter(|r| Some(r.len()) == cells).collect();
    let Some(cells) = cells.filter(|_| !rows.is_empty()) else { return (grid, Vec::new()) };
    (grid, (0..cells).map(|j| rows.iter().map(|r| r[j]).sum::<f32>() / rows.len() as f32).collect())
}

/// Loads the responses that `run` keeps, by step, about `limit` (0: all): whole steps, evenly spread over the run. Lines truncated by a
/// crash are left out; without the folder there are no responses.
///
/// # Errors
/// Returns [`ReportError::Io`] if a file cannot be read.
pub fn load_rewarded_responses(run: &Path, limit: usize) -> Result<Vec<RewardedResponse>, ReportError> {
    let folder = run.join("rollouts");
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ReportError::Io { path, source }
    };
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut steps: Vec<(u64, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(io(&folder))? {
        let path = entry.map_err(io(&folder))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let number = name.strip_prefix("step-").and_then(|n| n.strip_suffix(".jsonl"));
        steps.extend(number.and_then(|n| n.parse().ok()).map(|n| (n, path.clone())));
    }
    steps.sort();
    let mut files: Vec<Vec<RewardedResponse>> = Vec::with_capacity(steps.len());
    for (_, path) in &steps {
        let lines = BufReader::new(std::fs::File::open(path).map_err(io(path))?).lines();
        let lines = lines.collect::<Result<Vec<_>, _>>().map_err(io(path))?;
        files.push(
            lines
                .iter()
                .filter_map(|l| serde_json::from_str::<RolloutLine>(l).ok())
                .map(RewardedResponse::from)
                .collect(),
        );
    }
    let total: usize = files.iter().map(Vec::len).sum();
    let longest = files.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let keep = if limit == 0 || total <= limit { files.len() } else { (limit / longest).clamp(1, files.len()) };
    let chosen: Vec<usize> = match (keep, files.len()) {
        (_, 0) => Vec::new(),
        (1, n) => vec![n - 1],
        (keep, n) => (0..keep).map(|i| i * (n - 1) / (keep - 1)).collect(),
    };
    Ok(chosen.into_iter().flat_map(|i| std::mem::take(&mut files[i])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whole_steps_are_spread_evenly() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load_rewarded_responses(dir.path(), 0).unwrap().is_empty());
        std::fs::create_dir(dir.path().join("rollouts")).unwrap();
        let line = |step: u64, index: usize| {
            json!({"step": step, "id": "a", "index": index, "text": "x", "category": "c", "boxes": [], "image_size": [4, 4],
                "total": 0.5, "components": {}, "attention": {"grid": [1, 2], "tokens": [3, 4], "rows": [[1.0, 0.0], [0.5, 0.5]]}})
        };
        for step in 1..=10 {
            let text = format!("{}\n{}\n{{torn", line(step, 0), line(step, 1));
            std::fs::write(dir.path().join(format!("rollouts/step-{step}.jsonl")), text).unwrap();
        }
        let steps = |limit| {
            load_rewarded_responses(dir.path(), limit).unwrap().iter().filter_map(|s| s.step).collect::<Vec<_>>()
        };
        assert_eq!(steps(0).len(), 20);
        assert_eq!(steps(6), [1, 1, 5, 5, 10, 10]);
        assert_eq!(steps(1), [10, 10]);
        let first = &load_rewarded_responses(dir.path(), 0).unwrap()[0];
        assert_eq!((first.heat.as_slice(), first.grid.cols, first.total), (&[0.75, 0.25][..], 2, Some(0.5)));
    }
}
