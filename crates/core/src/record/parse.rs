//! Conversion from JSON to a [`Record`]. Accepts unambiguous variants (a null text, a numeric id) and refuses ambiguous ones; every error
//! names the record and the key.

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::keys::{FIELDS, intended_key};
use super::{Record, RecordError};
use crate::answer::NO_FINDING;
use crate::geometry::BBox;
use crate::task::Task;

/// Prefix of the strings that replace `NaN` and `Infinity` while the key that holds one is sought.
const NON_JSON_PREFIX: &str = "\0";

/// Keys and values of a record as in the JSON; no record field occurs twice.
pub(super) struct Fields(Map<String, Value>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Fields;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a record (a JSON object)")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut out = Map::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if out.contains_key(&key) && FIELDS.contains(&key.as_str()) {
                        return Err(A::Error::custom(format!("the key `{key}` appears twice")));
                    }
                    out.insert(key, value);
                }
                Ok(Fields(out))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

/// Parses one line, without a leading byte-order mark.
pub(super) fn parse(text: &str) -> Result<Record, RecordError> {
    let text = text.trim_start_matches('\u{feff}').trim();
    match serde_json::from_str::<Fields>(text) {
        Ok(fields) => fields.try_into(),
        Err(e) => Err(json_error(text, &e)),
    }
}

/// Describes why a text is not a JSON object; for `NaN` and `Infinity`, names the key that holds it.
fn json_error(text: &str, e: &serde_json::Error) -> RecordError {
    let message = e.to_string();
    let cause = message.rsplit_once(" at line ").map_or(message.as_str(), |(head, _)| head);
    let what = match e.classify() {
        serde_json::error::Category::Data => format!("not a record: {cause}"),
        _ => format!("not JSON: {cause} at column {}", e.column()),
    };
    let plain = RecordError { id: String::new(), what };
    let Ok(Fields(fields)) = serde_json::from_str(&quote_non_json_numbers(text)) else { return plain };
    let Some((key, number)) = fields.iter().find_map(|(key, v)| Some((key, non_json_number(v)?))) else { return plain };
    RecordError {
        id: fields.get("id").and_then(Value::as_str).unwrap_or_default().to_owned(),
        what: format!("not JSON: `{key}` holds {number}; write a number, or null if there is none"),
    }
}

/// Returns the text with `NaN`, `Infinity` and `-Infinity` outside of strings replaced by marked strings.
fn quote_non_json_numbers(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text;
    let mut quoted = false;
    while let Some(c) = rest.chars().next() {
        let number = ["NaN", "Infinity", "-Infinity"].into_iter().find(|word| !quoted && rest.starts_with(word));
        let length = match (number, c) {
            (Some(word), _) => {
                out.push_str(&format!("\"\\u0000{word}\""));
                rest = &rest[word.len()..];
                continue;
            }
            (None, '\\') if quoted => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, c) => {
                quoted ^= c == '"';
                c.len_utf8()
            }
        };
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    out
}

/// Returns the first marked number in a value, as it was written.
fn non_json_number(value: &Value) -> Option<&str> {
    match value {
        Value::String(s) => s.strip_prefix(NON_JSON_PREFIX),
        Value::Array(list) => list.iter().find_map(non_json_number),
        Value::Object(map) => map.values().find_map(non_json_number),
        _ => None,
    }
}

impl TryFrom<Fields> for Record {
    type Error = RecordError;

    fn try_from(Fields(mut map): Fields) -> Result<Self, RecordError> {
        let id = match map.shift_remove("id") {
            Some(Value::String(id)) => id,
            Some(Value::Number(n)) => n.to_string(),
            None | Some(Value::Null) => {
                let what = "missing field `id`: give every record a unique id".to_owned();
                return Err(RecordError { id: String::new(), what });
            }
            Some(other) => {
                let what = format!("`id` is {}, expected a string or a number", describe(&other));
                return Err(RecordError { id: String::new(), what });
            }
        };
        from_fields(id.clone(), map).map_err(|what| RecordError { id, what })
    }
}

fn from_fields(id: String, mut map: Map<String, Value>) -> Result<Record, String> {
    let mut take = |key: &str| map.shift_remove(key).filter(|v| !v.is_null());
    let mut text = |key: &str| match take(key) {
        None => Ok(String::new()),
        Some(Value::String(s)) => Ok(s),
        Some(other) => Err(format!("`{key}` is {}, expected a string", describe(&other))),
    };
    let image = text("image")?;
    let question = text("question")?;
    let answer = text("answer")?;
    let category = text("category")?;
    let modality = text("modality")?;
    let source = text("source")?;
    let split = text("split")?;
    let task = match text("task")?.as_str() {
        "" => Task::default(),
        name => name.parse().map_err(|e| format!("`task`: {e}"))?,
    };
    let image_size = take("image_size").map(parse_size).transpose()?;
    let labels = match take("labels") {
        None => Vec::new(),
        Some(value) => parse_list("labels", value)?
            .into_iter()
            .enumerate()
            .map(|(i, v)| parse_label(i, v))
            .collect::<Result<_, _>>()?,
    };
    let boxes = take("boxes");
    if boxes.is_none() && task == Task::Grounding {
        check_absent_boxes(&category, &map)?;
    }
    let boxes = match boxes {
        None => Vec::new(),
        Some(value) => parse_list("boxes", value)?
            .into_iter()
            .enumerate()
            .map(|(i, v)| parse_box(i, v))
            .collect::<Result<_, _>>()?,
    };
    Ok(Record {
        id,
        image,
        image_size,
        question,
        answer,
        category,
        boxes,
        labels,
        modality,
        source,
        split,
        task,
        extra: map,
    })
}

/// Refuses a grounding record that names a category but gives no boxes: it would be trained as "no finding".
fn check_absent_boxes(category: &str, extra: &Map<String, Value>) -> Result<(), String> {
    let empty = |v: &Value| match v {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::String(s) => s.trim().is_empty(),
        _ => false,
    };
    let other = extra.iter().find(|(key, v)| intended_key(key) == Some("boxes") && !empty(v)).map(|(key, _)| key);
    let category = category.trim();
    let nothing = category.is_empty() || category.eq_ignore_ascii_case(NO_FINDING);
    match other {
        Some(key) => Err(format!("it has no `boxes` but has `{key}`, which is ignored: rename that key to `boxes`")),
        None if nothing => Ok(()),
        None => Err(format!(
            "its category is {category:?}, but it has no `boxes`: give them, or `\"boxes\": []` if the image shows no finding"
        )),
    }
}

fn parse_list(key: &str, value: Value) -> Result<Vec<Value>, String> {
    match value {
        Value::Array(list) => Ok(list),
        other => Err(format!("`{key}` is {}, expected a list", describe(&other))),
    }
}

fn parse_label(index: usize, value: Value) -> Result<String, String> {
    match value {
        Value::String(s) => Ok(s),
        other => Err(format!("`labels`[{index}] is {}, expected a string", describe(&other))),
    }
}

fn parse_box(index: usize, value: Value) -> Result<BBox, String> {
    let position = format!("boxes`[{index}]");
    let Value::Array(list) = value else {
        return Err(format!("`{position} is {}, expected a list of four numbers (x1, y1, x2, y2)", describe(&value)));
    };
    let Ok(four) = <[Value; 4]>::try_from(list) else {
        return Err(format!("`{position} is not of length 4: expected four numbers (x1, y1, x2, y2)"));
    };
    let mut out = [0.0_f32; 4];
    for (slot, v) in out.iter_mut().zip(&four) {
        *slot = v.as_f64().ok_or_else(|| format!("`{position} holds {}, expected a number", describe(v)))? as f32;
    }
    Ok(out.into())
}

fn parse_size(value: Value) -> Result<[u32; 2], String> {
    serde_json::from_value(value.clone())
        .map_err(|_| format!("`image_size` is {}, expected two integers (width, height)", describe(&value)))
}

/// Describes a value for messages: its kind, and the value itself if that is short.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) => {
            let short: String = s.chars().take(40).collect();
            format!("the string {short:?}")
        }
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}
