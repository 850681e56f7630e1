//! Conversations: who speaks, questions with their answers, placeholders that stand for the image. Pure.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

use super::source::text_of;

static IMAGE: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(?s)(?:Picture \d+:\s*)?<img>.*?</img>|<image>|<image_\d+>").ok());

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    System,
    User,
    Assistant,
    Other,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) role: Role,
    pub(super) text: String,
}

/// A conversation as positions of its messages: the system's, and each question with its answer. Only the last may lack one.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Turns {
    pub(super) system: Vec<usize>,
    pub(super) pairs: Vec<(usize, Option<usize>)>,
}

/// The messages of a list of `{"from", "value"}` or `{"role", "content"}`; a content may be a list of parts.
pub(super) fn messages(list: &[Value]) -> Vec<Message> {
    let of = |m: &Value| {
        let (role, text) = if m["from"].is_null() { (&m["role"], &m["content"]) } else { (&m["from"], &m["value"]) };
        let role = match text_of(role).as_str() {
            "system" => Role::System,
            "human" | "user" => Role::User,
            "gpt" | "assistant" => Role::Assistant,
            _ => Role::Other,
        };
        let text = match text {
            Value::Array(parts) => parts.iter().map(|p| text_of(&p["text"])).collect::<Vec<_>>().join(" "),
            one => text_of(one),
        };
        Message { role, text: text.trim().to_owned() }
    };
    list.iter().map(of).collect()
}

/// The turns of a conversation; none where they are not a system's text, if any, and then questions and answers in turns.
pub(super) fn turns(messages: &[Message]) -> Option<Turns> {
    let mut out = Turns::default();
    for (k, message) in messages.iter().enumerate() {
        let open = matches!(out.pairs.last(), Some((_, None)));
        match (message.role, open) {
            (Role::System, _) if out.pairs.is_empty() => out.system.push(k),
            (Role::User, false) => out.pairs.push((k, None)),
            (Role::Assistant, true) => {
                if let Some(last) = out.pairs.last_mut() {
                    last.1 = Some(k);
                }
            }
            _ => return None,
        }
    }
    Some(out).filter(|t| !t.pairs.is_empty())
}

/// The text without the image's placeholder, trimmed.
pub(super) fn without_image(text: &str) -> String {
    IMAGE.as_ref().map_or_else(|| text.to_owned(), |r| r.replace_all(text, "").into_owned()).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn who_says_what() {
        let list = json!([{"from": "system", "value": "Be brief."}, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
                          {"from": "gpt", "value": " There. "}, {"from": "human", "value": null}]);
        let m = messages(list.as_array().unwrap());
        let texts: Vec<_> = m.iter().map(|m| m.text.as_str()).collect();
        assert_eq!(texts, ["Be brief.", "Where?", "There.", ""]);
        assert_eq!(turns(&m), Some(Turns { system: vec![0], pairs: vec![(1, Some(2)), (3, None)] }));
        let of = |roles: &[Role]| {
            turns(&roles.iter().map(|r| Message { role: *r, text: String::new() }).collect::<Vec<_>>())
        };
        use Role::{Assistant, Other, System, User};
        for odd in [
            &[][..],
            &[System],
            &[Assistant, User],
            &[User, User],
            &[User, Assistant, System],
            &[User, Other, Assistant],
        ] {
            assert_eq!(of(odd), None, "{odd:?}");
        }
    }
}
