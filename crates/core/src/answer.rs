//! The answer text: boxes, then the category; or "no finding". Owns writing it and reading it back from anything a model may say.
//!
//! Coordinates here are whatever the model family's codec uses; mapping to original pixels is the codec's work.

use serde::{Deserialize, Serialize};

/// What an answer says, in the coordinates of the text.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Every group of four numbers, as written (never repaired, never dropped).
    pub boxes: Vec<[f64; 4]>,
    /// Text beside the boxes, trimmed.
    pub category: String,
    /// What each box is said to hold, where the form says it box by box: as many as boxes, "" = nothing is said of this one. Empty where
    /// the form does not.
    pub labels: Vec<String>,
    /// The text says "no finding".
    pub no_finding: bool,
    /// First deviation from the form, if any.
    pub fault: Option<ParseFault>,
}

/// Deviation from the answer's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParseFault {
    /// Nothing was said.
    Empty,
    /// A bracket does not hold four numbers, or is not closed.
    Bracket,
    /// Boxes without a category.
    NoCategory,
    /// A category without boxes.
    NoBox,
    /// Words before or between the boxes, or brackets after the category.
    Order,
    /// It reads well, but is written as the model was published to write it, not as it was asked for.
    OtherForm,
}

/// The words that stand for an empty answer.
pub const NO_FINDING: &str = "no finding";

/// Writes an answer: `[x1,y1,x2,y2], [..] category`, or `no finding` when there is no box.
pub fn format_answer<N: std::fmt::Display>(boxes: &[[N; 4]], category: &str) -> String {
    if boxes.is_empty() {
        return NO_FINDING.to_owned();
    }
    let list: Vec<String> = boxes.iter().map(|[x1, y1, x2, y2]| format!("[{x1},{y1},{x2},{y2}]")).collect();
    format!("{} {category}", list.join(", "))
}

/// Reads an answer from any text in one pass over its characters, time linear in its length.
pub fn parse_answer(text: &str) -> Answer {
    let mut out = Answer::default();
    let mut words = String::new();
    let mut words_before_box = false;
    let mut rest = text;
    while let Some(open) = rest.find('[') {
        words.push_str(&rest[..open]);
        words_before_box |= rest[..open].chars().any(|c| !c.is_whitespace() && c != ',');
        let inner = &rest[open + 1..];
        let end = inner.find(['[', ']']).unwrap_or(inner.len());
        let closed = inner[end..].starts_with(']');
        match numbers(&inner[..end]).filter(|_| closed) {
            Some(b) => out.boxes.push(b),
            None => out.fault = out.fault.or(Some(ParseFault::Bracket)),
        }
        rest = &inner[if closed { end + 1 } else { end }..];
    }
    words.push_str(rest);
    out.category = rest.trim().to_owned();
    out.no_finding = words.trim().eq_ignore_ascii_case(NO_FINDING) && out.boxes.is_empty() && out.fault.is_none();
    if out.no_finding {
        out.category.clear();
    } else if out.fault.is_none() {
        out.fault = match (out.boxes.is_empty(), out.category.is_empty()) {
            (true, true) => Some(ParseFault::Empty),
            (true, false) => Some(ParseFault::NoBox),
            (false, true) => Some(ParseFault::NoCategory),
            (false, false) if words_before_box => Some(ParseFault::Order),
            (false, false) => None,
        };
    }
    out
}

fn numbers(inner: &str) -> Option<[f64; 4]> {
    let mut out = [0.0; 4];
    let mut parts = inner.split(',');
    for slot in &mut out {
        *slot = parts.next()?.trim().parse().ok()?;
    }
    parts.next().is_none().then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let t = format_answer(&[[1, 2, 3, 4], [5, 6, 7, 8]], "white blood cell");
        assert_eq!(t, "[1,2,3,4], [5,6,7,8] white blood cell");
        let a = parse_answer(&t);
        assert_eq!(a.boxes, vec![[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]);
        assert_eq!((a.category.as_str(), a.fault), ("white blood cell", None));
        assert!(parse_answer(&format_answer::<i64>(&[], "x")).no_finding);
    }

    #[test]
    fn faults_are_named() {
        let f = |t: &str| parse_answer(t).fault;
        assert_eq!(f(""), Some(ParseFault::Empty));
        assert_eq!(f("nodule"), Some(ParseFault::NoBox));
        assert_eq!(f("[1,2,3,4]"), Some(ParseFault::NoCategory));
        assert_eq!(f("[1,2,3] nodule"), Some(ParseFault::Bracket));
        assert_eq!(f("[1,2,3,4 nodule"), Some(ParseFault::Bracket));
        assert_eq!(f("a [1,2,3,4] nodule"), Some(ParseFault::Order));
        assert_eq!(parse_answer("[[1,2,3,4]] x").boxes.len(), 1);
        assert!(parse_answer("[nan,1,inf,2] x").boxes[0][0].is_nan());
    }
}
