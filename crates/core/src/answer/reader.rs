//! Parsing of a response: finds the answer span, then parses the answer in it.

use std::ops::Range;

use super::form::json_form_fault;
use super::json::{JsonAnswer, find_json_answer};
use super::no_finding::{NO_FINDING_PHRASES, NoFindingPhrases};
use super::{Answer, AnswerForm, ClassMatch, NO_FINDING, ParseFault, Reasoning, fold_class_name};

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
/// Every form is read; the configured form, span and reasoning only decide which [`ParseFault`] the answer has.
///
/// # Examples
/// ```
/// use unveil_core::{AnswerForm, AnswerReader, ClassMatch, ParseFault, Reasoning, parse_answer};
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
/// assert_eq!(reader.read("<think>[1,2,30,40] nodule", parse_answer).fault, Some(ParseFault::OpenReasoning));
///
/// let tags = ["<box>".to_owned(), "</box>".to_owned()];
/// let reader = AnswerReader::new(Some(tags), &["unremarkable"], ClassMatch::Equal);
/// assert!(reader.read("It is <box>Unremarkable.</box>", parse_answer).no_finding);
///
/// let reader = AnswerReader::default().with_form(AnswerForm::Json).with_reasoning(Reasoning::Optional);
/// let answer = reader.read(r#"<think>Round.</think>[{"bbox_2d": [1, 2, 30, 40], "label": "nodule"}]"#, parse_answer);
/// assert_eq!((answer.boxes[0], answer.fault), ([1.0, 2.0, 30.0, 40.0], None));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerReader {
    /// Opening and closing tag of the answer span, if one is configured.
    marks: Option<[String; 2]>,
    no_finding: NoFindingPhrases,
    form: AnswerForm,
    reasoning: Reasoning,
    /// Rule for comparing the category of an answer with a class.
    pub matching: ClassMatch,
}

impl Default for AnswerReader {
    fn default() -> Self {
        Self::new(None, &NO_FINDING_PHRASES, ClassMatch::Equal)
    }
}

impl AnswerReader {
    /// Creates a reader for answers between the opening and closing tag `marks`, if given, in the native form and without reasoning.
    /// `no_finding` lists the phrases that mean "no finding", besides "no finding" itself.
    pub fn new<S: AsRef<str>>(marks: Option<[String; 2]>, no_finding: &[S], matching: ClassMatch) -> Self {
        let no_finding = NoFindingPhrases::new(no_finding);
        Self { marks, no_finding, form: AnswerForm::Native, reasoning: Reasoning::None, matching }
    }

    /// Sets the expected form.
    #[must_use]
    pub fn with_form(self, form: AnswerForm) -> Self {
        Self { form, ..self }
    }

    /// Sets whether reasoning is expected.
    #[must_use]
    pub fn with_reasoning(self, reasoning: Reasoning) -> Self {
        Self { reasoning, ..self }
    }

    /// Returns the expected form.
    pub fn form(&self) -> AnswerForm {
        self.form
    }

    /// Returns the opening and closing tag of the answer span, if one is configured.
    pub fn marks(&self) -> Option<&[String; 2]> {
        self.marks.as_ref()
    }

    /// Returns the configured tags, which a tokenizer must preserve.
    pub fn tags(&self) -> Vec<&str> {
        let marks = self.marks.iter().flatten().map(String::as_str);
        marks.chain(REASONING_TAGS.into_iter().filter(|_| self.reasoning != Reasoning::None)).collect()
    }

    /// Returns whether reasoning is expected.
    pub fn reasoning(&self) -> Reasoning {
        self.reasoning
    }

    /// Returns `answer` with the tags of the configured span around everything after its reasoning; unchanged without a span, or if it
    /// already has one.
    pub fn enclose(&self, answer: String) -> String {
        let Some([open, close]) = &self.marks else { return answer };
        let (reasoning, rest) = answer.split_at(answer_start(&answer));
        match last_closed_span(rest, open, close) {
            Some(_) => answer,
            None => format!("{reasoning}{open}{}{close}", rest.trim_start()),
        }
    }

    /// Returns the byte range of the answer in `text`; `None` if there is no answer because the reasoning never ends or the configured span
    /// is not closed.
    pub fn span(&self, text: &str) -> Option<Range<usize>> {
        // Fast path: without this byte there is no tag.
        if self.marks.is_none() && !text.contains('<') {
            return Some(0..text.len());
        }
        let from = answer_start(text);
        let rest = &text[from..];
        if rest.contains(REASONING_TAGS[0]) {
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
            let fault = match text.trim() {
                "" => ParseFault::Empty,
                _ if text[answer_start(text)..].contains(REASONING_TAGS[0]) => ParseFault::OpenReasoning,
                _ => ParseFault::NoSpan,
            };
            return Answer { fault: Some(fault), ..Answer::default() };
        };
        let inside = &text[span.clone()];
        let mut out = self.content(inside, native);
        let fault = out.fault.or_else(|| self.reasoning_fault(text));
        out.fault = fault.or_else(|| self.surroundings_fault(text, &span));
        out.span = Some(span);
        out
    }

    /// Reads the text of an answer; the fault is about its form only.
    fn content(&self, inside: &str, native: impl FnOnce(&str) -> Answer) -> Answer {
        let (mut out, is_json) = match find_json_answer(inside) {
            Some(JsonAnswer::Objects(objects)) => (objects.answer(|t| self.no_finding.matches(t)), true),
            Some(JsonAnswer::EmptyList { fenced: true }) => (no_finding_answer(ParseFault::OtherForm), true),
            bare_list => {
                let read = native(inside);
                if !read.boxes.is_empty() {
                    (read, false)
                } else if bare_list.is_some() {
                    (no_finding_answer(ParseFault::OtherForm), true)
                } else if read.fault == Some(ParseFault::NoBox) && self.no_finding.matches(inside) {
                    let plain = fold_class_name(inside) == NO_FINDING;
                    let fault = (!plain).then_some(ParseFault::OtherForm);
                    (Answer { fault, ..no_finding_answer(ParseFault::OtherForm) }, false)
                } else {
                    (read, false)
                }
            }
        };
        if self.form == AnswerForm::Json {
            let unreadable = out.fault.filter(|f| f.prevents_reading());
            out.fault = match json_form_fault(inside) {
                Some(fault) if is_json => unreadable.or(Some(fault)),
                Some(_) => out.fault.or(Some(ParseFault::OtherForm)),
                None => unreadable,
            };
        }
        out
    }

    /// Returns the rule about reasoning that a response with an answer breaks.
    pub fn reasoning_fault(&self, text: &str) -> Option<ParseFault> {
        let [open, close] = REASONING_TAGS;
        let Some(end) = text.rfind(close) else {
            return (self.reasoning == Reasoning::Required).then_some(ParseFault::NoReasoning);
        };
        let head = &text[..end];
        // The prompt of some models opens the block already.
        let (before, thought) = head.split_once(open).unwrap_or(("", head));
        if self.reasoning == Reasoning::None {
            Some(ParseFault::UnwantedReasoning)
        } else if head.contains(close) {
            Some(ParseFault::RepeatedReasoning)
        } else if self.marks.is_none() && !before.trim().is_empty() {
            Some(ParseFault::TextAround)
        } else {
            (self.reasoning == Reasoning::Required && thought.trim().is_empty()).then_some(ParseFault::NoReasoning)
        }
    }

    /// Returns the rule about text outside of the answer that a response breaks: none is expected without a configured span, and around
    /// one it may hold no further tags of it.
    fn surroundings_fault(&self, text: &str, span: &Range<usize>) -> Option<ParseFault> {
        let around = [&text[answer_start(text)..span.start], &text[span.end..]];
        match &self.marks {
            None => around.iter().any(|t| !t.trim().is_empty()).then_some(ParseFault::TextAround),
            Some([open, close]) => {
                let inside = &text[span.clone()];
                let tags = |t: &str| t.matches(open.as_str()).count() + t.matches(close.as_str()).count();
                // Equal tags are counted as opening and as closing.
                let own = if open == close { 4 } else { 2 };
                (tags(around[0]) + tags(inside) + tags(around[1]) > own).then_some(ParseFault::RepeatedSpan)
            }
        }
    }
}

/// Returns the position after the last end of reasoning, 0 if there is none.
fn answer_start(text: &str) -> usize {
    text.rfind(REASONING_TAGS[1]).map_or(0, |start| start + REASONING_TAGS[1].len())
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
        for (other, fault) in [
            ("[]", ParseFault::OtherForm),
            ("No abnormality is seen.", ParseFault::OtherForm),
            ("<answer>no finding</answer>", ParseFault::TextAround),
            ("<think></think>[1,2,3,4] nodule", ParseFault::UnwantedReasoning),
            ("<think>[1,2,3,4] nodule", ParseFault::OpenReasoning),
        ] {
            assert_eq!(f(&free, other), Some(fault), "{other}");
        }
        let strict = spanned("answer");
        assert_eq!(f(&strict, "I see: <answer>[1,2,3,4] nodule</answer>"), None);
        let repeated = "<answer>[1,2,3,4] nodule</answer> or <answer>[5,6,7,8] nodule</answer>";
        assert_eq!(f(&strict, repeated), Some(ParseFault::RepeatedSpan));
        assert_eq!(f(&strict, "<answer> <answer>[1,2,3,4] nodule</answer>"), Some(ParseFault::RepeatedSpan));
        let same = AnswerReader::new(Some(["##".into(), "##".into()]), &NO_FINDING_PHRASES, ClassMatch::Equal);
        assert_eq!(f(&same, "x ##[1,2,3,4] nodule## y"), None);
        assert_eq!(f(&same, "##a## ##[1,2,3,4] nodule##"), Some(ParseFault::RepeatedSpan));
        assert_eq!(f(&strict, "[1,2,3,4] nodule"), Some(ParseFault::NoSpan));
        assert_eq!((f(&strict, " "), f(&free, "")), (Some(ParseFault::Empty), Some(ParseFault::Empty)));
    }

    #[test]
    fn reasoning_is_expected_or_not() {
        let fault = |reasoning, marks: Option<[String; 2]>, text: &str| {
            let reader = AnswerReader::new(marks, &NO_FINDING_PHRASES, ClassMatch::Equal).with_reasoning(reasoning);
            reader.read(text, parse_answer).fault
        };
        let tags = || Some(["<answer>".to_owned(), "</answer>".to_owned()]);
        // Each text, and its faults with optional and with required reasoning; without, every `</think>` is a fault.
        for (text, optional, required) in [
            ("[1,2,3,4] nodule", None, Some(ParseFault::NoReasoning)),
            ("<think>why</think>\n[1,2,3,4] nodule", None, None),
            ("why</think>[1,2,3,4] nodule", None, None),
            ("<think> </think>[1,2,3,4] nodule", None, Some(ParseFault::NoReasoning)),
            ("Well. <think>why</think>[1,2,3,4] nodule", Some(ParseFault::TextAround), Some(ParseFault::TextAround)),
            (
                "<think>a</think><think>b</think>[1,2,3,4] nodule",
                Some(ParseFault::RepeatedReasoning),
                Some(ParseFault::RepeatedReasoning),
            ),
        ] {
            assert_eq!(fault(Reasoning::Optional, None, text), optional, "{text}");
            assert_eq!(fault(Reasoning::Required, None, text), required, "{text}");
            let unwanted = text.contains("</think>").then_some(ParseFault::UnwantedReasoning);
            assert_eq!(fault(Reasoning::None, None, text), unwanted, "{text}");
            // Text before the reasoning is free if the answer has a span.
            let enclosed = text.replace("[1,2,3,4] nodule", "<answer>[1,2,3,4] nodule</answer>");
            let free = |fault: Option<ParseFault>| fault.filter(|f| *f != ParseFault::TextAround);
            assert_eq!(fault(Reasoning::Required, tags(), &enclosed), free(required), "{enclosed}");
        }
    }

    #[test]
    fn spans_are_added_once() {
        let reader = spanned("answer");
        assert_eq!(reader.enclose("x".into()), "<answer>x</answer>");
        assert_eq!(reader.enclose("a <answer>x</answer>".into()), "a <answer>x</answer>");
        assert_eq!(reader.enclose("<think>a</think> x".into()), "<think>a</think><answer>x</answer>");
        assert_eq!(AnswerReader::default().enclose("x".into()), "x");
    }
}
