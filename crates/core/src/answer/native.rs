//! Native answer form, which stage 1 teaches most families: boxes in square brackets, then the category.

use super::{Answer, ParseFault, parse_four_numbers};

/// Parses boxes in square brackets and the category after them, in one pass over the text.
///
/// Does not recognise phrases such as "no finding"; [`AnswerReader`](super::AnswerReader) does.
pub fn parse_answer(text: &str) -> Answer {
    let mut out = Answer::default();
    let mut words_before_box = false;
    let mut rest = text;
    while let Some(open) = rest.find('[') {
        out.words.push_str(&rest[..open]);
        words_before_box |= rest[..open].chars().any(|c| !c.is_whitespace() && c != ',');
        let inner = &rest[open + 1..];
        let end = inner.find(['[', ']']).unwrap_or(inner.len());
        let closed = inner[end..].starts_with(']');
        match parse_four_numbers(&inner[..end]).filter(|_| closed) {
            Some(b) => out.boxes.push(b),
            None => out.fault = out.fault.or(Some(ParseFault::Bracket)),
        }
        rest = &inner[if closed { end + 1 } else { end }..];
    }
    out.words.push_str(rest);
    out.category = rest.trim().to_owned();
    if out.fault.is_none() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::{AnswerReader, format_answer};

    #[test]
    fn round_trip() {
        let t = format_answer(&[[1, 2, 3, 4], [5, 6, 7, 8]], "white blood cell");
        assert_eq!(t, "[1,2,3,4], [5,6,7,8] white blood cell");
        let a = parse_answer(&t);
        assert_eq!(a.boxes, vec![[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]);
        assert_eq!((a.category.as_str(), a.fault), ("white blood cell", None));
        let none = AnswerReader::default().read(&format_answer::<i64>(&[], "x"), parse_answer);
        assert!(none.no_finding && none.fault.is_none());
    }

    #[test]
    fn malformed_answers_report_their_fault() {
        let f = |t: &str| parse_answer(t).fault;
        assert_eq!(f(""), Some(ParseFault::Empty));
        assert_eq!(f("nodule"), Some(ParseFault::NoBox));
        assert_eq!(f("[1,2,3,4]"), Some(ParseFault::NoCategory));
        assert_eq!(f("[1,2,3] nodule"), Some(ParseFault::Bracket));
        assert_eq!(f("[1,2,3,4 nodule"), Some(ParseFault::Bracket));
        assert_eq!(f("a [1,2,3,4] nodule"), Some(ParseFault::Order));
        assert_eq!(parse_answer("[[1,2,3,4]] x").boxes.len(), 1);
        assert!(parse_answer("[nan,1,inf,2] x").boxes[0][0].is_nan());
        assert_eq!(parse_answer("a [1,2,3,4], b [5] c").words, "a , b  c");
    }
}
