//! Answers in the wording of published models, each with its right reading (`published_answers.jsonl`): boxes and class in the numbers of
//! the text, and the first rule that is broken where JSON and where the native form is expected, both with optional reasoning.

use serde::Deserialize;
use unveil_core::answer::fold_class_name;
use unveil_core::{AnswerForm, AnswerReader, ClassMatch, ParseFault, Reasoning, parse_answer};

#[derive(Deserialize)]
struct Case {
    text: String,
    boxes: Vec<[f64; 4]>,
    /// Folded.
    category: String,
    no_finding: bool,
    json: Option<ParseFault>,
    native: Option<ParseFault>,
}

fn cases() -> Vec<Case> {
    let lines = include_str!("published_answers.jsonl").lines();
    lines.map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

fn reader(form: AnswerForm) -> AnswerReader {
    AnswerReader::default().with_form(form).with_reasoning(Reasoning::Optional)
}

#[test]
fn published_answers_are_read() {
    let cases = cases();
    assert!(cases.len() >= 60, "{} answers", cases.len());
    for case in cases {
        let text = &case.text;
        for (form, fault) in [(AnswerForm::Json, case.json), (AnswerForm::Native, case.native)] {
            let answer = reader(form).read(text, parse_answer);
            assert_eq!(answer.boxes, case.boxes, "{text}");
            assert_eq!(fold_class_name(&answer.category), case.category, "{text}");
            assert_eq!(answer.no_finding, case.no_finding, "{text}");
            assert_eq!(answer.fault, fault, "{form:?}: {text}");
        }
    }
}

/// Boxes and class are the same in a span and after reasoning; only the rule that is broken depends on what is expected.
#[test]
fn readings_are_the_same_in_a_span() {
    let tags = || Some(["<answer>".to_owned(), "</answer>".to_owned()]);
    let spanned = |reasoning| {
        AnswerReader::new(tags(), &["no finding"], ClassMatch::Equal)
            .with_form(AnswerForm::Json)
            .with_reasoning(reasoning)
    };
    let mut met = 0;
    // Answers that reason or have a span themselves are left out.
    for case in cases().into_iter().filter(|c| !c.text.contains('<') && !c.text.is_empty()) {
        let free = reader(AnswerForm::Json).read(&case.text, parse_answer);
        let enclosed = format!("<think>Why?</think> So: <answer>{}</answer>", case.text);
        for reasoning in [Reasoning::None, Reasoning::Optional, Reasoning::Required] {
            let answer = spanned(reasoning).read(&enclosed, parse_answer);
            // Phrases other than "no finding" are not configured here.
            if !case.no_finding || free.fault != Some(ParseFault::OtherForm) {
                assert_eq!((&answer.boxes, &answer.category), (&free.boxes, &free.category), "{enclosed}");
            }
            let expected = match reasoning {
                Reasoning::None => case.json.or(Some(ParseFault::UnwantedReasoning)),
                Reasoning::Optional | Reasoning::Required => case.json,
            };
            if !case.no_finding {
                assert_eq!(answer.fault, expected, "{enclosed}");
            }
            met += usize::from(answer.fault.is_none());
        }
        let bare = spanned(Reasoning::Required).read(&case.text, parse_answer);
        assert_eq!((bare.fault, bare.boxes.len()), (Some(ParseFault::NoSpan), 0), "{}", case.text);
        let unreasoned = format!("<answer>{}</answer>", case.text);
        let fault = spanned(Reasoning::Required).read(&unreasoned, parse_answer).fault;
        if !case.no_finding {
            assert_eq!(fault, case.json.or(Some(ParseFault::NoReasoning)), "{unreasoned}");
        }
    }
    assert!(met > 30, "{met} answers met the form");
}

#[test]
fn spans_that_are_not_closed_or_repeated() {
    let tags = Some(["<answer>".to_owned(), "</answer>".to_owned()]);
    let reader = AnswerReader::new(tags, &["no finding"], ClassMatch::Equal);
    for (text, boxes, fault) in [
        ("<answer>[1,2,3,4] nodule", 0, ParseFault::NoSpan),
        ("[1,2,3,4] nodule</answer>", 0, ParseFault::NoSpan),
        ("</answer>[1,2,3,4] nodule<answer>", 0, ParseFault::NoSpan),
        ("<answer>[1,2,3,4] nodule</answer", 0, ParseFault::NoSpan),
        ("<Answer>[1,2,3,4] nodule</Answer>", 0, ParseFault::NoSpan),
        ("<think><answer>[1,2,3,4] nodule</answer></think>", 0, ParseFault::NoSpan),
        ("<think><answer>[1,2,3,4] nodule</answer>", 0, ParseFault::OpenReasoning),
        ("<answer>[1,2,3,4], [5,6,7,8] nodule</answer><answer>[1,2,3,4] nodule</answer>", 1, ParseFault::RepeatedSpan),
        ("<answer>[1,2,3,4] nodule</answer> <answer>[5,6,7,8] nodule", 1, ParseFault::RepeatedSpan),
        ("<answer></answer>", 0, ParseFault::Empty),
        (" ", 0, ParseFault::Empty),
    ] {
        let answer = reader.read(text, parse_answer);
        assert_eq!((answer.boxes.len(), answer.fault), (boxes, Some(fault)), "{text}");
        assert!(!answer.no_finding, "{text}");
    }
}
