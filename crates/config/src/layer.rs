//! Layers of a configuration: a file, an environment variable, a `--set`. Each layer records the origin of its values for messages. The
//! `config` crate merges the layers.

use std::collections::BTreeMap;
use std::path::Path;

use config::{Map, Value as Located, ValueKind};
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use crate::error::ConfigError;
use crate::schema::Config;

/// Values from one origin.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// Origin in messages; empty for the defaults.
    name: String,
    pub table: Table,
    /// Line of each key of a file, from 1.
    lines: BTreeMap<String, usize>,
}

impl Layer {
    /// Returns the defaults, which are also the list of known keys.
    ///
    /// # Errors
    /// Returns [`ConfigError::Invalid`] if the schema cannot be written as TOML.
    pub(crate) fn defaults() -> Result<Self, ConfigError> {
        let table = Table::try_from(Config::default()).map_err(|e| ConfigError::Invalid(vec![e.to_string()]))?;
        Ok(Self { name: String::new(), table, lines: BTreeMap::new() })
    }

    /// Reads a TOML file.
    ///
    /// # Errors
    /// Returns [`ConfigError::Read`] if it cannot be read and [`ConfigError::Syntax`] if it is not TOML.
    pub(crate) fn file(path: &Path, known: &Table) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: name.clone(), source })?;
        Self::parse(name, &text, known)
    }

    /// Parses the text of a TOML file; `name` is its origin.
    ///
    /// # Errors
    /// Returns [`ConfigError::Syntax`] if it is not TOML.
    pub(crate) fn parse(name: String, text: &str, known: &Table) -> Result<Self, ConfigError> {
        let syntax = |e: toml::de::Error| ConfigError::Syntax { path: name.clone(), message: e.to_string() };
        let spanned = DeTable::parse(text).map_err(syntax)?;
        let starts: Vec<usize> =
            std::iter::once(0).chain(text.match_indices('\n').map(|(newline, _)| newline + 1)).collect();
        let mut lines = BTreeMap::new();
        note_table(spanned.get_ref(), "", &starts, &mut lines);
        let mut table: Table = text.parse().map_err(syntax)?;
        integers_to_strings(&mut table, known);
        Ok(Self { name, table, lines })
    }

    /// Creates a layer of one value, `a.b.c = text`. The text is a TOML value if it parses as one, else a string. If the key is a string, a
    /// number, a date or a boolean is kept as text.
    pub(crate) fn single(name: String, key: &str, text: &str, known: &Table) -> Self {
        let parsed = format!("v = {text}").parse::<Table>().ok().filter(|t| t.len() == 1);
        let parsed = parsed.and_then(|mut t| t.remove("v"));
        let scalar = parsed.as_ref().is_none_or(|v| !matches!(v, Value::String(_) | Value::Array(_) | Value::Table(_)));
        let is_text = scalar && matches!(lookup(known, key), Some(Value::String(_)));
        let string = || Value::String(text.to_owned());
        let value = if is_text { string() } else { parsed.unwrap_or_else(string) };
        let table =
            key.rsplit('.').fold(value, |value, part| Value::Table(Table::from_iter([(part.to_owned(), value)])));
        let Value::Table(table) = table else { return Self { name, table: Table::new(), lines: BTreeMap::new() } };
        Self { name, table, lines: BTreeMap::new() }
    }

    /// Returns the origin of a key: `FILE:LINE`, `--set`, or `the environment (NAME)`.
    pub(crate) fn origin(&self, key: &str) -> String {
        match self.lines.get(key) {
            Some(line) => format!("{}:{line}", self.name),
            None => self.name.clone(),
        }
    }

    fn with_origin(&self, key: &str, value: &Value) -> Located {
        let origin = (!self.name.is_empty()).then(|| self.origin(key));
        let kind = match value {
            Value::String(s) => ValueKind::String(s.clone()),
            Value::Integer(i) => ValueKind::I64(*i),
            Value::Float(f) => ValueKind::Float(*f),
            Value::Boolean(b) => ValueKind::Boolean(*b),
            Value::Datetime(d) => ValueKind::String(d.to_string()),
            Value::Array(all) => ValueKind::Array(all.iter().map(|v| self.with_origin(key, v)).collect()),
            Value::Table(table) => ValueKind::Table(self.map(key, table)),
        };
        Located::new(origin.as_ref(), kind)
    }

    fn map(&self, prefix: &str, table: &Table) -> Map<String, Located> {
        table.iter().map(|(key, value)| (key.clone(), self.with_origin(&join(prefix, key), value))).collect()
    }
}

impl config::Source for Layer {
    fn clone_into_box(&self) -> Box<dyn config::Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Located>, config::ConfigError> {
        Ok(self.map("", &self.table))
    }
}

/// Joins a dotted prefix and a key.
pub(crate) fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}

/// Returns the value of a dotted key.
pub(crate) fn lookup<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    let mut parts = key.split('.');
    let first = table.get(parts.next()?)?;
    parts.try_fold(first, |value, part| value.as_table()?.get(part))
}

/// Appends every dotted key that is not a section, with its value.
pub(crate) fn leaves<'a>(table: &'a Table, prefix: &str, out: &mut Vec<(String, &'a Value)>) {
    for (key, value) in table {
        let key = join(prefix, key);
        match value {
            Value::Table(inner) if !inner.is_empty() => leaves(inner, &key, out),
            _ => out.push((key, value)),
        }
    }
}

/// Converts integers to strings for keys that are strings: `resume = 40`.
fn integers_to_strings(table: &mut Table, known: &Table) {
    for (key, value) in table.iter_mut() {
        match (value, known.get(key)) {
            (Value::Table(inner), Some(Value::Table(known))) => integers_to_strings(inner, known),
            (value @ Value::Integer(_), Some(Value::String(_))) => *value = Value::String(value.to_string()),
            _ => {}
        }
    }
}

fn note_table(table: &DeTable<'_>, prefix: &str, starts: &[usize], lines: &mut BTreeMap<String, usize>) {
    for (key, value) in table.iter() {
        let name = join(prefix, key.get_ref());
        lines.entry(name.clone()).or_insert(starts.partition_point(|s| *s <= key.span().start));
        note_value(value, &name, starts, lines);
    }
}

fn note_value(value: &Spanned<DeValue<'_>>, name: &str, starts: &[usize], lines: &mut BTreeMap<String, usize>) {
    match value.get_ref() {
        DeValue::Table(table) => note_table(table, name, starts, lines),
        DeValue::Array(all) => {
            for (index, value) in all.iter().enumerate() {
                let name = format!("{name}[{index}]");
                lines.insert(name.clone(), starts.partition_point(|s| *s <= value.span().start));
                note_value(value, &name, starts, lines);
            }
        }
        _ => {}
    }
}
