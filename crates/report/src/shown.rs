//! One rewarded response as the sample page shows it, and those that a run keeps in `rollouts/`.
//!
//! Must not know: how rewards are made, models.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use unveil_core::{Attention, BBox, Breakdown, Component, Grid};

use crate::{Prediction, ReportError};

/// One response with image, boxes, attention and reward.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    /// Update of stage 2 that it was trained in.
    pub step: Option<u64>,
    /// Record id.
    pub id: String,
    /// Position within its group.
    pub index: usize,
    /// Image file, absolute or relative to the run directory; empty where there is none.
    pub image: PathBuf,
    /// `[width, height]` in which the boxes are given.
    pub size: [u32; 2],
    /// True category.
    pub category: String,
    /// The answer of a record that is answered in text; none where regions are asked for.
    pub reference: Option<String>,
    /// True boxes.
    pub truth: Vec<BBox>,
    /// Boxes of the answer, as written.
    pub predicted: Vec<BBox>,
    /// The answer.
    pub text: String,
    /// Grid of `heat`.
    pub grid: Grid,
    /// Attention of the tokens that name the class over the image tokens, row-major; empty when not known.
    pub heat: Vec<f32>,
    /// Weighted total; absent when all is masked.
    pub total: Option<f64>,
    /// By name.
    pub components: BTreeMap<String, Component>,
}

impl Shown {
    /// A compared answer and its reward.
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

/// A line of `rollouts/step-N.jsonl`, as far as it is shown.
#[derive(Deserialize)]
struct Line {
    step: u64,
    id: String,
    index: usize,
    text: String,
    category: String,
    boxes: Vec<BBox>,
    image_size: [u32; 2],
    total: Option<f64>,
    components: Option<BTreeMap<String, Component>>,
    /// What the policy saw; lines of earlier versions name the record's own image only, which augmentation may have changed.
    #[serde(default)]
    seen: PathBuf,
    #[serde(default)]
    reference: Option<String>,
    #[serde(default)]
    predicted: Vec<BBox>,
    #[serde(default)]
    attention: Option<Attention>,
}

impl From<Line> for Shown {
    fn from(line: Line) -> Self {
        let (grid, heat) = line.attention.as_ref().map_or((Grid { rows: 0, cols: 0 }, Vec::new()), mean);
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

/// Mean of the rows that fit the grid.
fn mean(a: &Attention) -> (Grid, Vec<f32>) {
    let grid = Grid { rows: a.grid[0], cols: a.grid[1] };
    let cells = grid.rows.checked_mul(grid.cols);
    let rows: Vec<&Vec<f32>> = a.rows.iter().filter(|r| Some(r.len()) == cells).collect();
    let Some(cells) = cells.filter(|_| !rows.is_empty()) else { return (grid, Vec::new()) };
    (grid, (0..cells).map(|j| rows.iter().map(|r| r[j]).sum::<f32>() / rows.len() as f32).collect())
}

/// Responses that `run` keeps, by step, at most `limit` (0 = all): whole steps, evenly spread over the run. A line cut by a crash
/// is left out; no folder is no response.
///
/// # Errors
/// A file cannot be read.
pub fn run_samples(run: &Path, limit: usize) -> Result<Vec<Shown>, ReportError> {
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
    let mut files: Vec<Vec<Shown>> = Vec::with_capacity(steps.len());
    for (_, path) in &steps {
        let lines = BufReader::new(std::fs::File::open(path).map_err(io(path))?).lines();
        let lines = lines.collect::<Result<Vec<_>, _>>().map_err(io(path))?;
        files.push(lines.iter().filter_map(|l| serde_json::from_str::<Line>(l).ok()).map(Shown::from).collect());
    }
    let all: usize = files.iter().map(Vec::len).sum();
    let most = files.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let keep = if limit == 0 || all <= limit { files.len() } else { (limit / most).clamp(1, files.len()) };
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
    fn whole_steps_evenly_spread() {
        let dir = tempfile::tempdir().unwrap();
        assert!(run_samples(dir.path(), 0).unwrap().is_empty());
        std::fs::create_dir(dir.path().join("rollouts")).unwrap();
        let line = |step: u64, index: usize| {
            json!({"step": step, "id": "a", "index": index, "text": "x", "category": "c", "boxes": [], "image_size": [4, 4],
                "total": 0.5, "components": {}, "attention": {"grid": [1, 2], "tokens": [3, 4], "rows": [[1.0, 0.0], [0.5, 0.5]]}})
        };
        for step in 1..=10 {
            let text = format!("{}\n{}\n{{torn", line(step, 0), line(step, 1));
            std::fs::write(dir.path().join(format!("rollouts/step-{step}.jsonl")), text).unwrap();
        }
        let steps = |limit| run_samples(dir.path(), limit).unwrap().iter().filter_map(|s| s.step).collect::<Vec<_>>();
        assert_eq!(steps(0).len(), 20);
        assert_eq!(steps(6), [1, 1, 5, 5, 10, 10]);
        assert_eq!(steps(1), [10, 10]);
        let first = &run_samples(dir.path(), 0).unwrap()[0];
        assert_eq!((first.heat.as_slice(), first.grid.cols, first.total), (&[0.75, 0.25][..], 2, Some(0.5)));
    }
}
