//! The one way in which an answer is read: where in a response it stands, then what it says.

use std::ops::Range;

use super::json::{Found, find};
use super::nothing::{NO_FINDING_PHRASES, Phrases};
use super::{Answer, ClassMatch, NO_FINDING, ParseFault, fold};

const THINK: [&str; 2] = ["<think>", "</think>"];
const ANSWER: [&str; 2] = ["<answer>", "</answer>"];

/// How answers are read (`[answer]` of a configuration).
///
/// 1. Everything up to the last `</think>` is dropped; a `<think>` that is never closed leaves no answer.
/// 2. Of the rest the last closed span counts, where one is configured; without one, a pair of `<answer>` where there is one.
/// 3. Inside: the last closed fence that holds JSON, else one that is not closed, else the last JSON value that stands bare, else the
///    model family's own form.
/// 4. No box, and nothing but a phrase such as "no finding" or an empty list: nothing is there. Boxes win over such phrases.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    marks: Option<[String; 2]>,
    nothing: Phrases,
    /// How the category of an answer is compared with a class.
    pub matching: ClassMatch,
}

impl Default for Reading {
    fn default() -> Self {
        Self::new(None, &NO_FINDING_PHRASES, ClassMatch::Equal)
    }
}

impl Reading {
    /// A reading of answers that stand between `marks`, if there are any, and of phrases that say that nothing is there ("no finding"
    /// always does).
    pub fn new<S: AsRef<str>>(marks: Option<[String; 2]>, no_finding: &[S], matching: ClassMatch) -> Self {
        Self { marks, nothing: Phrases::new(no_finding), matching }
    }

    /// Bytes of `text` in which the answer stands; none where it holds no answer: its reasoning never ends, or a span that is
    /// configured is not closed.
    pub fn span(&self, text: &str) -> Option<Range<usize>> {
        // Without this byte there is no tag.
        if self.marks.is_none() && !text.contains('<') {
            return Some(0..text.len());
        }
        let [think, thought] = THINK;
        let from = text.rfind(thought).map_or(0, |at| at + thought.len());
        let rest = &text[from..];
        if rest.contains(think) {
            return None;
        }
        let inside = match &self.marks {
            Some([open, close]) => last_closed(rest, open, close)?,
            None => last_closed(rest, ANSWER[0], ANSWER[1]).unwrap_or(0..rest.len()),
        };
        Some(from + inside.start..from + inside.end)
    }

    /// Reads a response in time linear in its length; `native` reads the model family's own form.
    pub fn read(&self, text: &str, native: impl FnOnce(&str) -> Answer) -> Answer {
        let Some(span) = self.span(text) else {
            let fault = if text.trim().is_empty() { ParseFault::Empty } else { ParseFault::NoSpan };
            return Answer { fault: Some(fault), ..Answer::default() };
        };
        let inside = &text[span.clone()];
        let mut out = match find(inside) {
            Some(Found::Objects(objects)) => objects.answer(|t| self.nothing.hold(t)),
            Some(Found::EmptyList { fenced: true }) => nothing(ParseFault::OtherForm),
            found => {
                let read = native(inside);
                if !read.boxes.is_empty() {
                    read
                } else if found.is_some() {
                    nothing(ParseFault::OtherForm)
                } else if read.fault == Some(ParseFault::NoBox) && self.nothing.hold(inside) {
                    let plain = fold(inside) == NO_FINDING;
                    Answer { fault: (!plain).then_some(ParseFault::OtherForm), ..nothing(ParseFault::OtherForm) }
                } else {
                    read
                }
            }
        };
        // What stands around an answer is part of its form only where a span is asked for.
        let around = || [&text[..span.start], &text[span.end..]].concat().trim().is_empty();
        if self.marks.is_none() && span.len() < text.len() && !around() {
            out.fault = out.fault.or(Some(ParseFault::OtherForm));
        }
        out.span = Some(span);
        out
    }
}

fn nothing(fault: ParseFault) -> Answer {
    Answer { no_finding: true, fault: Some(fault), ..Answer::default() }
}

/// Bytes between the last pair of `open` and `close`, up to the first `close` behind the opening.
fn last_closed(text: &str, open: &str, close: &str) -> Option<Range<usize>> {
    let last = text.rfind(close)?;
    let from = text[..last].rfind(open)? + open.len();
    let end = from + text[from..].find(close)?;
    Some(from..end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::parse_answer;

    fn spanned(tag: &str) -> Reading {
        let marks = [format!("<{tag}>"), format!("</{tag}>")];
        Reading::new(Some(marks), &NO_FINDING_PHRASES, ClassMatch::Equal)
    }

    #[test]
    fn where_the_answer_stands() {
        let at = |r: &Reading, t: &str| r.span(t).map(|s| t[s].to_owned());
        let (free, strict) = (Reading::default(), spanned("box"));
        for (text, want, want_box) in [
            ("x", Some("x"), None),
            ("", Some(""), None),
            ("<think>a</think>b", Some("b"), None),
            ("a</think>b", Some("b"), None),
            ("<think>a</think>b</think>c", Some("c"), None),
            ("<think>a", None, None),
            ("<think>a</think>b<think>c", None, None),
            ("<answer>a</answer>", Some("a"), None),
            ("<answer>a</answer> b <answer>c</answer> d", Some("c"), None),
            ("<answer>a</answer><answer>b", Some("a"), None),
            ("<answer>a <answer>b</answer></answer>", Some("b"), None),
            ("<answer>a", Some("<answer>a"), None),
            ("a</answer>", Some("a</answer>"), None),
            ("<think><answer>a</answer></think>b", Some("b"), None),
            ("<answer>a</answer><think>b</think>", Some(""), None),
            ("<think>t</think><box>a</box>", Some("<box>a</box>"), Some("a")),
            ("<box>a</box><answer>b</answer>", Some("b"), Some("a")),
            ("<box>é</box>", Some("<box>é</box>"), Some("é")),
            ("<think><box>a</box>", None, None),
        ] {
            assert_eq!(at(&free, text).as_deref(), want, "{text}");
            assert_eq!(at(&strict, text).as_deref(), want_box, "{text}");
        }
        let same = Reading::new(Some(["##".into(), "##".into()]), &NO_FINDING_PHRASES, ClassMatch::Equal);
        assert_eq!(at(&same, "x ##a## y").as_deref(), Some("a"));
    }

    /// Boxes, class, and whether it says that nothing is there.
    fn said(text: &str) -> (usize, String, bool) {
        let a = Reading::default().read(text, parse_answer);
        (a.boxes.len(), fold(&a.category), a.no_finding)
    }

    #[test]
    fn what_it_says() {
        for (text, boxes, class, none) in [
            ("[1,2,3,4] Nodule.", 1, "nodule", false),
            ("<think>maybe [1,1,5,5] mass</think><answer>[1,2,3,4] nodule</answer>", 1, "nodule", false),
            (
                "<think>I would write ```json\n[{\"bbox_2d\":[1,1,9,9],\"label\":\"mass\"}]\n```</think>\n<answer>\n```json\n[{\"bbox_2d\":[1,2,3,4],\"label\":\"nodule\"}]\n```\n</answer>",
                1,
                "nodule",
                false,
            ),
            ("The edge [1,1,5,5] is dense. {\"bbox_2d\":[1,2,3,4],\"label\":\"nodule\"}", 1, "nodule", false),
            ("No finding.", 0, "", true),
            ("no findings", 0, "", true),
            ("**no finding**", 0, "", true),
            ("[]", 0, "", true),
            ("No findings: []", 0, "", true),
            ("```json\n[]\n```", 0, "", true),
            ("Perhaps [1,1,5,5] mass, but no:\n```json\n[]\n```", 0, "", true),
            ("Perhaps [1,1,5,5] mass, but no:\n```json\n[]", 0, "", true),
            (
                "```json\n[{\"bbox_2d\":[1,2,3,4],\"label\":\"nodule\"}]\n```\nand not {\"bbox_2d\":[1,1,9,9],\"label\":\"mass\"}",
                1,
                "nodule",
                false,
            ),
            ("<answer>no finding</answer>", 0, "", true),
            ("<think>A [1,2,3,4] nodule?</think> no finding", 0, "", true),
            ("No abnormality is seen.", 0, "", true),
            ("No finding, but see [1,2,3,4]", 1, "", false),
            ("no finding [1,2,3,4] nodule", 1, "nodule", false),
            ("[] [1,2,3,4] nodule", 1, "nodule", false),
            ("[1,2,3,4] no finding", 1, "no finding", false),
            ("no finding [", 0, "", false),
            ("<think>no finding", 0, "", false),
            ("nodule", 0, "nodule", false),
            ("", 0, "", false),
        ] {
            assert_eq!(said(text), (boxes, class.to_owned(), none), "{text}");
        }
    }

    #[test]
    fn faults_of_form() {
        let f = |r: &Reading, t: &str| r.read(t, parse_answer).fault;
        let free = Reading::default();
        for fine in ["no finding", "No finding.", "**No Finding**", "[1,2,3,4] nodule", " [1,2,3,4] nodule\n"] {
            assert_eq!(f(&free, fine), None, "{fine}");
        }
        for other in ["[]", "No abnormality is seen.", "<answer>no finding</answer>", "<think></think>[1,2,3,4] nodule"]
        {
            assert_eq!(f(&free, other), Some(ParseFault::OtherForm), "{other}");
        }
        assert_eq!(f(&free, "<think>[1,2,3,4] nodule"), Some(ParseFault::NoSpan));
        let strict = spanned("answer");
        assert_eq!(f(&strict, "<think>why</think> <answer>[1,2,3,4] nodule</answer>"), None);
        assert_eq!(f(&strict, "[1,2,3,4] nodule"), Some(ParseFault::NoSpan));
        assert_eq!((f(&strict, " "), f(&free, "")), (Some(ParseFault::Empty), Some(ParseFault::Empty)));
    }
}
