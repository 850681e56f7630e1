//! Conversations: roles of messages, pairs of question and answer, and image placeholders in texts.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

use super::source::json_text;

static IMAGE: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(?s)(?:Picture \d+:\s*)?<img>.*?</img>|<image>|<image_\d+>").ok());

/// Role of the speaker of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    System,
    User,
    Assistant,
    Other,
}

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) role: Role,
    pub(super) text: String,
}

/// A conversation as message indices: system messages, and pairs of question and answer. Only the last question may lack an answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Turns {
    pub(super) system: Vec<usize>,
    pub(super) pairs: Vec<(usize, Option<usize>)>,
}

/// Parses a list of `{"from", "value"}` or `{"role", "content"}`; a content may be a list of parts.
pub(super) fn messages(list: &[Value]) -> Vec<Message> {
    let parse = |m: &Value| {
        let (role, text) = if m["from"].is_null() { (&m["role"], &m["content"]) } else { (&m["from"], &m["value"]) };
        let role = match json_text(role).as_str() {
            "system" => Role::System,
            "human" | "user" => Role::User,
            "gpt" | "assistant" => Role::Assistant,
            _ => Role::Other,
        };
        let text = match text {
            Value::Array(parts) => parts.iter().map(|p| json_text(&p["text"])).collect::<Vec<_>>().join(" "),
            single => json_text(single),
        };
        Message { role, text: text.trim().to_owned() }
    };
    list.iter().map(parse).collect()
}

/// Pairs questions with answers; `None` unless the messages are optional system texts followed by alternating questions and answers.
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

/// Removes image placeholders from a text and trims it.
pub(super) fn strip_image_tags(text: &str) -> String {
    IMAGE.as_ref().map_or_else(|| text.to_owned(), |r| r.replace_all(text, "").into_owned()).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn messages_are_paired_into_turns() {
        let list = json!([{"from": "system", "value": "Be brief."}, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
                          {"from": "gpt", "value": " There. "}, {"from": "human", "value": null}]);
        let m = messages(list.as_array().unwrap());
        let texts: Vec<_> = m.iter().map(|m| m.text.as_str()).collect();
        assert_eq!(texts, ["Be brief.", "Where?", "There.", ""]);
        assert_eq!(turns(&m), Some(Turns { system: vec![0], pairs: vec![(1, Some(2)), (3, None)] }));
        let turns_of = |roles: &[Role]| {
            turns(&roles.iter().map(|r| Message { role: *r, text: String::new() }).collect::<Vec<_>>())
        };
        use Role::{Assistant, Other, System, User};
        for input in [
            &[][..],
            &[System],
            &[Assistant, User],
            &[User, User],
            &[User, Assistant, System],
            &[User, Other, Assistant],
        ] {
            assert_eq!(turns_of(input), None, "{input:?}");
        }
    }
}
