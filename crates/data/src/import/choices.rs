//! Multiple choice: how a question with choices becomes a record. Pure.
//!
//! The question holds the choices, one a line; `answer` is the text of the right one; `options` and `answer_option` keep both apart.

use serde_json::{Map, Value, json};

use super::item::Item;

/// The rule for a question whose answer is not among its choices.
pub(super) const NO_CHOICE: &str = "its answer is none of its choices";

/// Letter and text of each choice.
pub(super) type Choices = Vec<(char, String)>;

/// Puts a question with choices into an item.
///
/// # Errors
/// The rule by which it is left out: the right letter is not among the choices, or there is no question.
pub(super) fn ask(item: &mut Item, question: &str, choices: &Choices, right: char) -> Result<(), &'static str> {
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

/// The letter of the choice with this text; case, spaces and a full stop at the end do not count.
pub(super) fn letter_of(choices: &Choices, answer: &str) -> Option<char> {
    let plain = |t: &str| t.trim().trim_end_matches('.').trim().to_lowercase();
    let want = plain(answer);
    choices.iter().find(|(_, text)| plain(text) == want).map(|(letter, _)| *letter)
}

/// The text of a choice without its own letter: ` A:Atelectasis ` is `Atelectasis`.
pub(super) fn unlettered(letter: char, text: &str) -> String {
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '"' || c == '\u{a0}');
    let rest = text.strip_prefix(letter).and_then(|r| r.trim_start().strip_prefix([':', '.', ')']));
    rest.unwrap_or(text).trim().to_owned()
}

/// The choices of one text: `A: small. B: None of the above.`, also with `.` or `)` after the letters.
pub(super) fn split(text: &str) -> Choices {
    let (mut out, mut rest) = (Choices::new(), text.trim());
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

/// The letter that a text begins with, alone or before what is no letter: `C`, `C: text`, `A. Yes`.
pub(super) fn first_letter(text: &str) -> Option<char> {
    let mut chars = text.trim().chars();
    let letter = chars.next().filter(char::is_ascii_uppercase)?;
    chars.next().is_none_or(|c| !c.is_alphanumeric() && c != '_').then_some(letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_of_one_text() {
        let c = split("A:  One. B: left lower area and B vitamins. C: None of the above.");
        assert_eq!(
            c,
            [('A', "One".into()), ('B', "left lower area and B vitamins".into()), ('C', "None of the above".into())]
        );
        assert_eq!((split("no letters"), split("A"), split("")), (vec![], vec![], vec![]));
        let yes_no = [('A', "no".to_owned()), ('B', "yes".to_owned())];
        for text in ["A: no, B: yes", "A: no. B: yes.", "A. no; B. yes", "A) no B) yes"] {
            assert_eq!(split(text), yes_no, "{text}");
        }
        assert_eq!(
            ["C", " A: Yes", "B.", "Yes", "a", "", "A_", "E: x"].map(first_letter),
            [Some('C'), Some('A'), Some('B'), None, None, None, None, Some('E')]
        );
        assert_eq!(letter_of(&c, " none of the ABOVE. "), Some('C'));
        assert_eq!(unlettered('B', " B:Atelectasis "), "Atelectasis");
        assert_eq!(unlettered('B', "Bronchitis"), "Bronchitis");
        let mut item = Item::default();
        assert_eq!(ask(&mut item, "What?", &c, 'D'), Err(NO_CHOICE));
        ask(&mut item, "What? ", &c, 'A').unwrap();
        assert!(item.question.unwrap().starts_with("What?\nA: One\nB: left"));
        assert_eq!((item.answer.as_str(), &item.extra["answer_option"]), ("One", &json!("A")));
    }
}
