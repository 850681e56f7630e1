//! The form in which answers are expected, and the strict check of the JSON form. Reading is more tolerant than this check.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::ParseFault;
use super::json::{BOX_KEYS, CLASS_KEYS, FENCE};

/// Form in which an answer gives boxes and their class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerForm {
    /// Notation of the model family, or "no finding".
    #[default]
    Native,
    /// JSON as published models write it, bare or in a fenced block: a list of objects (or one object), each with a box and a label. An
    /// empty list means "no finding".
    Json,
}

/// Whether a response reasons in `<think>…</think>` before it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reasoning {
    /// The response holds the answer only.
    #[default]
    None,
    /// The response may reason before its answer.
    Optional,
    /// The response reasons before its answer.
    Required,
}

/// Returns the first rule of the JSON form that the text of an answer breaks; `None` if it meets the form.
pub(super) fn json_form_fault(text: &str) -> Option<ParseFault> {
    let text = text.trim();
    if text.is_empty() {
        return Some(ParseFault::Empty);
    }
    let body = unfenced(text);
    match serde_json::from_str(body) {
        Ok(Value::Array(items)) => items.iter().find_map(item_fault),
        Ok(object) => item_fault(&object),
        Err(_) if body.starts_with(['[', '{']) && body.ends_with([']', '}']) => Some(ParseFault::MalformedJson),
        Err(_) if is_open_fence(text) => Some(ParseFault::OpenFence),
        Err(_) => Some(ParseFault::TextAround),
    }
}

/// Returns the content of a text that is one closed fenced block; any other text unchanged.
fn unfenced(text: &str) -> &str {
    match text.strip_prefix(FENCE).and_then(|rest| rest.strip_suffix(FENCE)) {
        Some(inner) if !inner.contains(FENCE) => inner.trim_start_matches(|c: char| c.is_ascii_alphanumeric()).trim(),
        _ => text,
    }
}

/// Returns whether a text begins with a fenced block that is not closed, or is closed by the opening of another one.
fn is_open_fence(text: &str) -> bool {
    let Some(last) = text.rfind(FENCE).filter(|_| text.starts_with(FENCE)) else { return false };
    last == 0 || text[last + FENCE.len()..].starts_with(|c: char| c.is_ascii_alphanumeric())
}

fn item_fault(item: &Value) -> Option<ParseFault> {
    let Value::Object(object) = item else { return Some(ParseFault::OtherForm) };
    let four = |v: &Value| v.as_array().is_some_and(|list| list.len() == 4 && list.iter().all(Value::is_number));
    let named = |v: &Value| v.as_str().is_some_and(|class| !class.trim().is_empty());
    match (value_of(object, &BOX_KEYS), value_of(object, &CLASS_KEYS)) {
        (None | Some(Value::Null), _) => Some(ParseFault::NoBox),
        (Some(coordinates), _) if !four(coordinates) => Some(ParseFault::Bracket),
        (_, class) if !class.is_some_and(named) => Some(ParseFault::NoCategory),
        _ => None,
    }
}

/// Returns the value of the first of `keys` that the object has, ignoring case.
fn value_of<'a>(object: &'a Map<String, Value>, keys: &[&str]) -> Option<&'a Value> {
    keys.iter().find_map(|key| object.iter().find(|(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, value)| value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_form_is_checked_strictly() {
        let one = r#"{"bbox_2d": [1, 2, 3.5, 4], "label": "polyp"}"#;
        for fine in [
            format!("[{one}]"),
            format!("```json\n[{one}]\n```"),
            format!(" ```[{one}, {one}]``` \n"),
            one.to_owned(),
            "[]".to_owned(),
            "```json\n[]\n```".to_owned(),
            r#"[{"box": [1,2,3,4], "class": "polyp", "confidence": 0.5}]"#.to_owned(),
        ] {
            assert_eq!(json_form_fault(&fine), None, "{fine}");
        }
        for (text, fault) in [
            (" ".to_owned(), ParseFault::Empty),
            (format!("[{one},]"), ParseFault::MalformedJson),
            (r#"[{"bbox_2d": [NaN, 2, 3, 4], "label": "polyp"}]"#.to_owned(), ParseFault::MalformedJson),
            (format!("```json\n[{one}]"), ParseFault::OpenFence),
            (format!("```json\n[{one}]\n```json"), ParseFault::OpenFence),
            (format!("Here: [{one}]"), ParseFault::TextAround),
            (format!("```json\n[{one}]\n``` as seen"), ParseFault::TextAround),
            (format!("```json\n[]\n```\n```json\n[{one}]\n```"), ParseFault::TextAround),
            (r#"[{"label": "polyp"}]"#.to_owned(), ParseFault::NoBox),
            (r#"[{"bbox_2d": null, "label": "no finding"}]"#.to_owned(), ParseFault::NoBox),
            (r#"[{"bbox_2d": [1,2,3], "label": "polyp"}]"#.to_owned(), ParseFault::Bracket),
            (r#"[{"bbox_2d": [1,2,3,"4"], "label": "polyp"}]"#.to_owned(), ParseFault::Bracket),
            (r#"[{"bbox_2d": [1,2,3,4], "label": " "}]"#.to_owned(), ParseFault::NoCategory),
            (r#"[{"bbox_2d": [1,2,3,4]}]"#.to_owned(), ParseFault::NoCategory),
            ("[[1,2,3,4]]".to_owned(), ParseFault::OtherForm),
            ("[1,2,3,4]".to_owned(), ParseFault::OtherForm),
            ("7".to_owned(), ParseFault::OtherForm),
        ] {
            assert_eq!(json_form_fault(&text), Some(fault), "{text}");
        }
    }
}
