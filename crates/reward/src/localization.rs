//! Localization: how well the boxes of an answer agree with the true ones.
//!
//! Source: arXiv 2501.01377 rewards `IoU(predicted, true)` for one lesion. Here, for any number of them: soft F1 over the
//! one-to-one assignment that maximises the summed overlap.

use unveil_config::schema::{self, Overlap};
use unveil_core::{BBox, Component, LesionScore};

use crate::assignment::max_assignment;

/// Valid predicted boxes that take part in the assignment, in text order. Those beyond it count as predicted and
/// unmatched, which keeps the time bounded and the range kept, whatever a text holds.
pub const MATCH_LIMIT: usize = 1024;

/// What an answer says about places.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// In original-image pixels, exactly as many as the answer has: an invalid one ([`BBox::fault`]: not finite, inverted, empty,
    /// outside) scores 0 and is counted.
    pub boxes: &'a [BBox],
    /// The text says that nothing is there.
    pub says_none: bool,
}

/// What is true.
#[derive(Debug, Clone, Copy)]
pub struct Truth<'a> {
    /// True boxes in original-image pixels.
    pub boxes: &'a [BBox],
    /// `[width, height]` of the image.
    pub image: [u32; 2],
}

/// Every pair of boxes may be matched: labels do not count.
pub fn any(_predicted: usize, _truth: usize) -> bool {
    true
}

/// How boxes are compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// Which overlap is summed.
    pub overlap: Overlap,
    /// Matches with a lower IoU count 0.
    pub threshold: f64,
}

impl Rule {
    /// The rule in force at a weight version: the threshold of the last stage of the curriculum that has begun.
    pub fn at(config: &schema::Localization, version: u64) -> Self {
        let begun = config.curriculum.iter().filter(|(from, _)| *from <= version).max_by_key(|(from, _)| *from);
        Self { overlap: config.overlap, threshold: begun.map_or(0.0, |(_, t)| *t) }
    }

    /// Overlap of two valid boxes in `[0, 1]`: IoU, `(1 + GIoU) / 2`, or `(1.5 + CIoU) / 2.5`; 0 below the threshold.
    pub fn overlap(&self, p: &BBox, t: &BBox) -> f64 {
        let value = match self.overlap {
            Overlap::Iou => return Some(p.iou(t)).filter(|v| *v >= self.threshold).unwrap_or(0.0),
            Overlap::Giou => (1.0 + p.giou(t)) / 2.0,
            Overlap::Ciou => (1.5 + p.ciou(t)) / 2.5,
        };
        if self.threshold > 0.0 && p.iou(t) < self.threshold { 0.0 } else { value.clamp(0.0, 1.0) }
    }
}

/// [`localize`] by IoU, without threshold and labels.
pub fn localization(predicted: &[BBox], says_none: bool, truth: &[BBox], image: [u32; 2]) -> Component {
    let rule = Rule { overlap: Overlap::Iou, threshold: 0.0 };
    localize(Claim { boxes: predicted, says_none }, Truth { boxes: truth, image }, rule, any)
}

/// Soft F1 in `[0, 1]`: `2 * sum(overlap of matches) / (predicted + true)`.
///
/// When nothing is to be found, the score is 1 only for a text that says so: an empty or unreadable answer has no boxes either,
/// but is no answer. One side empty -> 0.
///
/// `agree(predicted, truth)` says of two boxes by position whether their labels go together; a match of others adds 0, so that the
/// assignment is the best one among those that agree.
///
/// Detail: `iou` (best single pair), `pred`, `true`, `invalid`, and `threshold` where there is one. Lesions: one entry per true box.
pub fn localize(claim: Claim<'_>, truth: Truth<'_>, rule: Rule, agree: impl Fn(usize, usize) -> bool) -> Component {
    let (width, height) = (truth.image[0] as f32, truth.image[1] as f32);
    let is_valid = |(_, b): &(usize, &BBox)| b.fault(width, height).is_none();
    let valid: Vec<(usize, &BBox)> = claim.boxes.iter().enumerate().filter(is_valid).collect();
    // Boxes that touch no lesion cannot add to a sum of IoUs.
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
        f64::from(u8::from(claim.boxes.is_empty() && claim.says_none))
    } else {
        let matched: f64 = lesions.iter().map(|l| l.counted).sum();
        (2.0 * matched / (claim.boxes.len() + truth.boxes.len()) as f64).clamp(0.0, 1.0)
    };
    let best = |(_, p): &(usize, &BBox)| truth.boxes.iter().map(|t| p.iou(t)).fold(0.0, f64::max);
    let mut out = Component::value(score)
        .with("iou", candidates.iter().map(best).fold(0.0, f64::max))
        .with("pred", claim.boxes.len() as f64)
        .with("true", truth.boxes.len() as f64)
        .with("invalid", (claim.boxes.len() - valid.len()) as f64);
    if rule.threshold > 0.0 {
        out = out.with("threshold", rule.threshold);
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
        localization(&list(p), false, &list(t), IMAGE).value.unwrap()
    }

    #[test]
    fn by_hand() {
        let a = [10.0, 10.0, 30.0, 30.0];
        let b = [60.0, 60.0, 80.0, 80.0];
        assert_eq!(score(&[a], &[a]), 1.0);
        assert_eq!(score(&[b, a], &[a, b]), 1.0);
        assert!((score(&[a], &[a, b]) - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(score(&[a], &[]), 0.0);
        assert_eq!(score(&[], &[a]), 0.0);
    }

    #[test]
    fn nothing_to_find() {
        assert_eq!(localization(&[], true, &[], IMAGE).value, Some(1.0));
        assert_eq!(localization(&[], false, &[], IMAGE).value, Some(0.0));
    }

    #[test]
    fn invalid_boxes_are_counted() {
        let t: BBox = [10.0, 10.0, 30.0, 30.0].into();
        let c = localization(&[[1e6, 1e6, 0.0, 0.0].into(), t], false, &[t], IMAGE);
        assert!((c.value.unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!((c.detail["invalid"], c.detail["pred"], c.detail["iou"]), (1.0, 2.0, 1.0));
        assert_eq!(c.lesions, [LesionScore { truth: 0, predicted: Some(1), iou: 1.0, counted: 1.0 }]);
    }

    #[test]
    fn labels_thresholds_and_every_lesion() {
        let t = list(&[[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]);
        let p = list(&[[50.0, 50.0, 60.0, 60.0], [0.0, 0.0, 10.0, 5.0]]);
        let with = |agree: fn(usize, usize) -> bool, threshold: f64| {
            let truth = Truth { boxes: &t, image: IMAGE };
            localize(Claim { boxes: &p, says_none: false }, truth, Rule { overlap: Overlap::Iou, threshold }, agree)
        };
        let value = |c: &Component| c.value.unwrap();
        assert_eq!((value(&with(any, 0.0)), value(&with(any, 0.5)), value(&with(any, 0.6))), (0.75, 0.75, 0.5));
        let c = with(|_, t| t == 0, 0.0);
        assert_eq!((value(&c), c.lesions[0].iou, c.lesions[1].counted), (0.25, 0.5, 0.0));
        assert_eq!(value(&with(|p, t| p == t, 0.0)), 0.0, "each lies on the other's lesion");
        let config = schema::Localization { curriculum: vec![(0, 0.1), (10, 0.5)], ..Default::default() };
        let at = |v| Rule::at(&config, v).threshold;
        assert_eq!((at(0), at(9), at(10), at(99)), (0.1, 0.1, 0.5, 0.5));
        let later = schema::Localization { curriculum: vec![(5, 0.5)], ..Default::default() };
        assert_eq!(Rule::at(&later, 4).threshold, 0.0);
    }

    #[test]
    fn generalised_overlaps_reward_what_is_nearer() {
        let t = list(&[[40.0, 40.0, 60.0, 60.0]]);
        for overlap in [Overlap::Giou, Overlap::Ciou] {
            let s = |b: [f32; 4]| {
                let truth = Truth { boxes: &t, image: IMAGE };
                let rule = Rule { overlap, threshold: 0.0 };
                localize(Claim { boxes: &list(&[b]), says_none: false }, truth, rule, any).value.unwrap()
            };
            let (exact, near, far) =
                (s([40.0, 40.0, 60.0, 60.0]), s([62.0, 40.0, 82.0, 60.0]), s([0.0, 0.0, 5.0, 5.0]));
            assert!(exact == 1.0 && exact > near && near > far && far > 0.0, "{overlap:?} {exact} {near} {far}");
            assert_eq!(s([60.0, 60.0, 40.0, 40.0]), 0.0, "an invalid box is never repaired");
        }
    }

    #[test]
    fn thousands_of_boxes_stay_quick_and_low() {
        let truth: Vec<BBox> = (0..20).map(|i| [i as f32, 0.0, i as f32 + 30.0, 60.0].into()).collect();
        let many: Vec<BBox> = (0..100_000).map(|i| [(i % 70) as f32, 0.0, 95.0, 99.0].into()).collect();
        let start = std::time::Instant::now();
        let v = localization(&many, false, &truth, IMAGE).value.unwrap();
        assert!((0.0..0.01).contains(&v), "{v}");
        assert!(start.elapsed().as_secs() < 5);
    }
}
