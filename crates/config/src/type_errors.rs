//! Messages for unknown keys and values of the wrong type: key, origin, actual value, expected type. All problems of a layer are reported
//! together.

use serde::Deserialize;
use serde_path_to_error::Segment;
use toml::{Table, Value};

use crate::hint::{Hints, join_with_or};
use crate::layer::{Layer, join};
use crate::schema::Config;

/// Maximum number of characters of a value in a message.
const MAX_SHOWN_CHARS: usize = 60;

/// Returns all problems of one layer; empty if its keys and types are valid.
pub(crate) fn problems(layer: &Layer, hints: &Hints) -> Vec<String> {
    let mut remaining = Value::Table(layer.table.clone());
    let mut out = Vec::new();
    loop {
        let error = match serde_path_to_error::deserialize::<_, Config>(remaining.clone()) {
            Ok(_) => return out,
            Err(e) => e,
        };
        let path: Vec<&Segment> = error.path().iter().filter(|s| !matches!(s, Segment::Enum { .. })).collect();
        let key = format_path(&path);
        let message = error.inner().message();
        let value = find(&mut remaining, &path).cloned();
        let origin = layer.origin(&key);
        let unknown = quoted_names(message, "unknown field ");
        out.push(match &unknown {
            Some((_, siblings)) => format!(
                "unknown key `{key}` in {origin}{}",
                hints.suggest(&key, siblings, matches!(value, Some(Value::Table(_))))
            ),
            None => value_problem(&key, &origin, message, value.as_ref()),
        });
        // Remove the reported key, or the list that contains it, and check the rest.
        if !remove(&mut remaining, &path, unknown.is_some()) {
            return out;
        }
    }
}

/// Formats a path for messages: `reward.custom[0].name`.
fn format_path(path: &[&Segment]) -> String {
    path.iter().fold(String::new(), |out, segment| match segment {
        Segment::Seq { index } => format!("{out}[{index}]"),
        Segment::Map { key } => join(&out, key),
        Segment::Enum { .. } | Segment::Unknown => out,
    })
}

fn find<'a>(root: &'a mut Value, path: &[&Segment]) -> Option<&'a mut Value> {
    path.iter().try_fold(root, |value, segment| match segment {
        Segment::Map { key } => value.as_table_mut()?.get_mut(key),
        Segment::Seq { index } => value.as_array_mut()?.get_mut(*index),
        Segment::Enum { .. } | Segment::Unknown => Some(value),
    })
}

/// Removes the value at `path` if `exact`, else the outermost list that contains it.
fn remove(root: &mut Value, path: &[&Segment], exact: bool) -> bool {
    let list = path.iter().position(|s| matches!(s, Segment::Seq { .. })).filter(|_| !exact);
    let Some((Segment::Map { key }, above)) = path[..list.unwrap_or(path.len())].split_last() else { return false };
    find(root, above).and_then(|holder| holder.as_table_mut()?.remove(key)).is_some()
}

/// Returns the names quoted in a message after `start`: the first one, and the alternatives.
fn quoted_names<'a>(message: &'a str, start: &str) -> Option<(&'a str, Vec<&'a str>)> {
    let mut names = message.strip_prefix(start)?.split('`').skip(1).step_by(2);
    Some((names.next()?, names.collect()))
}

/// Words the error of serde for one value.
fn value_problem(key: &str, origin: &str, message: &str, value: Option<&Value>) -> String {
    let subject = format!("`{key}` in {origin}");
    if let Some((variant, known)) = quoted_names(message, "unknown variant ") {
        return format!("{subject} is \"{variant}\": use {}", join_with_or(&known));
    }
    if let Some((missing, _)) = quoted_names(message, "missing field ") {
        return format!("{subject} has no `{missing}`");
    }
    if let (true, Some(value)) = (message.starts_with("wanted exactly 1 element"), value) {
        return format!("{subject} is {}; expected a string", describe(value));
    }
    let (Some((kind, expected)), Some(value)) = (message.split_once(", expected "), value) else {
        return format!("{subject}: {message}");
    };
    let expected_type = describe_type(expected);
    if kind.starts_with("invalid value: integer") && matches!(value, Value::Integer(_)) {
        return format!("{subject} is {value}: use {}", integer_range(expected));
    }
    if kind.starts_with("invalid") {
        let list = matches!(value, Value::String(_)) && expected_type.contains("list");
        let advice = if list { format!(": write it as [{value}]") } else { String::new() };
        return format!("{subject} is {}; expected {expected_type}{advice}", describe(value));
    }
    format!("{subject}: {message}")
}

/// Describes a value for messages: its type, and the value itself, shortened.
fn describe(value: &Value) -> String {
    let kind = match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "an integer",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "a boolean",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => return "a section".to_owned(),
    };
    let text = value.to_string().replace('\n', " ");
    let shortened: String = text.chars().take(MAX_SHOWN_CHARS).collect();
    let dots = if shortened.len() < text.len() { "…" } else { "" };
    format!("{kind} ({shortened}{dots})")
}

/// Names a Rust type in the terms of TOML.
fn describe_type(expected: &str) -> String {
    let length = || expected.rsplit(' ').next().and_then(|n| n.parse::<usize>().ok());
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" | "i8" | "i16" | "i32" | "i64" | "isize" => "an integer".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a string" | "string only" => "a string".to_owned(),
        "a sequence" => "a list".to_owned(),
        _ if expected.starts_with("an array of length") || expected.starts_with("a tuple of size") => {
            length().map_or_else(|| "a list".to_owned(), |n| format!("a list of {n} values"))
        }
        _ if expected.starts_with("struct") || expected == "a map" => "a section".to_owned(),
        other => other.to_owned(),
    }
}

/// Returns the range of an integer type for messages.
fn integer_range(expected: &str) -> String {
    let max = match expected {
        "u8" => u64::from(u8::MAX),
        "u16" => u64::from(u16::MAX),
        "u32" => u64::from(u32::MAX),
        _ => return "0 or more".to_owned(),
    };
    format!("0 to {max}")
}

/// Converts a table to a configuration; checks only keys and types.
pub(crate) fn deserialize(table: Table) -> Result<Config, toml::de::Error> {
    Config::deserialize(Value::Table(table))
}
