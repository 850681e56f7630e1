//! Metrics of summary.json over a list of predictions.

use serde::{Deserialize, Serialize};
use unveil_report::Prediction;

/// Metrics of a set of predictions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SummaryMetrics {
    /// Share of samples whose category (or "no finding") is right.
    pub accuracy: f64,
    /// Mean IoU of the first predicted box over samples with exactly one true box; a missing or invalid answer is 0.
    pub mean_iou: f64,
    /// Share of the same samples with an IoU of at least 0.5.
    pub acc50: f64,
    /// Mean soft F1 over all samples.
    pub soft_f1: f64,
    /// Mean of attention mass on the lesion divided by its share of the area (s / a), over samples with a true box; an answer that does
    /// not name the class counts as 0, one whose attention is unknown is left out.
    pub vision_lift: f64,
    /// Number of grounding samples, to which the metrics above apply.
    pub n: usize,
    /// Number of samples answered in text, which the metrics ignore.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub n_text: usize,
}

/// Returns whether a count is zero, for keys that are omitted then.
pub(crate) fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl SummaryMetrics {
    /// Formats the metrics as a table, one per line.
    pub fn table(&self) -> String {
        let rows = [
            ("accuracy", self.accuracy),
            ("mean_iou", self.mean_iou),
            ("acc50", self.acc50),
            ("soft_f1", self.soft_f1),
            ("vision_lift", self.vision_lift),
        ];
        let lines = rows.iter().map(|(name, v)| format!("{name:<11}  {v:.3}\n"));
        let head = format!("summary: {} answers{}\n", self.n, text_note(self.n_text));
        std::iter::once(head).chain(lines).collect()
    }
}

/// Returns the note of a table about answers in text; empty if there are none.
pub(crate) fn text_note(n_text: usize) -> String {
    if n_text == 0 { String::new() } else { format!(", and {n_text} in text that are not scored") }
}

/// Computes the metrics of `predictions`; 0 if there is nothing to average.
pub fn summarize(predictions: &[&Prediction]) -> SummaryMetrics {
    let mean = |values: Vec<f64>| {
        if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
    };
    let all = predictions.len();
    let predictions: Vec<&Prediction> = predictions.iter().copied().filter(|p| p.reference.is_none()).collect();
    let ious: Vec<f64> = predictions.iter().filter_map(|p| p.iou).collect();
    SummaryMetrics {
        accuracy: mean(predictions.iter().map(|p| f64::from(u8::from(p.correct))).collect()),
        acc50: mean(ious.iter().map(|&i| f64::from(u8::from(i >= 0.5))).collect()),
        mean_iou: mean(ious),
        soft_f1: mean(predictions.iter().map(|p| p.soft_f1).collect()),
        vision_lift: mean(predictions.iter().filter_map(|p| p.lift).collect()),
        n: predictions.len(),
        n_text: all - predictions.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unveil_core::Grid;

    fn prediction(correct: bool, iou: Option<f64>, soft_f1: f64, lift: Option<f64>) -> Prediction {
        Prediction {
            id: String::new(),
            image: String::new(),
            size: [1, 1],
            category: String::new(),
            reference: None,
            truth: Vec::new(),
            boxes: Vec::new(),
            text: String::new(),
            correct,
            iou,
            soft_f1,
            lift,
            grid: Grid { rows: 1, cols: 1 },
            heat: Vec::new(),
        }
    }

    #[test]
    fn each_metric_averages_over_its_samples() {
        let m = summarize(&[
            &prediction(true, Some(0.5), 0.5, Some(3.0)),
            &prediction(false, Some(0.0), 0.0, Some(0.0)),
            &prediction(true, None, 1.0, None),
            &prediction(false, None, 0.1, Some(6.0)),
        ]);
        let by_hand = SummaryMetrics {
            accuracy: 0.5,
            mean_iou: 0.25,
            acc50: 0.5,
            soft_f1: 0.4,
            vision_lift: 3.0,
            n: 4,
            n_text: 0,
        };
        assert_eq!(m, by_hand);
        assert!(!serde_json::to_string(&m).unwrap().contains("n_text"));
        // An answer in text is counted separately, whatever its values are.
        let text = Prediction { reference: Some("MRI".into()), ..prediction(true, Some(1.0), 1.0, Some(9.0)) };
        let m = summarize(&[&prediction(false, Some(0.5), 0.25, None), &text]);
        assert_eq!((m.accuracy, m.mean_iou, m.soft_f1, m.n, m.n_text), (0.0, 0.5, 0.25, 1, 1));
        assert!(m.table().starts_with("summary: 1 answers, and 1 in text"), "{}", m.table());
        assert_eq!(summarize(&[]).mean_iou, 0.0);
    }
}
