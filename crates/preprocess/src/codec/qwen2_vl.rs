//! Qwen2-VL writes a label and its boxes between special tokens:
//! `<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`, in thousandths of the image's sides.
//!
//! Decoding skips special tokens, so texts with and without them are parsed alike.

use unveil_core::answer::join_labels;
use unveil_core::{Answer, BoxForm, NO_FINDING, ParseFault};

use super::{BoxCodec, Sizes};

/// Codec with integers from 0 to 1000, two per pair of parentheses.
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

    fn parse_native(&self, text: &str) -> Answer {
        parse_plain(&strip_tokens(text))
    }
}

/// Removes the form's special tokens from a text, as decoding does.
fn strip_tokens(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(position) = rest.find("<|") {
        out.push_str(&rest[..position]);
        rest = &rest[position..];
        let skipped = TOKENS.iter().find(|t| rest.starts_with(**t)).map_or(0, |t| t.len());
        if skipped == 0 {
            out.push_str("<|");
        }
        rest = &rest[skipped.max(2)..];
    }
    out.push_str(rest);
    out
}

/// Parses a text without special tokens. Text outside of points counts as words; parentheses before the first point that are not a point
/// belong to the label.
fn parse_plain(text: &str) -> Answer {
    let mut out = Answer::default();
    let mut words: Vec<&str> = Vec::new();
    // A label applies to the boxes after it, up to the next label.
    let mut label = "";
    // First corner of the current box.
    let mut corner = None::<[f64; 2]>;
    // Start of the words since the last point.
    let mut from = 0;
    let mut position = 0;
    let mut malformed = false;
    while let Some(open) = text[position..].find('(').map(|i| position + i) {
        let inner = &text[open + 1..];
        let end = inner.find(['(', ')']).unwrap_or(inner.len());
        let closed = inner[end..].starts_with(')');
        let after = open + 1 + end + usize::from(closed);
        position = after;
        let Some(point) = point(&inner[..end]).filter(|_| closed) else {
            malformed |= corner.is_some() || !out.boxes.is_empty();
            continue;
        };
        let between = text[from..open].trim();
        from = after;
        match corner.take() {
            Some([x1, y1]) if between == "," => {
                out.boxes.push([x1, y1, point[0], point[1]]);
                out.labels.push(label.to_owned());
            }
            unpaired => {
                malformed |= unpaired.is_some();
                words.push(between);
                label = Some(trim_separators(between)).filter(|w| !w.is_empty()).unwrap_or(label);
                corner = Some(point);
            }
        }
    }
    malformed |= corner.is_some();
    words.push(&text[from..]);
    let first_is_label = !words[0].trim().is_empty();
    let labels: Vec<&str> = words.iter().map(|w| trim_separators(w)).filter(|w| !w.is_empty()).collect();
    out.fault = match (malformed, out.boxes.is_empty(), labels.len()) {
        (true, _, _) => Some(ParseFault::Bracket),
        (false, true, 0) => Some(ParseFault::Empty),
        (false, true, _) => Some(ParseFault::NoBox),
        (false, false, 0) => Some(ParseFault::NoCategory),
        (false, false, 1) if first_is_label => None,
        (false, false, _) => Some(ParseFault::Order),
    };
    out.words = words.join(" ");
    out.category = join_labels(labels.into_iter());
    out
}

/// Removes the separators between words and boxes.
fn trim_separators(words: &str) -> &str {
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
        let a = BoxTokens.parse_native(&text);
        assert_eq!(a.boxes, [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 700.0, 1000.0]]);
        assert_eq!((a.category.as_str(), a.fault), ("polyp (flat)", None));
        assert_eq!(BoxTokens.parse_native("polyp (flat)(1,2),(3,4)(5,6),(700,1000)"), a);
        assert_eq!(a.labels, ["polyp (flat)", "polyp (flat)"]);
        let two = BoxTokens.parse_native("cyst(1,2),(3,4)(5,6),(7,8), mass(9,9),(20,20)");
        assert_eq!((two.labels.join("|"), two.category.as_str()), ("cyst|cyst|mass".to_owned(), "cyst, mass"));
        assert_eq!(BoxTokens.parse_native("(1,2),(3,4) late").labels, [""]);
        assert_eq!(BoxTokens.write(&[], "x"), "no finding");
    }

    #[test]
    fn deviations_are_named_and_boxes_kept() {
        let r = |t: &str| {
            let a = BoxTokens.parse_native(t);
            (a.boxes.len(), a.category, a.fault)
        };
        let expected = |n, c: &str, f| (n, c.to_owned(), Some(f));
        assert_eq!(r(""), expected(0, "", ParseFault::Empty));
        assert_eq!(r("nodule (left)"), expected(0, "nodule (left)", ParseFault::NoBox));
        assert_eq!(r("(1,2),(3,4)"), expected(1, "", ParseFault::NoCategory));
        assert_eq!(r("(1,2),(3,4) nodule"), expected(1, "nodule", ParseFault::Order));
        assert_eq!(r("cyst(1,2),(3,4)nodule(1,2),(3,4)"), expected(2, "cyst, nodule", ParseFault::Order));
        assert_eq!(r("cyst(1,2),(3,4)cyst(1,2),(3,4)"), expected(2, "cyst", ParseFault::Order));
        for bad in ["cyst(1,2)", "cyst(1,2) (3,4)", "cyst(1,2),(3,4", "cyst(1,2),(3,4),(5,6)", "cyst(1,2),(a,b)"] {
            assert_eq!(BoxTokens.parse_native(bad).fault, Some(ParseFault::Bracket), "{bad}");
        }
        let a = BoxTokens.parse_native("cyst(nan,2),(inf,-4)(900,900),(1,1)");
        assert!(a.boxes[0][0].is_nan() && a.boxes[0][2].is_infinite() && a.boxes[1] == [900.0, 900.0, 1.0, 1.0]);
    }
}
