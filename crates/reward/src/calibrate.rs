//! Head calibration: chooses the attention heads that attend to lesions, from rows per head over a data set with true boxes.
//!
//! Grounding heads are few and the same across images (arXiv 2503.06287), so they are chosen once, saved, and frozen.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};
use unveil_core::{BBox, Grid};

use crate::RewardError;
use crate::rows::{entropy, is_distribution, row_sums};

/// One line of calibration data: an image and, for each head, the mean attention of the tokens that name the class. Written by
/// `unveil score --heads`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadSample {
    /// Record id.
    pub id: String,
    /// `[width, height]` of the image in pixels.
    pub image_size: [u32; 2],
    /// True boxes in these pixels.
    pub boxes: Vec<BBox>,
    /// `[rows, cols]` of the merged image-token grid.
    pub grid: [usize; 2],
    /// One row per head.
    pub heads: Vec<HeadRow>,
}

/// One head's row: softmax over the image tokens, row-major.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadRow {
    /// Decoder layer, 0-based.
    pub layer: usize,
    /// Head, 0-based.
    pub head: usize,
    /// `grid[0] * grid[1]` values that sum to 1.
    pub row: Vec<f32>,
}

/// Measurements of one head over the data set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HeadScore {
    /// Decoder layer.
    pub layer: usize,
    /// Head.
    pub head: usize,
    /// Mean of `clip((s - a) / (1 - a), 0, 1)`, in `[0, 1]`: the criterion of the choice.
    pub score: f64,
    /// Mean of s / a; 1 = chance.
    pub lift: f64,
    /// Share of the samples with s above a, in `[0, 1]`.
    pub above: f64,
    /// Mean entropy as a share of ln |V|, in `[0, 1]`.
    pub entropy: f64,
    /// Samples with a row of this head.
    pub samples: usize,
}

/// The frozen choice of heads: content of the file that `reward.vision_relevance.heads_file` names.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadChoice {
    /// `[layer, head]`, best first.
    pub heads: Vec<[usize; 2]>,
    /// Number of samples used.
    pub samples: usize,
    /// BLAKE3 of the data file.
    pub data: String,
    /// Measurements of every head, best first.
    pub measured: Vec<HeadScore>,
}

/// Sums over the samples of one head.
#[derive(Debug, Default)]
struct HeadTally {
    score: f64,
    lift: f64,
    above: usize,
    entropy: f64,
    samples: usize,
}

/// Accumulates the measurements of all heads, sample by sample.
#[derive(Debug, Default)]
pub struct HeadMeasurement {
    tallies: BTreeMap<(usize, usize), HeadTally>,
    /// Samples that were not left out.
    used: usize,
}

impl HeadMeasurement {
    /// Adds a sample. One without a true box, or whose boxes cover the image, says nothing about heads and is left out.
    ///
    /// # Errors
    /// Returns a message that names the sample if it is inconsistent.
    pub fn add(&mut self, sample: &HeadSample) -> Result<(), String> {
        let in_sample = |what: String| format!("sample `{}`: {what}", sample.id);
        let [rows, cols] = sample.grid;
        let cells = rows.checked_mul(cols).filter(|c| *c > 0 && *c <= 1 << 24);
        let cells = cells.ok_or_else(|| in_sample(format!("the grid {rows} x {cols} is invalid")))?;
        let [width, height] = sample.image_size.map(|v| v as f32);
        let m = Grid { rows, cols }.coverage(&sample.boxes, width, height);
        let a = m.iter().map(|v| f64::from(*v)).sum::<f64>() / cells as f64;
        let informative = a > 0.0 && a < 1.0 - 1e-6;
        self.used += usize::from(informative && !sample.heads.is_empty());
        for h in &sample.heads {
            if h.row.len() != cells || !is_distribution(&h.row, 0.05) {
                let what =
                    format!("layer {} head {}: the row is not a distribution over {cells} cells", h.layer, h.head);
                return Err(in_sample(what));
            }
            if informative {
                let sums = row_sums(&h.row, &m);
                let s = sums.inside / sums.total;
                let t = self.tallies.entry((h.layer, h.head)).or_default();
                t.score += ((s - a) / (1.0 - a)).clamp(0.0, 1.0);
                t.lift += s / a;
                t.above += usize::from(s > a);
                t.entropy += entropy(&h.row);
                t.samples += 1;
            }
        }
        Ok(())
    }

    /// Returns all heads, best first (by score, then lift, then layer and head), and the number of samples used.
    pub fn finish(self) -> (Vec<HeadScore>, usize) {
        let mut out: Vec<HeadScore> = (self.tallies.into_iter())
            .map(|((layer, head), t)| {
                let n = t.samples as f64;
                let score = t.score / n;
                let lift = t.lift / n;
                let above = t.above as f64 / n;
                let entropy = t.entropy / n;
                HeadScore { layer, head, score, lift, above, entropy, samples: t.samples }
            })
            .collect();
        out.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.lift.total_cmp(&a.lift)));
        (out, self.used)
    }
}

/// Reads `data` (JSON lines of [`HeadSample`]), one line at a time, and chooses the best `top` heads among those that attend to lesions
/// in most samples (`above` > 0.5) and more than chance (`lift` > 1).
///
/// # Errors
/// Returns [`RewardError::Io`] if the file cannot be read, [`RewardError::Line`] if a line is invalid, and [`RewardError::Named`] if no
/// sample or no head is good enough.
pub fn calibrate(data: &Path, top: usize) -> Result<HeadChoice, RewardError> {
    let io = |source| RewardError::Io { path: data.to_owned(), source };
    let mut reader = BufReader::new(std::fs::File::open(data).map_err(io)?);
    let mut hash = blake3::Hasher::new();
    let mut measure = HeadMeasurement::default();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes).map_err(io)? == 0 {
            break;
        }
        hash.update(&bytes);
        if !bytes.trim_ascii().is_empty() {
            let fail = |what: String| RewardError::Line { path: data.to_owned(), line, what };
            let sample = serde_json::from_slice(&bytes).map_err(|e| fail(format!("not a calibration sample: {e}")))?;
            measure.add(&sample).map_err(fail)?;
        }
    }
    let unusable = |why: String| RewardError::Named { what: format!("calibration data {}", data.display()), why };
    let (measured, samples) = measure.finish();
    if samples == 0 {
        return Err(unusable(
            "no sample has a lesion and rows: score answers that name the class of records with boxes".into(),
        ));
    }
    let good = measured.iter().filter(|h| h.lift > 1.0 && h.above > 0.5);
    let heads: Vec<[usize; 2]> = good.take(top).map(|h| [h.layer, h.head]).collect();
    if heads.is_empty() {
        return Err(unusable(format!(
            "none of {} heads attends to lesions more than chance over {samples} samples",
            measured.len()
        )));
    }
    Ok(HeadChoice { heads, samples, data: hash.finalize().to_hex().to_string(), measured })
}

impl HeadChoice {
    /// Saves the choice as a TOML file.
    ///
    /// # Errors
    /// Returns [`RewardError::Io`] if the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), RewardError> {
        let io = |source| RewardError::Io { path: path.to_owned(), source };
        let text = toml::to_string(self).map_err(|e| io(std::io::Error::other(e)))?;
        unveil_core::write_atomic(path, format!("# Written by unveil-reward calibrate; frozen.\n{text}").as_bytes())
            .map_err(io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(id: &str, rows: &[(usize, usize, usize)]) -> HeadSample {
        let row = |cell: usize| (0..16).map(|j| if j == cell { 0.85 } else { 0.01 }).collect();
        HeadSample {
            id: id.into(),
            image_size: [40, 40],
            boxes: vec![[10.0, 10.0, 20.0, 20.0].into()],
            grid: [4, 4],
            heads: rows.iter().map(|&(layer, head, cell)| HeadRow { layer, head, row: row(cell) }).collect(),
        }
    }

    fn measure(samples: &[HeadSample]) -> Result<(Vec<HeadScore>, usize), String> {
        let mut m = HeadMeasurement::default();
        samples.iter().try_for_each(|s| m.add(s))?;
        Ok(m.finish())
    }

    #[test]
    fn heads_are_ranked_by_attention_to_lesions() {
        let samples =
            [sample("a", &[(0, 0, 3), (0, 1, 5), (2, 0, 5)]), sample("b", &[(0, 0, 3), (0, 1, 5), (2, 0, 3)])];
        let (measured, used) = measure(&samples).unwrap();
        assert_eq!((used, measured.len(), measured[0].layer, measured[0].head), (2, 3, 0, 1));
        assert!((measured[0].lift - 0.85 * 16.0).abs() < 1e-4 && measured[0].above == 1.0 && measured[1].above == 0.5);
        assert_eq!((measured[2].score, measured[2].samples), (0.0, 2));
        let mut none = sample("c", &[(0, 0, 3)]);
        none.boxes.clear();
        assert_eq!(measure(&[none]).unwrap(), (vec![], 0));
        let mut bad = sample("d", &[(0, 0, 3)]);
        bad.heads[0].row.pop();
        assert!(measure(&[bad]).unwrap_err().contains("sample `d`: layer 0 head 0"));
    }

    #[test]
    fn calibration_reads_samples_and_saves_a_choice() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("h.jsonl");
        let out = dir.path().join("heads.toml");
        let line = |cell: usize| {
            let row: Vec<f64> = (0..16).map(|j| f64::from(u8::from(j == cell))).collect();
            serde_json::json!({"id": "a", "image_size": [40, 40], "boxes": [[10, 10, 20, 20]], "grid": [4, 4],
                "heads": [{"layer": 1, "head": 2, "row": row}]})
            .to_string()
        };
        std::fs::write(&data, line(5)).unwrap();
        let choice = calibrate(&data, 4).unwrap();
        assert_eq!(choice.data, blake3::hash(line(5).as_bytes()).to_hex().to_string());
        choice.save(&out).unwrap();
        let set = format!("reward.vision_relevance.heads_file={}", out.display());
        let config = unveil_config::load_from(None, std::iter::empty(), &[set]).unwrap();
        assert_eq!(config.reward.vision_relevance.heads, [[1, 2]]);
        std::fs::write(&data, line(4)).unwrap();
        assert!(calibrate(&data, 4).unwrap_err().to_string().contains("none of 1 heads"));
        for (text, what) in [
            ("{}", "h.jsonl:1: not a calibration sample"),
            ("\n[", "h.jsonl:2: not a calibration sample"),
            ("\n \n", "no sample has a lesion"),
        ] {
            std::fs::write(&data, text).unwrap();
            let e = calibrate(&data, 4).unwrap_err().to_string();
            assert!(e.contains(what), "{e}");
        }
        std::fs::write(&data, line(5).replace("[4,4]", "[4,5]")).unwrap();
        let e = calibrate(&data, 4).unwrap_err().to_string();
        assert!(e.contains("h.jsonl:1: sample `a`: layer 1 head 2"), "{e}");
    }
}
