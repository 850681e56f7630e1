//! Multiple-choice questions: conversion to a record.
//!
//! The question lists the choices, one per line; `answer` is the text of the right one. The keys `options` and `answer_option` hold the
//! choices by letter and the letter of the right one.

use serde_json::{Map, Value, json};

use super::draft::DraftRecord;

/// Reason for leaving out a question whose answer is not among its choices.
pub(super) const NO_CHOICE: &str = "its answer is none of its choices";

/// Letter and text of each choice.
pub(super) type Choices = Vec<(char, String)>;

/// Sets the question, answer and options of a draft.
///
/// # Errors
/// Returns the reason for leaving it out: the right letter is not among the choices, or there is no question.
pub(super) fn set_question(
    item: &mut DraftRecord,
    question: &str,
    choices: &Choices,
    right: char,
) -> Result<(), &'static str> {
    let Some((_, answer)) = choices.iter().find(|(letter, _)| *letter == right) else { return Err(NO_CHOICE) };
    if question.trim().is_empty() {
        return Err("it has no question");
    }
    let lines: String = choices.iter().map(|(letter, text)| format!("\n{letter}: {text}")).collect();
    item.question = Some(format!("{}{lines}", question.trim()));
    item.answer = answer.clone();
    item.text_only = true;
    let options: Map<String, Value> = choices.iter().map(|(l, t)| (l.to_string(), json!(t))).collect();
    item.extra.insert("options".to_owned(), Value::Object(options));
    item.extra.insert("answer_option".to_owned(), json!(right.to_string()));
    Ok(())
}

/// Returns the letter of the choice with this text, ignoring case, outer spaces and a final full stop.
pub(super) fn letter_of(choices: &Choices, answer: &str) -> Option<char> {
    let normalized = |t: &str| t.trim().trim_end_matches('.').trim().to_lowercase();
    let expected = normalized(answer);
    choices.iter().find(|(_, text)| normalized(text) == expected).map(|(letter, _)| *letter)
}

/// Removes the leading letter of a choice: ` A:Atelectasis ` becomes `Atelectasis`.
pub(super) fn strip_letter(letter: char, text: &str) -> String {
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '"' || c == '\u{a0}');
    let rest = text.strip_prefix(letter).and_then(|r| r.trim_start().strip_prefix([':', '.', ')']));
    rest.unwrap_or(text).trim().to_owned()
}

/// Splits one text into its choices: `A: small. B: None of the above.`, also with `.` or `)` after the letters.
pub(super) fn split_choices(text: &str) -> Choices {
    let mut out = Choices::new();
    let mut rest = text.trim();
    let Some(mark) = rest.strip_prefix('A').and_then(|r| r.chars().next()).filter(|c| [':', '.', ')'].contains(c))
    else {
        return out;
    };
    for (letter, next) in ('A'..='H').zip('B'..='I') {
        let Some(body) = rest.strip_prefix(letter).and_then(|r| r.strip_prefix(mark)) else { break };
        let end = body.find(&format!(" {next}{mark}")).unwrap_or(body.len());
        out.push((letter, body[..end].trim().trim_end_matches(['.', ',', ';']).trim().to_owned()));
        rest = body[end..].trim_start();
    }
    out
}

/// Returns the capital letter that a text begins with, if it stands alone: `C`, `C: text`, `A. Yes`.
pub(super) fn first_letter(text: &str) -> Option<char> {
    let mut chars = text.trim().chars();
    let letter = chars.next().filter(char::is_ascii_uppercase)?;
    chars.next().is_none_or(|c| !c.is_alphanumeric() && c != '_').then_some(letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_split_and_matched() {
        let c = split_choices("A:  One. B: left lower area and B vitamins. C: None of the above.");
        assert_eq!(
            c,
            [('A', "One".into()), ('B', "left lower area and B vitamins".into()), ('C', "None of the above".into())]
        );
        assert_eq!((split_choices("no letters"), split_choices("A"), split_choices("")), (vec![], vec![], vec![]));
        let yes_no = [('A', "no".to_owned()), ('B', "yes".to_owned())];
        for text in ["A: no, B: yes", "A: no. B: yes.", "A. no; B. yes", "A) no B) yes"] {
            assert_eq!(split_choices(text), yes_no, "{text}");
        }
        assert_eq!(
            ["C", " A: Yes", "B.", "Yes", "a", "", "A_", "E: x"].map(first_letter),
            [Some('C'), Some('A'), Some('B'), None, None, None, None, Some('E')]
        );
        assert_eq!(letter_of(&c, " none of the ABOVE. "), Some('C'));
        assert_eq!(strip_letter('B', " B:Atelectasis "), "Atelectasis");
        assert_eq!(strip_letter('B', "Bronchitis"), "Bronchitis");
        let mut item = DraftRecord::default();
        assert_eq!(set_question(&mut item, "What?", &c, 'D'), Err(NO_CHOICE));
        set_question(&mut item, "What? ", &c, 'A').unwrap();
        assert!(item.question.unwrap().starts_with("What?\nA: One\nB: left"));
        assert_eq!((item.answer.as_str(), &item.extra["answer_option"]), ("One", &json!("A")));
    }
}
