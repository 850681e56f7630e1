//! Box codecs: conversion between boxes in original-image pixels and the numbers that a model family writes, and the answer text.
//!
//! This is the only module in which a box is in anything but original-image pixels.

mod absolute;
mod llava;
mod per_mille;
mod qwen2_vl;
mod training_answer;

use serde::{Deserialize, Serialize};
use unveil_core::{Answer, AnswerReader, BBox, BoxForm, format_answer, parse_answer};

pub use absolute::AbsoluteResized;
pub use llava::Fractions;
pub use per_mille::PerMille;
pub use qwen2_vl::BoxTokens;
pub use training_answer::{answer_text, training_answer};

/// Sizes `(width, height)` in pixels of an image before and after the processor's resize.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Size of the image file.
    pub original: (u32, u32),
    /// Size of the model's input.
    pub resized: (u32, u32),
}

/// Conversion of boxes to and from the text of a model family.
pub trait BoxCodec: std::fmt::Debug + Send + Sync {
    /// Returns the box form of this codec.
    fn form(&self) -> BoxForm;

    /// Returns the numbers `(x, y)` of the right and bottom borders; 0 is the left and top border.
    fn extent(&self, sizes: &Sizes) -> (f64, f64);

    /// Returns the number of code steps per unit in the text.
    fn steps_per_unit(&self) -> f64 {
        1.0
    }

    /// Returns the special tokens that answers contain; they must not be banned from sampling.
    fn special_tokens(&self) -> &'static [&'static str] {
        &[]
    }

    /// Formats one number of a box, given in code steps.
    fn number(&self, code: i64) -> String {
        code.to_string()
    }

    /// Formats the answer text from boxes in code steps and a category; "no finding" if there is no box.
    fn write(&self, codes: &[[i64; 4]], category: &str) -> String {
        format_answer(codes, category)
    }

    /// Parses an answer in the native form from any text, with or without special tokens, in linear time. Boxes are returned in the numbers
    /// of the text. To read a whole response use [`read_answer`], which first locates the answer in it.
    fn parse_native(&self, text: &str) -> Answer {
        parse_answer(text)
    }

    /// Converts a box in original pixels to code steps, clamped to the image. Each is within half a code step of the true value, except
    /// that a box narrower than a step, which would lose its area, is widened to one step (then within one step).
    fn encode(&self, b: &BBox, sizes: &Sizes) -> [i64; 4] {
        let ((ex, ey), steps) = (self.extent(sizes), self.steps_per_unit());
        let ex = ex * steps;
        let ey = ey * steps;
        let w = f64::from(sizes.original.0);
        let h = f64::from(sizes.original.1);
        let (x1, x2) = rounded_interval(f64::from(b.x1) * ex / w, f64::from(b.x2) * ex / w, ex);
        let (y1, y2) = rounded_interval(f64::from(b.y1) * ey / h, f64::from(b.y2) * ey / h, ey);
        [x1, y1, x2, y2]
    }

    /// Converts the numbers that a model wrote to a box in original pixels. Boxes are never repaired: one that is outside or inverted stays
    /// so, and numbers too large for f32 become infinite.
    fn decode(&self, numbers: &[f64; 4], sizes: &Sizes) -> BBox {
        let (ex, ey) = self.extent(sizes);
        let sx = f64::from(sizes.original.0) / ex;
        let sy = f64::from(sizes.original.1) / ey;
        let [x1, y1, x2, y2] = *numbers;
        [(x1 * sx) as f32, (y1 * sy) as f32, (x2 * sx) as f32, (y2 * sy) as f32].into()
    }

    /// Returns the original pixels per code step `(x, y)`.
    fn step(&self, sizes: &Sizes) -> (f64, f64) {
        let ((ex, ey), steps) = (self.extent(sizes), self.steps_per_unit());
        (f64::from(sizes.original.0) / (ex * steps), f64::from(sizes.original.1) / (ey * steps))
    }
}

/// Returns the codec of a box form.
pub fn codec(form: BoxForm) -> &'static dyn BoxCodec {
    match form {
        BoxForm::Absolute => &AbsoluteResized,
        BoxForm::PerMille => &PerMille,
        BoxForm::Qwen2Vl => &BoxTokens,
        BoxForm::Llava => &Fractions,
    }
}

/// Rounds an interval to whole numbers in `0..=extent`; a non-empty one keeps a length of at least 1.
fn rounded_interval(a: f64, b: f64, extent: f64) -> (i64, i64) {
    let lo = a.round().clamp(0.0, extent);
    let hi = b.round().clamp(0.0, extent);
    if lo != hi || a >= b {
        return (lo as i64, hi as i64);
    }
    let up = (a + b) / 2.0 >= lo && hi < extent || lo == 0.0;
    if up { (lo as i64, hi as i64 + 1) } else { (lo as i64 - 1, hi as i64) }
}

/// A parsed response of a model, with boxes in original pixels.
pub type GroundedAnswer = Answer<BBox>;

/// Reads a response with `reader` and returns its boxes in original pixels. Boxes in JSON use the numbers of the native form.
pub fn read_answer(codec: &dyn BoxCodec, reader: &AnswerReader, text: &str, sizes: &Sizes) -> GroundedAnswer {
    reader.read(text, |inside| codec.parse_native(inside)).map_boxes(|b| codec.decode(&b, sizes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use unveil_core::{ParseFault, Record, Task};

    fn record(boxes: Vec<BBox>, category: &str) -> Record {
        let v = serde_json::json!({"id": "r7", "image": "a.png", "category": category, "boxes": boxes});
        serde_json::from_value(v).unwrap()
    }

    const SIZES: Sizes = Sizes { original: (640, 480), resized: (128, 96) };

    fn read_answer(codec: &dyn BoxCodec, text: &str, sizes: &Sizes) -> GroundedAnswer {
        super::read_answer(codec, &AnswerReader::default(), text, sizes)
    }

    fn read(codec: &dyn BoxCodec, text: &str) -> Answer {
        AnswerReader::default().read(text, |inside| codec.parse_native(inside))
    }

    fn all_codecs() -> impl Iterator<Item = &'static dyn BoxCodec> {
        BoxForm::ALL.into_iter().map(codec)
    }

    #[test]
    fn answers_by_hand() {
        let r = record(vec![[320.0, 100.0, 400.0, 200.0].into(), [10.0, 5.0, 20.0, 480.0].into()], "polyp");
        let want = [
            "[2,1,4,96], [64,20,80,40] polyp",
            "[16,10,31,1000], [500,208,625,417] polyp",
            "<|object_ref_start|>polyp<|object_ref_end|><|box_start|>(16,10),(31,1000)<|box_end|>\
             <|box_start|>(500,208),(625,417)<|box_end|>",
            "[0.016,0.01,0.031,1.0], [0.5,0.208,0.625,0.417] polyp",
        ];
        for (codec, want) in all_codecs().zip(want) {
            let text = answer_text(codec, &r, &SIZES).unwrap();
            assert_eq!(text, want);
            let back = read_answer(codec, &text, &SIZES);
            assert_eq!((back.boxes[1].x1, back.boxes[1].x2, back.boxes[0].y2), (320.0, 400.0, 480.0));
            assert_eq!((back.category.as_str(), back.fault), ("polyp", None));
            assert_eq!(answer_text(codec, &record(vec![], "x"), &SIZES).unwrap(), "no finding");
            assert!(read_answer(codec, "no finding", &SIZES).no_finding);
        }
    }

    #[test]
    fn text_answers_are_trained_verbatim() {
        let r = record(vec![[320.0, 100.0, 400.0, 200.0].into()], "polyp");
        for codec in all_codecs() {
            let plain = answer_text(codec, &r, &SIZES).unwrap();
            let written = |answer: &str| answer_text(codec, &Record { answer: answer.into(), ..r.clone() }, &SIZES);
            assert_eq!(written("Remarks without a place.").unwrap(), plain);
            let whole = written("A raised lesion is seen.\n<region>").unwrap();
            assert_eq!(whole, format!("A raised lesion is seen.\n{plain}"));
            let back = read_answer(codec, &whole, &SIZES);
            assert_eq!(back.boxes, read_answer(codec, &plain, &SIZES).boxes);
            assert!(written("<region> and <region>").unwrap_err().to_string().contains("more than one"));
            let text = |answer: &str| {
                let r = Record { answer: answer.into(), task: Task::Vqa, ..record(vec![], "") };
                answer_text(codec, &r, &SIZES)
            };
            assert_eq!(text(" yes ").unwrap(), "yes");
            assert!(text("").unwrap_err().to_string().contains("no answer"));
        }
        let boxed = Record { answer: "At [1,2,3,4]: <region>".into(), ..r };
        assert!(answer_text(codec(BoxForm::PerMille), &boxed, &SIZES).unwrap_err().to_string().contains("other boxes"));
    }

    #[test]
    fn bad_records_name_their_id() {
        let valid: BBox = [0.0, 0.0, 9.0, 9.0].into();
        for codec in all_codecs() {
            let strange = if codec.form() == BoxForm::Qwen2Vl { "x (1,2)" } else { "x [1]" };
            for r in [
                record(vec![valid], " "),
                record(vec![[9.0, 0.0, 9.0, 9.0].into()], "polyp"),
                record(vec![valid], strange),
            ] {
                assert!(answer_text(codec, &r, &SIZES).unwrap_err().to_string().contains("record r7"));
            }
        }
    }

    #[test]
    fn impossible_numbers_stay_impossible() {
        for codec in all_codecs() {
            for text in [
                "[1000000,1000000,0,0], [nan,0,1,1], [0,0,1e308,1e308], [-inf,0,1,1] x",
                "x(1000000,1000000),(0,0)(nan,0),(1,1)(0,0),(1e308,1e308)(-inf,0),(1,1)",
            ] {
                let a = read_answer(codec, text, &SIZES);
                assert_eq!(
                    a.boxes.len(),
                    if (codec.form() == BoxForm::Qwen2Vl) == text.starts_with('x') { 4 } else { 0 }
                );
                assert!(a.boxes.iter().all(|b| b.fault(640.0, 480.0).is_some()));
            }
        }
    }

    #[test]
    fn json_boxes_use_the_numbers_of_the_form() {
        let text = "```json\n[{\"bbox_2d\": [64, 24, 128, 48], \"label\": \"polyp\"}]\n```";
        let a = read_answer(&AbsoluteResized, text, &SIZES);
        assert_eq!((a.boxes, a.category.as_str()), (vec![[320.0, 120.0, 640.0, 240.0].into()], "polyp"));
        assert_eq!(a.fault, Some(ParseFault::OtherForm));
        assert_eq!(read_answer(&PerMille, text, &SIZES).boxes, [[40.96, 11.52, 81.92, 23.04].into()]);
    }

    #[test]
    fn every_form_reads_json_and_surrounding_text() {
        let numbers = [
            [64.0, 24.0, 128.0, 48.0],
            [500.0, 250.0, 1000.0, 500.0],
            [500.0, 250.0, 1000.0, 500.0],
            [0.5, 0.25, 1.0, 0.5],
        ];
        for (codec, n) in all_codecs().zip(numbers) {
            let json = format!("[{{\"bbox_2d\": {n:?}, \"label\": \"polyp\"}}]");
            let native = codec.write(&[codec.encode(&[320.0, 120.0, 640.0, 240.0].into(), &SIZES)], "polyp");
            let other = codec.write(&[codec.encode(&[0.0, 0.0, 64.0, 48.0].into(), &SIZES)], "cyst");
            for text in [
                native.clone(),
                json.clone(),
                format!("I see it: {json}"),
                format!("```json\n{json}\n```"),
                format!("<think>{other}</think>{native}."),
                format!("<think>{other}</think>\n<answer>{native}</answer>"),
                format!("<answer>{other}</answer> no: <answer>```json\n{json}```</answer>"),
            ] {
                let a = read_answer(codec, &text, &SIZES);
                assert_eq!(a.boxes, [[320.0, 120.0, 640.0, 240.0].into()], "{codec:?} {text}");
                assert_eq!(unveil_core::answer::fold_class_name(&a.category), "polyp", "{codec:?} {text}");
            }
            for text in ["no finding", "No findings.", "[]", "```json\n[]\n```", "<think>polyp</think> no finding"] {
                let a = read_answer(codec, text, &SIZES);
                assert!(a.no_finding && a.boxes.is_empty(), "{codec:?} {text}");
            }
            let both = read_answer(codec, &format!("No finding, but {native}"), &SIZES);
            assert_eq!((both.boxes.len(), both.no_finding), (1, false), "{codec:?}");
        }
    }

    #[test]
    fn reading_is_linear() {
        for unit in [
            "[",
            "(",
            "[1,2,3,4]",
            "a(1,2)",
            "(1,2),(3,4)",
            "<|",
            "```",
            "```json",
            "{\"bbox_2d\":",
            "{\"bbox_2d\":[",
            "[{",
            "[ ",
            "{ ",
            "{\"a\":",
            "{\"a",
            "\"{",
            "\\",
            "{}",
            "[]",
            "{\"label\":\"x\"}",
            "{\"label\":\"x\"} a",
            "<think>",
            "</think>",
            "<answer>",
            "</answer>",
            "<answer>a</answer>",
            "no finding ",
            "<|box_start|>",
        ] {
            let text = unit.repeat(1_000_000 / unit.len());
            for codec in all_codecs() {
                let start = std::time::Instant::now();
                read(codec, &text);
                assert!(start.elapsed().as_secs_f64() < 5.0, "{unit} {codec:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "\\PC*", pieces in prop::collection::vec(0usize..32, 0..40)) {
            const PIECES: [&str; 32] = [
                "[", "]", "(", ")", ",", "1", "-2.5", "nan", "inf", "1e999", " ", "polyp", "no finding", "<|", "<|box_start|>",
                "<|box_end|>", "<|object_ref_start|>", "```", "```json", "{", "}", "\"bbox_2d\":", "\"label\":", "é",
                "<think>", "</think>", "<answer>", "</answer>", "\"", "\\", "[]", "[{\"bbox\":[1,2,3,4],\"class\":\"x\"}",
            ];
            let assembled: String = pieces.iter().map(|i| PIECES[*i]).collect();
            for codec in all_codecs() {
                for t in [&text, &assembled, &format!("{assembled}{text}")] {
                    let a = read(codec, t);
                    prop_assert!(!a.no_finding || a.boxes.is_empty());
                    let readable = |f: ParseFault| !f.prevents_reading() || f == ParseFault::Bracket;
                    prop_assert!(!a.no_finding || a.fault.is_none_or(readable));
                    prop_assert!(a.fault.is_some() || a.no_finding || !(a.boxes.is_empty() || a.category.is_empty()));
                    prop_assert!(a.labels.is_empty() || a.labels.len() == a.boxes.len());
                    prop_assert!(a.span.is_some() || (a.boxes.is_empty() && !a.no_finding));
                    // A preceding thought does not change the parsed answer.
                    let thought = read(codec, &format!("<think>{}</think>{t}", t.replace("think>", "")));
                    let content = |a: &Answer| format!("{:?} {:?} {:?} {}", a.boxes, a.category, a.labels, a.no_finding);
                    prop_assert_eq!(content(&thought), content(&a));
                }
            }
        }

        #[test]
        fn round_trip_within_half_a_step(
            w in 8u32..3000, h in 8u32..3000, cols in 1u32..40, rows in 1u32..40,
            x in 0.0f64..1.0, y in 0.0f64..1.0, bw in 0.0f64..1.0, bh in 0.0f64..1.0,
        ) {
            let s = Sizes { original: (w, h), resized: (cols * 16, rows * 16) };
            let fw = f64::from(w);
            let fh = f64::from(h);
            let x1 = x * fw * 0.99;
            let y1 = y * fh * 0.99;
            let b: BBox = [x1 as f32, y1 as f32, (x1 + bw * (fw - x1)).max(x1 + 1e-3) as f32, (y1 + bh * (fh - y1)).max(y1 + 1e-3) as f32].into();
            prop_assume!(b.fault(w as f32, h as f32).is_none());
            for codec in all_codecs() {
                let code = codec.encode(&b, &s);
                let (ex, ey) = codec.extent(&s);
                let ex = (ex * codec.steps_per_unit()) as i64;
                let ey = (ey * codec.steps_per_unit()) as i64;
                prop_assert!(code[0] < code[2] && code[1] < code[3] && code[0] >= 0 && code[1] >= 0);
                prop_assert!(code[2] <= ex && code[3] <= ey);
                let back = read_answer(codec, &codec.write(&[code], "cyst"), &s);
                prop_assert_eq!((back.boxes.len(), back.category.as_str(), back.fault), (1, "cyst", None));
                let back = back.boxes[0];
                let (sx, sy) = codec.step(&s);
                for (a, o, step, side) in [
                    (back.x1, b.x1, sx, b.x2 - b.x1), (back.x2, b.x2, sx, b.x2 - b.x1),
                    (back.y1, b.y1, sy, b.y2 - b.y1), (back.y2, b.y2, sy, b.y2 - b.y1),
                ] {
                    let limit = if f64::from(side) >= step { 0.5 } else { 1.0 } * step + 1e-3;
                    prop_assert!(f64::from((a - o).abs()) <= limit, "{:?} {} {} {}", codec, a, o, limit);
                }
            }
        }
    }
}
