//! Localization: agreement of an answer's boxes with the true boxes.
//!
//! Source: arXiv 2501.01377 rewards `IoU(predicted, true)` for one lesion. For any number of lesions, this is the soft F1 over the
//! one-to-one assignment that maximises the summed overlap.

use unveil_config::schema::{self, Overlap};
use unveil_core::{BBox, Component, LesionScore};

use crate::assignment::max_assignment;

/// Most valid predicted boxes in the assignment, in text order. Further ones count as predicted and unmatched, which bounds the time
/// and keeps the range for any text.
pub const MATCH_LIMIT: usize = 1024;

/// Boxes given by an answer.
#[derive(Debug, Clone, Copy)]
pub struct PredictedBoxes<'a> {
    /// All boxes of the answer in original-image pixels: an invalid one ([`BBox::fault`]: not finite, inverted, empty, outside) scores 0
    /// and is counted.
    pub boxes: &'a [BBox],
    /// Whether the answer reports no finding.
    pub says_no_finding: bool,
}

/// True boxes of a record.
#[derive(Debug, Clone, Copy)]
pub struct TrueBoxes<'a> {
    /// True boxes in original-image pixels.
    pub boxes: &'a [BBox],
    /// `[width, height]` of the image.
    pub image: [u32; 2],
}

/// Lets every pair of boxes match: labels do not count.
pub fn any_label(_predicted: usize, _truth: usize) -> bool {
    true
}

/// Overlap measure and threshold by which boxes are compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OverlapRule {
    /// Overlap that is summed over the matches.
    pub overlap: Overlap,
    /// IoU below which a match counts 0.
    pub threshold: f64,
}

impl OverlapRule {
    /// Returns the rule in force at a weight version: the threshold of the latest curriculum stage that has begun.
    pub fn at(config: &schema::Localization, version: u64) -> Self {
        let begun = config.curriculum.iter().filter(|(from, _)| *from <= version).max_by_key(|(from, _)| *from);
        Self { overlap: config.overlap, threshold: begun.map_or(0.0, |(_, t)| *t) }
    }

    /// Returns the overlap of two valid boxes in `[0, 1]`: IoU, `(1 + GIoU) / 2`, or `(1.5 + CIoU) / 2.5`; 0 below the threshold.
    pub fn overlap(&self, p: &BBox, t: &BBox) -> f64 {
        let value = match self.overlap {
            Overlap::Iou => return Some(p.iou(t)).filter(|v| *v >= self.threshold).unwrap_or(0.0),
            Overlap::Giou => (1.0 + p.giou(t)) / 2.0,
            Overlap::Ciou => (1.5 + p.ciou(t)) / 2.5,
        };
        if self.threshold > 0.0 && p.iou(t) < self.threshold { 0.0 } else { value.clamp(0.0, 1.0) }
    }
}

/// Scores boxes as [`score_localization`], by IoU without threshold and labels.
pub fn score_localization_by_iou(
    predicted: &[BBox],
    says_no_finding: bool,
    truth: &[BBox],
    image: [u32; 2],
) -> Component {
    let rule = OverlapRule { overlap: Overlap::Iou, threshold: 0.0 };
    score_localization(
        PredictedBoxes { boxes: predicted, says_no_finding },
        TrueBoxes { boxes: truth, image },
        rule,
        any_label,
    )
}

/// Scores boxes by soft F1 in `[0, 1]`: `2 * sum(overlap of matches) / (predicted + true)`.
///
/// Without true boxes, the score is 1 only if the answer reports no finding: an empty or unreadable answer has no boxes either, but is
/// not an answer. If only one side has boxes, the score is 0.
///
/// `agree(predicted, truth)` tells whether the labels of two boxes, given by position, match; other pairs add 0, so that the
/// assignment is the best one among pairs that agree.
///
/// Detail: `iou` (best single pair), `pred`, `true`, `invalid`, and `threshold` if one is set. Lesions: one entry per true box.
pub fn score_localization(
    predicted: PredictedBoxes<'_>,
    truth: TrueBoxes<'_>,
    rule: OverlapRule,
    agree: impl Fn(usize, usize) -> bool,
) -> Component {
    let width = truth.image[0] as f32;
    let height = truth.image[1] as f32;
    let is_valid = |(_, b): &(usize, &BBox)| b.fault(width, height).is_none();
    let valid: Vec<(usize, &BBox)> = predicted.boxes.iter().enumerate().filter(is_valid).collect();
    // A box that touches no lesion adds nothing to a sum of IoUs.
    let touches = |p: &BBox| rule.overlap != Overlap::Iou || truth.boxes.iter().any(|t| p.intersection(t) > 0.0);
    let candidates: Vec<(usize, &BBox)> = valid.iter().take(MATCH_LIMIT).copied().filter(|(_, p)| touches(p)).collect();
    let table: Vec<Vec<f64>> = (truth.boxes.iter().enumerate())
        .map(|(at, t)| {
            candidates.iter().map(|(index, p)| if agree(*index, at) { rule.overlap(p, t) } else { 0.0 }).collect()
        })
        .collect();
    let mut lesions: Vec<LesionScore> =
        (0..truth.boxes.len()).map(|truth| LesionScore { truth, predicted: None, iou: 0.0, counted: 0.0 }).collect();
    for (t, p) in max_assignment(truth.boxes.len(), candidates.len(), |t, p| table[t][p]) {
        let (index, b) = candidates[p];
        lesions[t] =
            LesionScore { truth: t, predicted: Some(index), iou: b.iou(&truth.boxes[t]), counted: table[t][p] };
    }
    let score = if truth.boxes.is_empty() {
        f64::from(u8::from(predicted.boxes.is_empty() && predicted.says_no_finding))
    } else {
        let matched: f64 = lesions.iter().map(|l| l.counted).sum();
        (2.0 * matched / (predicted.boxes.len() + truth.boxes.len()) as f64).clamp(0.0, 1.0)
    };
    let best = |(_, p): &(usize, &BBox)| truth.boxes.iter().map(|t| p.iou(t)).fold(0.0, f64::max);
    let mut out = Component::value(score)
        .with_detail("iou", candidates.iter().map(best).fold(0.0, f64::max))
        .with_detail("pred", predicted.boxes.len() as f64)
        .with_detail("true", truth.boxes.len() as f64)
        .with_detail("invalid", (predicted.boxes.len() - valid.len()) as f64);
    if rule.threshold > 0.0 {
        out = out.with_detail("threshold", rule.threshold);
    }
    out.lesions = lesions;
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: [u32; 2] = [100, 100];

    fn list(b: &[[f32; 4]]) -> Vec<BBox> {
        b.iter().map(|&b| b.into()).collect()
    }

    fn score(p: &[[f32; 4]], t: &[[f32; 4]]) -> f64 {
        score_localization_by_iou(&list(p), false, &list(t), IMAGE).value.unwrap()
    }

    #[test]
    fn soft_f1_by_hand() {
        let a = [10.0, 10.0, 30.0, 30.0];
        let b = [60.0, 60.0, 80.0, 80.0];
        assert_eq!(score(&[a], &[a]), 1.0);
        assert_eq!(score(&[b, a], &[a, b]), 1.0);
        assert!((score(&[a], &[a, b]) - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(score(&[a], &[]), 0.0);
        assert_eq!(score(&[], &[a]), 0.0);
    }

    #[test]
    fn no_finding_must_be_reported() {
        assert_eq!(score_localization_by_iou(&[], true, &[], IMAGE).value, Some(1.0));
        assert_eq!(score_localization_by_iou(&[], false, &[], IMAGE).value, Some(0.0));
    }

    #[test]
    fn invalid_boxes_are_counted() {
        let t: BBox = [10.0, 10.0, 30.0, 30.0].into();
        let c = score_localization_by_iou(&[[1e6, 1e6, 0.0, 0.0].into(), t], false, &[t], IMAGE);
        assert!((c.value.unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!((c.detail["invalid"], c.detail["pred"], c.detail["iou"]), (1.0, 2.0, 1.0));
        assert_eq!(c.lesions, [LesionScore { truth: 0, predicted: Some(1), iou: 1.0, counted: 1.0 }]);
    }

    #[test]
    fn labels_and_thresholds_change_matches() {
        let t = list(&[[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]);
        let p = list(&[[50.0, 50.0, 60.0, 60.0], [0.0, 0.0, 10.0, 5.0]]);
        let with = |agree: fn(usize, usize) -> bool, threshold: f64| {
            let truth = TrueBoxes { boxes: &t, image: IMAGE };
            score_localization(
                PredictedBoxes { boxes: &p, says_no_finding: false },
                truth,
                OverlapRule { overlap: Overlap::Iou, threshold },
                agree,
            )
        };
        let value = |c: &Component| c.value.unwrap();
        assert_eq!(
            (value(&with(any_label, 0.0)), value(&with(any_label, 0.5)), value(&with(any_label, 0.6))),
            (0.75, 0.75, 0.5)
        );
        let c = with(|_, t| t == 0, 0.0);
        assert_eq!((value(&c), c.lesions[0].iou, c.lesions[1].counted), (0.25, 0.5, 0.0));
        assert_eq!(value(&with(|p, t| p == t, 0.0)), 0.0, "each box is on the other's lesion");
        let config = schema::Localization { curriculum: vec![(0, 0.1), (10, 0.5)], ..Default::default() };
        let at = |v| OverlapRule::at(&config, v).threshold;
        assert_eq!((at(0), at(9), at(10), at(99)), (0.1, 0.1, 0.5, 0.5));
        let later = schema::Localization { curriculum: vec![(5, 0.5)], ..Default::default() };
        assert_eq!(OverlapRule::at(&later, 4).threshold, 0.0);
    }

    #[test]
    fn generalised_overlaps_reward_nearer_boxes() {
        let t = list(&[[40.0, 40.0, 60.0, 60.0]]);
        for overlap in [Overlap::Giou, Overlap::Ciou] {
            let s = |b: [f32; 4]| {
                let truth = TrueBoxes { boxes: &t, image: IMAGE };
                let rule = OverlapRule { overlap, threshold: 0.0 };
                score_localization(
                    PredictedBoxes { boxes: &list(&[b]), says_no_finding: false },
                    truth,
                    rule,
                    any_label,
                )
                .value
                .unwrap()
            };
            let exact = s([40.0, 40.0, 60.0, 60.0]);
            let near = s([62.0, 40.0, 82.0, 60.0]);
            let far = s([0.0, 0.0, 5.0, 5.0]);
            assert!(exact == 1.0 && exact > near && near > far && far > 0.0, "{overlap:?} {exact} {near} {far}");
            assert_eq!(s([60.0, 60.0, 40.0, 40.0]), 0.0, "an invalid box is never repaired");
        }
    }

    #[test]
    fn thousands_of_boxes_score_quickly_and_low() {
        let truth: Vec<BBox> = (0..20).map(|i| [i as f32, 0.0, i as f32 + 30.0, 60.0].into()).collect();
        let many: Vec<BBox> = (0..100_000).map(|i| [(i % 70) as f32, 0.0, 95.0, 99.0].into()).collect();
        let start = std::time::Instant::now();
        let v = score_localization_by_iou(&many, false, &truth, IMAGE).value.unwrap();
        assert!((0.0..0.01).contains(&v), "{v}");
        assert!(start.elapsed().as_secs() < 5);
    }
}
