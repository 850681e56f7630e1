//! Keys that do not exist and values of the wrong type, in words: the key, where it stands, what is there, what is needed. All of a
//! layer at once.

use serde::Deserialize;
use serde_path_to_error::Segment;
use toml::{Table, Value};

use crate::hint::Hints;
use crate::layer::{Layer, join};
use crate::schema::Config;

/// Longest value that is shown, in characters.
const SHOWN: usize = 60;

/// Every fault of one layer; empty when it is a configuration.
pub(crate) fn faults(layer: &Layer, hints: &Hints) -> Vec<String> {
    let mut left = Value::Table(layer.table.clone());
    let mut out = Vec::new();
    loop {
        let error = match serde_path_to_error::deserialize::<_, Config>(left.clone()) {
            Ok(_) => return out,
            Err(e) => e,
        };
        let path: Vec<&Segment> = error.path().iter().filter(|s| !matches!(s, Segment::Enum { .. })).collect();
        let key = name(&path);
        let message = error.inner().message();
        let found = find(&mut left, &path).cloned();
        let place = layer.place(&key);
        let unknown = quoted(message, "unknown field ");
        out.push(match &unknown {
            Some((_, siblings)) => format!(
                "unknown key `{key}` in {place}{}",
                hints.of(&key, siblings, matches!(found, Some(Value::Table(_))))
            ),
            None => value_fault(&key, &place, message, found.as_ref()),
        });
        // What is named once is taken away, and the rest looked at: a key, or the whole list that it stands in.
        if !remove(&mut left, &path, unknown.is_some()) {
            return out;
        }
    }
}

/// The path as messages write it: `reward.custom[0].name`.
fn name(path: &[&Segment]) -> String {
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

/// Removes what the path names; where that is `exact`, the key itself, else the outermost list that holds it.
fn remove(root: &mut Value, path: &[&Segment], exact: bool) -> bool {
    let list = path.iter().position(|s| matches!(s, Segment::Seq { .. })).filter(|_| !exact);
    let Some((Segment::Map { key }, above)) = path[..list.unwrap_or(path.len())].split_last() else { return false };
    find(root, above).and_then(|holder| holder.as_table_mut()?.remove(key)).is_some()
}

/// The quoted names after `start`: the first, and those that it could have been.
fn quoted<'a>(message: &'a str, start: &str) -> Option<(&'a str, Vec<&'a str>)> {
    let mut names = message.strip_prefix(start)?.split('`').skip(1).step_by(2);
    Some((names.next()?, names.collect()))
}

fn value_fault(key: &str, place: &str, message: &str, found: Option<&Value>) -> String {
    let at = format!("`{key}` in {place}");
    if let Some((wrong, known)) = quoted(message, "unknown variant ") {
        return format!("{at} is \"{wrong}\": use {}", either(&known));
    }
    if let Some((missing, _)) = quoted(message, "missing field ") {
        return format!("{at} has no `{missing}`");
    }
    if let (true, Some(found)) = (message.starts_with("wanted exactly 1 element"), found) {
        return format!("{at} is {}; a string is needed", described(found));
    }
    let (Some((kind, expected)), Some(found)) = (message.split_once(", expected "), found) else {
        return format!("{at}: {message}");
    };
    let need = needed(expected);
    if kind.starts_with("invalid value: integer") && matches!(found, Value::Integer(_)) {
        return format!("{at} is {found}: use {}", range(expected));
    }
    if kind.starts_with("invalid") {
        let list = matches!(found, Value::String(_)) && need.contains("list");
        let form = if list { format!(": write it as [{found}]") } else { String::new() };
        return format!("{at} is {}; {need} needed{form}", described(found));
    }
    format!("{at}: {message}")
}

/// `a, b or c`.
pub(crate) fn either(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [all @ .., last] => format!("{} or {last}", all.join(", ")),
    }
}

fn described(value: &Value) -> String {
    let kind = match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "an integer",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "a truth value",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => return "a section".to_owned(),
    };
    let text = value.to_string().replace('\n', " ");
    let cut: String = text.chars().take(SHOWN).collect();
    let dots = if cut.len() < text.len() { "…" } else { "" };
    format!("{kind} ({cut}{dots})")
}

/// What Rust's types are called by people who write configurations, with the verb.
fn needed(expected: &str) -> String {
    let length = || expected.rsplit(' ').next().and_then(|n| n.parse::<usize>().ok());
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" | "i8" | "i16" | "i32" | "i64" | "isize" => "an integer is".to_owned(),
        "f32" | "f64" => "a number is".to_owned(),
        "a boolean" => "true or false is".to_owned(),
        "a string" | "string only" => "a string is".to_owned(),
        "a sequence" => "a list is".to_owned(),
        _ if expected.starts_with("an array of length") || expected.starts_with("a tuple of size") => {
            length().map_or_else(|| "a list is".to_owned(), |n| format!("a list of {n} values is"))
        }
        _ if expected.starts_with("struct") || expected == "a map" => "a section with keys of its own is".to_owned(),
        other => format!("{other} is"),
    }
}

fn range(expected: &str) -> String {
    let most = match expected {
        "u8" => u64::from(u8::MAX),
        "u16" => u64::from(u16::MAX),
        "u32" => u64::from(u32::MAX),
        _ => return "0 or more".to_owned(),
    };
    format!("0 to {most}")
}

/// The layer as a configuration, strict about keys and types alone.
pub(crate) fn typed(table: Table) -> Result<Config, toml::de::Error> {
    Config::deserialize(Value::Table(table))
}
