//! Qwen2-VL writes a label and its boxes between special tokens:
//! `<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`, in thousandths of the image's sides.
//!
//! Decoding skips special tokens, so a text is read alike with and without them.

use unveil_core::answer::joined;
use unveil_core::{Answer, BoxForm, NO_FINDING, ParseFault};

use super::{BoxCodec, Sizes};

/// Whole numbers from 0 to 1000, two per round bracket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoxTokens;

const TOKENS: [&str; 4] = ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"];

impl BoxCodec for BoxTokens {
    fn form(&self) -> BoxForm {
        BoxForm::Qwen2Vl
    }

    fn extent(&self, _: &Sizes) -> (f64, f64) {
        (1000.0, 1000.0)
    }

    fn special_tokens(&self) -> &'static [&'static str] {
        &TOKENS
    }

    fn write(&self, codes: &[[i64; 4]], category: &str) -> String {
        if codes.is_empty() {
            return NO_FINDING.to_owned();
        }
        let [ref_start, ref_end, box_start, box_end] = TOKENS;
        let mut out = format!("{ref_start}{category}{ref_end}");
        for [x1, y1, x2, y2] in codes {
            out.push_str(&format!("{box_start}({x1},{y1}),({x2},{y2}){box_end}"));
        }
        out
    }

    fn native(&self, text: &str) -> Answer {
        read(&without_tokens(text))
    }
}

/// The text without the form's tokens, as decoding gives it.
fn without_tokens(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("<|") {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let skipped = TOKENS.iter().find(|t| rest.starts_with(**t)).map_or(0, |t| t.len());
        if skipped == 0 {
            out.push_str("<|");
        }
        rest = &rest[skipped.max(2)..];
    }
    out.push_str(rest);
    out
}

/// Words are what stands outside of points; a round bracket before the first point that is none belongs to the label.
fn read(text: &str) -> Answer {
    let mut out = Answer::default();
    let mut words: Vec<&str> = Vec::new();
    // A label holds for the boxes behind it, up to the next one.
    let mut label = "";
    // First corner of a box, and where the words since the last point begin.
    let (mut corner, mut from, mut at) = (None::<[f64; 2]>, 0, 0);
    let mut faulty = false;
    while let Some(open) = text[at..].find('(').map(|i| at + i) {
        let inner = &text[open + 1..];
        let end = inner.find(['(', ')']).unwrap_or(inner.len());
        let closed = inner[end..].starts_with(')');
        let after = open + 1 + end + usize::from(closed);
        at = after;
        let Some(point) = point(&inner[..end]).filter(|_| closed) else {
            faulty |= corner.is_some() || !out.boxes.is_empty();
            continue;
        };
        let between = text[from..open].trim();
        from = after;
        match corner.take() {
            Some([x1, y1]) if between == "," => {
                out.boxes.push([x1, y1, point[0], point[1]]);
                out.labels.push(label.to_owned());
            }
            lone => {
                faulty |= lone.is_some();
                words.push(between);
                label = Some(bare(between)).filter(|w| !w.is_empty()).unwrap_or(label);
                corner = Some(point);
            }
        }
    }
    faulty |= corner.is_some();
    words.push(&text[from..]);
    let first_is_label = !words[0].trim().is_empty();
    let labels: Vec<&str> = words.iter().map(|w| bare(w)).filter(|w| !w.is_empty()).collect();
    out.fault = match (faulty, out.boxes.is_empty(), labels.len()) {
        (true, _, _) => Some(ParseFault::Bracket),
        (false, true, 0) => Some(ParseFault::Empty),
        (false, true, _) => Some(ParseFault::NoBox),
        (false, false, 0) => Some(ParseFault::NoCategory),
        (false, false, 1) if first_is_label => None,
        (false, false, _) => Some(ParseFault::Order),
    };
    out.words = words.join(" ");
    out.category = joined(labels.into_iter());
    out
}

/// Words without what separates them from boxes.
fn bare(words: &str) -> &str {
    words.trim_matches(|c: char| c.is_whitespace() || c == ',')
}

fn point(inner: &str) -> Option<[f64; 2]> {
    let (x, y) = inner.split_once(',')?;
    Some([x.trim().parse().ok()?, y.trim().parse().ok()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_and_without_tokens() {
        let text = BoxTokens.write(&[[1, 2, 3, 4], [5, 6, 700, 1000]], "polyp (flat)");
        assert_eq!(
            text,
            "<|object_ref_start|>polyp (flat)<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>\
             <|box_start|>(5,6),(700,1000)<|box_end|>"
        );
        let a = BoxTokens.native(&text);
        assert_eq!(a.boxes, [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 700.0, 1000.0]]);
        assert_eq!((a.category.as_str(), a.fault), ("polyp (flat)", None));
        assert_eq!(BoxTokens.native("polyp (flat)(1,2),(3,4)(5,6),(700,1000)"), a);
        assert_eq!(a.labels, ["polyp (flat)", "polyp (flat)"]);
        let two = BoxTokens.native("cyst(1,2),(3,4)(5,6),(7,8), mass(9,9),(20,20)");
        assert_eq!((two.labels.join("|"), two.category.as_str()), ("cyst|cyst|mass".to_owned(), "cyst, mass"));
        assert_eq!(BoxTokens.native("(1,2),(3,4) late").labels, [""]);
        assert_eq!(BoxTokens.write(&[], "x"), "no finding");
    }

    #[test]
    fn faults_are_named_and_nothing_is_dropped() {
        let r = |t: &str| {
            let a = BoxTokens.native(t);
            (a.boxes.len(), a.category, a.fault)
        };
        let say = |n, c: &str, f| (n, c.to_owned(), Some(f));
        assert_eq!(r(""), say(0, "", ParseFault::Empty));
        assert_eq!(r("nodule (left)"), say(0, "nodule (left)", ParseFault::NoBox));
        assert_eq!(r("(1,2),(3,4)"), say(1, "", ParseFault::NoCategory));
        assert_eq!(r("(1,2),(3,4) nodule"), say(1, "nodule", ParseFault::Order));
        assert_eq!(r("cyst(1,2),(3,4)nodule(1,2),(3,4)"), say(2, "cyst, nodule", ParseFault::Order));
        assert_eq!(r("cyst(1,2),(3,4)cyst(1,2),(3,4)"), say(2, "cyst", ParseFault::Order));
        for bad in ["cyst(1,2)", "cyst(1,2) (3,4)", "cyst(1,2),(3,4", "cyst(1,2),(3,4),(5,6)", "cyst(1,2),(a,b)"] {
            assert_eq!(BoxTokens.native(bad).fault, Some(ParseFault::Bracket), "{bad}");
        }
        let a = BoxTokens.native("cyst(nan,2),(inf,-4)(900,900),(1,1)");
        assert!(a.boxes[0][0].is_nan() && a.boxes[0][2].is_infinite() && a.boxes[1] == [900.0, 900.0, 1.0, 1.0]);
    }
}
