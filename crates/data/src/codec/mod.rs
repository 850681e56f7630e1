//! Box codecs: between boxes in original-image pixels and the numbers that a model family writes; and the answer text made of them.
//!
//! The only place where a box is anything but original pixels. Must not know: tokenizers, images, files.

mod absolute;
mod llava;
mod per_mille;
mod qwen2_vl;

use std::ops::Range;

use serde::{Deserialize, Serialize};
use unveil_core::record::REGION;
use unveil_core::{Answer, BBox, BoxForm, ParseFault, Reading, Record, format_answer, parse_answer};

pub use absolute::AbsoluteResized;
pub use llava::Fractions;
pub use per_mille::PerMille;
pub use qwen2_vl::BoxTokens;

use crate::prepare::PrepareError;

/// Sizes `(width, height)` in pixels of an image before and after the processor's resize.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// As in the file.
    pub original: (u32, u32),
    /// As the model sees it.
    pub resized: (u32, u32),
}

/// How a model family writes boxes.
pub trait BoxCodec: std::fmt::Debug + Send + Sync {
    /// The form that this codec is of.
    fn form(&self) -> BoxForm;

    /// Largest numbers `(x, y)` that stand for the right and bottom border; 0 stands for the left and top border.
    fn extent(&self, sizes: &Sizes) -> (f64, f64);

    /// Code steps that make 1 in the text.
    fn steps_per_unit(&self) -> f64 {
        1.0
    }

    /// Special tokens that answers are written with; they must not be banned from sampling.
    fn special_tokens(&self) -> &'static [&'static str] {
        &[]
    }

    /// The answer text of boxes in code steps and a category; "no finding" when there is no box.
    fn write(&self, codes: &[[i64; 4]], category: &str) -> String {
        format_answer(codes, category)
    }

    /// Reads the form's own answers from any text, with or without special tokens, in time linear in its length. Boxes come back in the
    /// text's numbers. A response is read by [`read_answer`], which knows where in it the answer stands.
    fn native(&self, text: &str) -> Answer {
        parse_answer(text)
    }

    /// Code steps of a box given in original pixels, clamped to the image. Each is within half a code step of the truth, except that a
    /// box narrower than a step, which would lose its area, is widened to one step (then within one step).
    fn encode(&self, b: &BBox, sizes: &Sizes) -> [i64; 4] {
        let ((ex, ey), steps) = (self.extent(sizes), self.steps_per_unit());
        let (ex, ey) = (ex * steps, ey * steps);
        let (w, h) = (f64::from(sizes.original.0), f64::from(sizes.original.1));
        let (x1, x2) = interval(f64::from(b.x1) * ex / w, f64::from(b.x2) * ex / w, ex);
        let (y1, y2) = interval(f64::from(b.y1) * ey / h, f64::from(b.y2) * ey / h, ey);
        [x1, y1, x2, y2]
    }

    /// Box in original pixels of the numbers that a model wrote. Never repaired: what lies outside or is inverted stays so, and what
    /// is too large for f32 becomes infinite.
    fn decode(&self, numbers: &[f64; 4], sizes: &Sizes) -> BBox {
        let (ex, ey) = self.extent(sizes);
        let (sx, sy) = (f64::from(sizes.original.0) / ex, f64::from(sizes.original.1) / ey);
        let [x1, y1, x2, y2] = *numbers;
        [(x1 * sx) as f32, (y1 * sy) as f32, (x2 * sx) as f32, (y2 * sy) as f32].into()
    }

    /// Original pixels per code step `(x, y)`.
    fn step(&self, sizes: &Sizes) -> (f64, f64) {
        let ((ex, ey), steps) = (self.extent(sizes), self.steps_per_unit());
        (f64::from(sizes.original.0) / (ex * steps), f64::from(sizes.original.1) / (ey * steps))
    }
}

/// The codec of a form.
pub fn codec(form: BoxForm) -> &'static dyn BoxCodec {
    match form {
        BoxForm::Absolute => &AbsoluteResized,
        BoxForm::PerMille => &PerMille,
        BoxForm::Qwen2Vl => &BoxTokens,
        BoxForm::Llava => &Fractions,
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
    /// What the boxes are said to hold; several labels are joined by commas.
    pub category: String,
    /// What each box is said to hold ([`Answer::labels`]); empty where the form does not say it box by box.
    pub labels: Vec<String>,
    /// All words beside the boxes, wherever they stand.
    pub words: String,
    /// The text says that nothing is there.
    pub no_finding: bool,
    /// First deviation from the answer's form, if any.
    pub fault: Option<ParseFault>,
    /// Bytes of the text that were read; none where it holds no answer.
    pub span: Option<Range<usize>>,
}

/// The training answer of a record: its boxes in the family's numbers, sorted by (x1, y1), then its category; or "no finding". Where the
/// record's answer holds `<region>`, that answer with all this in its place; a question in text has its answer as it is.
///
/// # Errors
/// A record with boxes but no category, with a category that does not read back in this form, or with a box that is not valid for its
/// image; a question in text without an answer; boxes that do not read back from the whole answer.
pub fn answer_text(codec: &dyn BoxCodec, record: &Record, sizes: &Sizes) -> Result<String, PrepareError> {
    let bad = |what: String| PrepareError::Record { id: record.id.clone(), what };
    let (category, told) = (record.category.trim(), record.answer.trim());
    if record.is_text() {
        return if told.is_empty() {
            Err(bad("its question is one in text, but it has no answer".to_owned()))
        } else {
            Ok(told.to_owned())
        };
    }
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
    let text = codec.write(&boxes, category);
    let read = |text: &str| Reading::default().read(text, |inside| codec.native(inside));
    let back = read(&text);
    if back.boxes.len() != boxes.len() || back.fault.is_some() || (!boxes.is_empty() && back.category != category) {
        return Err(bad(format!("the category {category:?} cannot be told from a box in the form `{}`", codec.form())));
    }
    if !told.contains(REGION) {
        return Ok(text);
    }
    let whole = told.replacen(REGION, &text, 1);
    if read(&whole).boxes != back.boxes || whole.contains(REGION) {
        return Err(bad(format!("its answer holds more than one {REGION}, or other boxes")));
    }
    Ok(whole)
}

/// Reads a response as `reading` says; its boxes come back in original pixels. JSON gives them in the form's own numbers.
pub fn read_answer(codec: &dyn BoxCodec, reading: &Reading, text: &str, sizes: &Sizes) -> GroundedAnswer {
    let a = reading.read(text, |inside| codec.native(inside));
    GroundedAnswer {
        boxes: a.boxes.iter().map(|b| codec.decode(b, sizes)).collect(),
        category: a.category,
        labels: a.labels,
        words: a.words,
        no_finding: a.no_finding,
        fault: a.fault,
        span: a.span,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use unveil_core::Task;

    fn record(boxes: Vec<BBox>, category: &str) -> Record {
        let v = serde_json::json!({"id": "r7", "image": "a.png", "category": category, "boxes": boxes});
        serde_json::from_value(v).unwrap()
    }

    const SIZES: Sizes = Sizes { original: (640, 480), resized: (128, 96) };

    fn read_answer(codec: &dyn BoxCodec, text: &str, sizes: &Sizes) -> GroundedAnswer {
        super::read_answer(codec, &Reading::default(), text, sizes)
    }

    fn read(codec: &dyn BoxCodec, text: &str) -> Answer {
        Reading::default().read(text, |inside| codec.native(inside))
    }

    fn each() -> impl Iterator<Item = &'static dyn BoxCodec> {
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
        for (codec, want) in each().zip(want) {
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
    fn answers_in_text_are_the_targets() {
        let r = record(vec![[320.0, 100.0, 400.0, 200.0].into()], "polyp");
        for codec in each() {
            let plain = answer_text(codec, &r, &SIZES).unwrap();
            let told = |answer: &str| answer_text(codec, &Record { answer: answer.into(), ..r.clone() }, &SIZES);
            assert_eq!(told("Remarks without a place.").unwrap(), plain);
            let whole = told("A raised lesion is seen.\n<region>").unwrap();
            assert_eq!(whole, format!("A raised lesion is seen.\n{plain}"));
            let back = read_answer(codec, &whole, &SIZES);
            assert_eq!(back.boxes, read_answer(codec, &plain, &SIZES).boxes);
            assert!(told("<region> and <region>").unwrap_err().to_string().contains("more than one"));
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
        for codec in each() {
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
        for codec in each() {
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
    fn published_json_is_read_in_the_forms_own_numbers() {
        let text = "```json\n[{\"bbox_2d\": [64, 24, 128, 48], \"label\": \"polyp\"}]\n```";
        let a = read_answer(&AbsoluteResized, text, &SIZES);
        assert_eq!((a.boxes, a.category.as_str()), (vec![[320.0, 120.0, 640.0, 240.0].into()], "polyp"));
        assert_eq!(a.fault, Some(ParseFault::OtherForm));
        assert_eq!(read_answer(&PerMille, text, &SIZES).boxes, [[40.96, 11.52, 81.92, 23.04].into()]);
    }

    #[test]
    fn every_form_reads_json_and_what_stands_around_an_answer() {
        let numbers = [
            [64.0, 24.0, 128.0, 48.0],
            [500.0, 250.0, 1000.0, 500.0],
            [500.0, 250.0, 1000.0, 500.0],
            [0.5, 0.25, 1.0, 0.5],
        ];
        for (codec, n) in each().zip(numbers) {
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
                assert_eq!(unveil_core::answer::fold(&a.category), "polyp", "{codec:?} {text}");
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
            for codec in each() {
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
            let made: String = pieces.iter().map(|i| PIECES[*i]).collect();
            for codec in each() {
                for t in [&text, &made, &format!("{made}{text}")] {
                    let a = read(codec, t);
                    prop_assert!(!a.no_finding || a.boxes.is_empty());
                    prop_assert!(!a.no_finding || matches!(a.fault, None | Some(ParseFault::OtherForm | ParseFault::Bracket)));
                    prop_assert!(a.fault.is_some() || a.no_finding || !(a.boxes.is_empty() || a.category.is_empty()));
                    prop_assert!(a.labels.is_empty() || a.labels.len() == a.boxes.len());
                    prop_assert!(a.span.is_some() || (a.boxes.is_empty() && !a.no_finding));
                    // Whatever was thought before changes nothing of what is read.
                    let thought = read(codec, &format!("<think>{}</think>{t}", t.replace("think>", "")));
                    let said = |a: &Answer| format!("{:?} {:?} {:?} {}", a.boxes, a.category, a.labels, a.no_finding);
                    prop_assert_eq!(said(&thought), said(&a));
                }
            }
        }

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
            for codec in each() {
                let code = codec.encode(&b, &s);
                let (ex, ey) = codec.extent(&s);
                let (ex, ey) = ((ex * codec.steps_per_unit()) as i64, (ey * codec.steps_per_unit()) as i64);
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
