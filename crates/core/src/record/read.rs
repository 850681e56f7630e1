//! From JSON to a [`Record`]: forgiving in what cannot be misread (a null text, a number for an id), strict in what can, and every error
//! names the record and the key.

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::keys::{OWN, meant};
use super::{Record, RecordError};
use crate::answer::NO_FINDING;
use crate::geometry::BBox;
use crate::task::Task;

/// Begins what stands in for a number that JSON does not have, while the place of one is sought.
const STRAY: &str = "\0";

/// The keys of a record with their values, as they stand in JSON; none of the record's own keys stands twice.
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
                    if out.contains_key(&key) && OWN.contains(&key.as_str()) {
                        return Err(A::Error::custom(format!("the key `{key}` stands twice")));
                    }
                    out.insert(key, value);
                }
                Ok(Fields(out))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

/// Reads one line; a byte-order mark before it is dropped.
pub(super) fn parse(text: &str) -> Result<Record, RecordError> {
    let text = text.trim_start_matches('\u{feff}').trim();
    match serde_json::from_str::<Fields>(text) {
        Ok(fields) => fields.try_into(),
        Err(e) => Err(no_json(text, &e)),
    }
}

/// Says why a text is no JSON object; of a number that JSON does not have, where it stands.
fn no_json(text: &str, e: &serde_json::Error) -> RecordError {
    let said = e.to_string();
    let cause = said.rsplit_once(" at line ").map_or(said.as_str(), |(head, _)| head);
    let what = match e.classify() {
        serde_json::error::Category::Data => format!("not a record: {cause}"),
        _ => format!("not JSON: {cause} at column {}", e.column()),
    };
    let plain = RecordError { id: String::new(), what };
    let Ok(Fields(fields)) = serde_json::from_str(&with_strays_marked(text)) else { return plain };
    let Some((key, stray)) = fields.iter().find_map(|(key, v)| Some((key, stray(v)?))) else { return plain };
    RecordError {
        id: fields.get("id").and_then(Value::as_str).unwrap_or_default().to_owned(),
        what: format!("not JSON: `{key}` holds {stray}; write a number, or null where there is none"),
    }
}

/// The text with `NaN`, `Infinity` and `-Infinity` outside of strings as marked strings.
fn with_strays_marked(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let (mut rest, mut quoted) = (text, false);
    while let Some(c) = rest.chars().next() {
        let found = ["NaN", "Infinity", "-Infinity"].into_iter().find(|word| !quoted && rest.starts_with(word));
        let taken = match (found, c) {
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
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    out
}

fn stray(value: &Value) -> Option<&str> {
    match value {
        Value::String(s) => s.strip_prefix(STRAY),
        Value::Array(list) => list.iter().find_map(stray),
        Value::Object(map) => map.values().find_map(stray),
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
                let what = "missing field `id`: give every record an id of its own".to_owned();
                return Err(RecordError { id: String::new(), what });
            }
            Some(other) => {
                let what = format!("`id` is {}, a text or a number is needed", named(&other));
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
        Some(other) => Err(format!("`{key}` is {}, a text is needed", named(&other))),
    };
    let [image, question, answer] = [text("image")?, text("question")?, text("answer")?];
    let [category, modality, source, split] = [text("category")?, text("modality")?, text("source")?, text("split")?];
    let task = match text("task")?.as_str() {
        "" => Task::default(),
        name => name.parse().map_err(|e| format!("`task`: {e}"))?,
    };
    let image_size = take("image_size").map(size).transpose()?;
    let labels = match take("labels") {
        None => Vec::new(),
        Some(value) => {
            list("labels", value)?.into_iter().enumerate().map(|(i, v)| label(i, v)).collect::<Result<_, _>>()?
        }
    };
    let boxes = take("boxes");
    if boxes.is_none() && task == Task::Grounding {
        boxes_may_be_absent(&category, &map)?;
    }
    let boxes = match boxes {
        None => Vec::new(),
        Some(value) => {
            list("boxes", value)?.into_iter().enumerate().map(|(i, v)| one_box(i, v)).collect::<Result<_, _>>()?
        }
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

/// Refuses a record that asks where something is, names what, and does not say where: it would be trained as "no finding".
fn boxes_may_be_absent(category: &str, extra: &Map<String, Value>) -> Result<(), String> {
    let empty = |v: &Value| match v {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::String(s) => s.trim().is_empty(),
        _ => false,
    };
    let other = extra.iter().find(|(key, v)| meant(key) == Some("boxes") && !empty(v)).map(|(key, _)| key);
    let category = category.trim();
    let nothing = category.is_empty() || category.eq_ignore_ascii_case(NO_FINDING);
    match other {
        Some(key) => Err(format!("it has no `boxes`, but `{key}`, which is not read: rename that key to `boxes`")),
        None if nothing => Ok(()),
        None => Err(format!(
            "its category is {category:?}, but it has no `boxes`: give them, or `\"boxes\": []` if the image shows no finding"
        )),
    }
}

fn list(key: &str, value: Value) -> Result<Vec<Value>, String> {
    match value {
        Value::Array(list) => Ok(list),
        other => Err(format!("`{key}` is {}, a list is needed", named(&other))),
    }
}

fn label(index: usize, value: Value) -> Result<String, String> {
    match value {
        Value::String(s) => Ok(s),
        other => Err(format!("`labels`[{index}] is {}, a text is needed", named(&other))),
    }
}

fn one_box(index: usize, value: Value) -> Result<BBox, String> {
    let place = format!("boxes`[{index}]");
    let Value::Array(list) = value else {
        return Err(format!("`{place} is {}, a list of four numbers is needed (x1, y1, x2, y2)", named(&value)));
    };
    let Ok(four) = <[Value; 4]>::try_from(list) else {
        return Err(format!("`{place} is not of length 4: four numbers are needed (x1, y1, x2, y2)"));
    };
    let mut out = [0.0_f32; 4];
    for (slot, v) in out.iter_mut().zip(&four) {
        *slot = v.as_f64().ok_or_else(|| format!("`{place} holds {}, a number is needed", named(v)))? as f32;
    }
    Ok(out.into())
}

fn size(value: Value) -> Result<[u32; 2], String> {
    serde_json::from_value(value.clone())
        .map_err(|_| format!("`image_size` is {}, two whole numbers are needed (width, height)", named(&value)))
}

/// A value in words, for messages: what it is, and the value itself where that is short.
fn named(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) => {
            let short: String = s.chars().take(40).collect();
            format!("the text {short:?}")
        }
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}
