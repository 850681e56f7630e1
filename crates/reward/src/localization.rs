//! Localization: how well the boxes of an answer agree with the true ones.
//!
//! Source: arXiv 2501.01377 rewards `IoU(predicted, true)` for one lesion. Here, for any number of them: soft F1 over the
//! one-to-one assignment that maximises the summed IoU.

use unveil_core::{BBox, Component};

use crate::assignment::max_assignment;

/// Valid predicted boxes that take part in the assignment, in text order. Those beyond it count as predicted and
/// unmatched, which keeps the time bounded and the range kept, whatever a text holds.
pub const MATCH_LIMIT: usize = 1024;

/// Soft F1 in `[0, 1]`: `2 * sum(IoU of matches) / (predicted + true)`.
///
/// `predicted` are in original-image pixels, exactly as many as the answer has: an invalid one ([`BBox::fault`]: not finite,
/// inverted, empty, outside) scores 0 and is counted. `says_none` = the text says "no finding". When nothing is to be found,
/// the score is 1 only for a text that says so: an empty or unreadable answer has no boxes either, but is no answer. One side
/// empty -> 0.
///
/// Detail: `iou` (best single pair), `pred`, `true`, `invalid`.
pub fn localization(predicted: &[BBox], says_none: bool, truth: &[BBox], image: [u32; 2]) -> Component {
    let (width, height) = (image[0] as f32, image[1] as f32);
    let valid: Vec<&BBox> = predicted.iter().filter(|b| b.fault(width, height).is_none()).collect();
    let candidates: Vec<&BBox> =
        valid.iter().take(MATCH_LIMIT).copied().filter(|p| truth.iter().any(|t| p.intersection(t) > 0.0)).collect();
    let table: Vec<Vec<f64>> = truth.iter().map(|t| candidates.iter().map(|p| p.iou(t)).collect()).collect();
    let best = table.iter().flatten().copied().fold(0.0, f64::max);
    let score = if truth.is_empty() {
        f64::from(u8::from(predicted.is_empty() && says_none))
    } else if predicted.is_empty() {
        0.0
    } else {
        let matched: f64 =
            max_assignment(truth.len(), candidates.len(), |t, p| table[t][p]).iter().map(|&(t, p)| table[t][p]).sum();
        (2.0 * matched / (predicted.len() + truth.len()) as f64).clamp(0.0, 1.0)
    };
    Component::value(score)
        .with("iou", best)
        .with("pred", predicted.len() as f64)
        .with("true", truth.len() as f64)
        .with("invalid", (predicted.len() - valid.len()) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: [u32; 2] = [100, 100];

    fn score(p: &[[f32; 4]], t: &[[f32; 4]]) -> f64 {
        let list = |b: &[[f32; 4]]| b.iter().map(|&b| b.into()).collect::<Vec<BBox>>();
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
        let c = localization(&[t, [1e6, 1e6, 0.0, 0.0].into()], false, &[t], IMAGE);
        assert!((c.value.unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!((c.detail["invalid"], c.detail["pred"], c.detail["iou"]), (1.0, 2.0, 1.0));
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
