//! Parsing of a response: finds the answer span, then parses the answer in it.

use std::ops::Range;

use super::json::{JsonAnswer, find_json_answer};
use super::no_finding::{NO_FINDING_PHRASES, NoFindingPhrases};
use super::{Answer, ClassMatch, NO_FINDING, ParseFault, fold_class_name};

const REASONING_TAGS: [&str; 2] = ["<think>", "</think>"];
const ANSWER_TAGS: [&str; 2] = ["<answer>", "</answer>"];

/// Parser of answers, as configured in section `[answer]`.
///
/// 1. Everything up to the last `</think>` is dropped; a `<think>` that is never closed leaves no answer.
/// 2. The answer is the last closed span in the rest if a span is configured; otherwise the last `<answer>` pair if there is one, or all
///    of the rest.
/// 3. Inside it counts the last closed fence that holds JSON, else an unclosed fence, else the last bare JSON value, else the model
///    family's native form.
/// 4. Without boxes, a phrase such as "no finding" or an empty list means "no finding". Boxes win over such phrases.
///
/// # Examples
/// ```
/// use unveil_core::{AnswerReader, ClassMatch, ParseFault, parse_answer};
///
/// let reader = AnswerReader::default();
/// let answer = reader.read("[1,2,30,40] nodule", parse_answer);
/// assert_eq!((answer.boxes[0], answer.fault), ([1.0, 2.0, 30.0, 40.0], None));
///
/// // Another form is read too, and reported.
/// let answer = reader.read(r#"[{"bbox_2d": [1, 2, 30, 40], "label": "nodule"}]"#, parse_answer);
/// assert_eq!((answer.category.as_str(), answer.fault), ("nodule", Some(ParseFault::OtherForm)));
///
/// // Reasoning that never ends leaves no answer.
/// assert_eq!(reader.read("<think>[1,2,30,40] nodule", parse_answer).fault, Some(ParseFault::NoSpan));
///
/// let tags = ["<box>".to_owned(), "</box>".to_owned()];
/// let reader = AnswerReader::new(Some(tags), &["unremarkable"], ClassMatch::Equal);
/// assert!(reader.read("It is <box>Unremarkable.</box>", parse_answer).no_finding);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerReader {
    /// Opening and closing tag of the answer span, if one is configured.
    marks: Option<[String; 2]>,
    no_finding: NoFindingPhrases,
    /// Rule for comparing the category of an answer with a class.
    pub matching: ClassMatch,
}

impl Default for AnswerReader {
    fn default() -> Self {
        Self::new(None, &NO_FINDING_PHRASES, ClassMatch::Equal)
    }
}

impl AnswerReader {
    /// Creates a reader for answers between the opening and closing tag `marks`, if given. `no_finding` lists the phrases that mean "no
    /// finding", besides "no finding" itself.
    pub fn new<S: AsRef<str>>(marks: Option<[String; 2]>, no_finding: &[S], matching: ClassMatch) -> Self {
        Self { marks, no_finding: NoFindingPhrases::new(no_finding), matching }
    }

    /// Returns the byte range of the answer in `text`; `None` if there is no answer because the reasoning never ends or the configured span
    /// is not closed.
    pub fn span(&self, text: &str) -> Option<Range<usize>> {
        // Fast path: without this byte there is no tag.
        if self.marks.is_none() && !text.contains('<') {
            return Some(0..text.len());
        }
        let [open_reasoning, close_reasoning] = REASONING_TAGS;
        let from = text.rfind(close_reasoning).map_or(0, |start| start + close_reasoning.len());
        let rest = &text[from..];
        if rest.contains(open_reasoning) {
            return None;
        }
        let inside = match &self.marks {
            Some([open, close]) => last_closed_span(rest, open, close)?,
            None => last_closed_span(rest, ANSWER_TAGS[0], ANSWER_TAGS[1]).unwrap_or(0..rest.len()),
        };
        Some(from + inside.start..from + inside.end)
    }

    /// Parses a response in time linear in its length; `native` parses the model family's native form.
    pub fn read(&self, text: &str, native: impl FnOnce(&str) -> Answer) -> Answer {
        let Some(span) = self.span(text) else {
            let fault = if text.trim().is_empty() { ParseFault::Empty } else { ParseFault::NoSpan };
            return Answer { fault: Some(fault), ..Answer::default() };
        };
        let inside = &text[span.clone()];
        let mut out = match find_json_answer(inside) {
            Some(JsonAnswer::Objects(objects)) => objects.answer(|t| self.no_finding.matches(t)),
            Some(JsonAnswer::EmptyList { fenced: true }) => no_finding_answer(ParseFault::OtherForm),
            bare_list => {
                let read = native(inside);
                if !read.boxes.is_empty() {
                    read
                } else if bare_list.is_some() {
                    no_finding_answer(ParseFault::OtherForm)
                } else if read.fault == Some(ParseFault::NoBox) && self.no_finding.matches(inside) {
                    let plain = fold_class_name(inside) == NO_FINDING;
                    Answer {
                        fault: (!plain).then_some(ParseFault::OtherForm),
                        ..no_finding_answer(ParseFault::OtherForm)
                    }
                } else {
                    read
                }
            }
        };
        // Text around the answer is expected only if a span is configured.
        let alone = || [&text[..span.start], &text[span.end..]].concat().trim().is_empty();
        if self.marks.is_none() && span.len() < text.len() && !alone() {
            out.fault = out.fault.or(Some(ParseFault::OtherForm));
        }
        out.span = Some(span);
        out
    }
}

fn no_finding_answer(fault: ParseFault) -> Answer {
    Answer { no_finding: true, fault: Some(fault), ..Answer::default() }
}

/// Returns the byte range between the last `open` that is followed by a `close`, and the first `close` after it.
fn last_closed_span(text: &str, open: &str, close: &str) -> Option<Range<usize>> {
    let last = text.rfind(close)?;
    let from = text[..last].rfind(open)? + open.len();
    let end = from + text[from..].find(close)?;
    Some(from..end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::parse_answer;

    fn spanned(tag: &str) -> AnswerReader {
        let marks = [format!("<{tag}>"), format!("</{tag}>")];
        AnswerReader::new(Some(marks), &NO_FINDING_PHRASES, ClassMatch::Equal)
    }

    #[test]
    fn answer_span() {
        let span = |r: &AnswerReader, t: &str| r.span(t).map(|s| t[s].to_owned());
        let free = AnswerReader::default();
        let strict = spanned("box");
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
            assert_eq!(span(&free, text).as_deref(), want, "{text}");
            assert_eq!(span(&strict, text).as_deref(), want_box, "{text}");
        }
        let same = AnswerReader::new(Some(["##".into(), "##".into()]), &NO_FINDING_PHRASES, ClassMatch::Equal);
        assert_eq!(span(&same, "x ##a## y").as_deref(), Some("a"));
    }

    /// Returns the number of boxes, the class, and whether the answer is "no finding".
    fn parsed(text: &str) -> (usize, String, bool) {
        let a = AnswerReader::default().read(text, parse_answer);
        (a.boxes.len(), fold_class_name(&a.category), a.no_finding)
    }

    #[test]
    fn answer_content() {
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
            assert_eq!(parsed(text), (boxes, class.to_owned(), none), "{text}");
        }
    }

    #[test]
    fn deviations_from_the_form() {
        let f = |r: &AnswerReader, t: &str| r.read(t, parse_answer).fault;
        let free = AnswerReader::default();
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
