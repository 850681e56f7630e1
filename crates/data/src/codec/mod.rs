//! Box codecs: between boxes in original-image pixels and the numbers that a model family writes; and the answer text made of them.
//!
//! The only place where a box is anything but original pixels. Must not know: tokenizers, images, files.

mod qwen2_5_vl;

use serde::{Deserialize, Serialize};
use unveil_core::{BBox, ParseFault, Record, format_answer, parse_answer};

pub use qwen2_5_vl::AbsoluteResized;

use crate::prepare::PrepareError;

/// Sizes `(width, height)` in pixels of an image before and after the processor's resize.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// As in the file.
    pub original: (u32, u32),
    /// As the model sees it.
    pub resized: (u32, u32),
}

/// How a model family writes a box.
pub trait BoxCodec: std::fmt::Debug + Send + Sync {
    /// Largest numbers `(x, y)` that stand for the right and bottom border; 0 stands for the left and top border.
    fn extent(&self, sizes: &Sizes) -> (f64, f64);

    /// Numbers of a box given in original pixels, clamped to the image. Each is within half a code step of the truth, except that a
    /// box narrower than a step, which would lose its area, is widened to one step (then within one step).
    fn encode(&self, b: &BBox, sizes: &Sizes) -> [i64; 4] {
        let (ex, ey) = self.extent(sizes);
        let (w, h) = (f64::from(sizes.original.0), f64::from(sizes.original.1));
        let (x1, x2) = interval(f64::from(b.x1) * ex / w, f64::from(b.x2) * ex / w, ex);
        let (y1, y2) = interval(f64::from(b.y1) * ey / h, f64::from(b.y2) * ey / h, ey);
        [x1, y1, x2, y2]
    }

    /// Box in original pixels of the numbers that a model wrote. Never repaired: what lies outside or is inverted stays so.
    fn decode(&self, numbers: &[f64; 4], sizes: &Sizes) -> BBox {
        let (ex, ey) = self.extent(sizes);
        let (sx, sy) = (f64::from(sizes.original.0) / ex, f64::from(sizes.original.1) / ey);
        let [x1, y1, x2, y2] = *numbers;
        [(x1 * sx) as f32, (y1 * sy) as f32, (x2 * sx) as f32, (y2 * sy) as f32].into()
    }

    /// Original pixels per code step `(x, y)`.
    fn step(&self, sizes: &Sizes) -> (f64, f64) {
        let (ex, ey) = self.extent(sizes);
        (f64::from(sizes.original.0) / ex, f64::from(sizes.original.1) / ey)
    }
}

/// Rounds an interval to whole numbers in `0..=extent`; one that had a length keeps at least 1.
fn interval(a: f64, b: f64, extent: f64) -> (i64, i64) {
    let (lo, hi) = (a.round().clamp(0.0, extent), b.round().clamp(0.0, extent));
    if lo != hi || a >= b {
        return (lo as i64, hi as i64);
    }
    let up = (a + b) / 2.0 >= lo && hi < extent || lo == 0.0;
    if up { (lo as i64, hi as i64 + 1) } else { (lo as i64 - 1, hi as i64) }
}

/// What a model answered, in original pixels.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct GroundedAnswer {
    /// Every box that was written, as written (never repaired, never dropped).
    pub boxes: Vec<BBox>,
    /// Text after the boxes.
    pub category: String,
    /// The text says "no finding".
    pub no_finding: bool,
    /// First deviation from the answer's form, if any.
    pub fault: Option<ParseFault>,
}

/// The training answer of a record: its boxes in the family's numbers, sorted by (x1, y1), then its category; or "no finding".
///
/// # Errors
/// A record with boxes but no category, or with a box that is not valid for its image.
pub fn answer_text(codec: &dyn BoxCodec, record: &Record, sizes: &Sizes) -> Result<String, PrepareError> {
    let bad = |what: String| PrepareError::Record { id: record.id.clone(), what };
    let category = record.category.trim();
    if !record.boxes.is_empty() && category.is_empty() {
        return Err(bad("it has boxes but no category".to_owned()));
    }
    let mut boxes = Vec::with_capacity(record.boxes.len());
    for (i, b) in record.boxes.iter().enumerate() {
        if let Some(fault) = b.fault(sizes.original.0 as f32, sizes.original.1 as f32) {
            return Err(bad(format!("box {i} {:?} {fault}", <[f32; 4]>::from(*b))));
        }
        boxes.push(codec.encode(b, sizes));
    }
    boxes.sort_unstable();
    Ok(format_answer(&boxes, category))
}

/// Reads a model's text; its boxes come back in original pixels.
pub fn read_answer(codec: &dyn BoxCodec, text: &str, sizes: &Sizes) -> GroundedAnswer {
    let a = parse_answer(text);
    GroundedAnswer {
        boxes: a.boxes.iter().map(|b| codec.decode(b, sizes)).collect(),
        category: a.category,
        no_finding: a.no_finding,
        fault: a.fault,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(boxes: Vec<BBox>, category: &str) -> Record {
        let v = serde_json::json!({"id": "r7", "image": "a.png", "category": category, "boxes": boxes});
        serde_json::from_value(v).unwrap()
    }

    const SIZES: Sizes = Sizes { original: (640, 480), resized: (128, 96) };

    #[test]
    fn answers_by_hand() {
        let r = record(vec![[320.0, 100.0, 400.0, 200.0].into(), [10.0, 5.0, 20.0, 480.0].into()], "polyp");
        let text = answer_text(&AbsoluteResized, &r, &SIZES).unwrap();
        assert_eq!(text, "[2,1,4,96], [64,20,80,40] polyp");
        let back = read_answer(&AbsoluteResized, &text, &SIZES);
        assert_eq!(back.boxes[1], [320.0, 100.0, 400.0, 200.0].into());
        assert_eq!((back.category.as_str(), back.fault), ("polyp", None));
        assert_eq!(answer_text(&AbsoluteResized, &record(vec![], "x"), &SIZES).unwrap(), "no finding");
        assert!(read_answer(&AbsoluteResized, "no finding", &SIZES).no_finding);
    }

    #[test]
    fn bad_records_name_their_id() {
        for r in [record(vec![[0.0, 0.0, 9.0, 9.0].into()], " "), record(vec![[9.0, 0.0, 9.0, 9.0].into()], "polyp")] {
            assert!(answer_text(&AbsoluteResized, &r, &SIZES).unwrap_err().to_string().contains("record r7"));
        }
    }

    #[test]
    fn impossible_numbers_stay_impossible() {
        let a = read_answer(&AbsoluteResized, "[1000000,1000000,0,0], [nan,0,1,1] x", &SIZES);
        assert!(a.boxes.iter().all(|b| b.fault(640.0, 480.0).is_some()));
    }

    proptest! {
        #[test]
        fn round_trip_within_half_a_step(
            w in 8u32..3000, h in 8u32..3000, cols in 1u32..40, rows in 1u32..40,
            x in 0.0f64..1.0, y in 0.0f64..1.0, bw in 0.0f64..1.0, bh in 0.0f64..1.0,
        ) {
            let s = Sizes { original: (w, h), resized: (cols * 16, rows * 16) };
            let (fw, fh) = (f64::from(w), f64::from(h));
            let (x1, y1) = (x * fw * 0.99, y * fh * 0.99);
            let b: BBox = [x1 as f32, y1 as f32, (x1 + bw * (fw - x1)).max(x1 + 1e-3) as f32, (y1 + bh * (fh - y1)).max(y1 + 1e-3) as f32].into();
            prop_assume!(b.fault(w as f32, h as f32).is_none());
            let code = AbsoluteResized.encode(&b, &s);
            prop_assert!(code[0] < code[2] && code[1] < code[3] && code[0] >= 0 && code[1] >= 0);
            prop_assert!(code[2] <= i64::from(cols * 16) && code[3] <= i64::from(rows * 16));
            let back = AbsoluteResized.decode(&code.map(|v| v as f64), &s);
            let (sx, sy) = AbsoluteResized.step(&s);
            for (a, o, step, side) in [
                (back.x1, b.x1, sx, b.x2 - b.x1), (back.x2, b.x2, sx, b.x2 - b.x1),
                (back.y1, b.y1, sy, b.y2 - b.y1), (back.y2, b.y2, sy, b.y2 - b.y1),
            ] {
                let limit = if f64::from(side) >= step { 0.5 } else { 1.0 } * step + 1e-3;
                prop_assert!(f64::from((a - o).abs()) <= limit, "{a} {o} {limit}");
            }
        }
    }
}
