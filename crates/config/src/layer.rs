//! The layers of a configuration: a file, a variable of the environment, a `--set`. Each keeps where its values stand, so that
//! every message can say it. How layers are put together is the `config` crate's work.

use std::collections::BTreeMap;
use std::path::Path;

use config::{Map, Value as Located, ValueKind};
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use crate::load::ConfigError;
use crate::schema::Config;

/// Values of one origin.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// How messages name it; nothing for the defaults.
    name: String,
    pub table: Table,
    /// Lines of the keys of a file, from 1.
    lines: BTreeMap<String, usize>,
}

impl Layer {
    /// The defaults, which are also the list of known keys.
    ///
    /// # Errors
    /// The schema cannot be written as TOML.
    pub fn defaults() -> Result<Self, ConfigError> {
        let table = Table::try_from(Config::default()).map_err(|e| ConfigError::Invalid(vec![e.to_string()]))?;
        Ok(Self { name: String::new(), table, lines: BTreeMap::new() })
    }

    /// A TOML file.
    ///
    /// # Errors
    /// It cannot be read, or is not TOML.
    pub fn file(path: &Path, known: &Table) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: name.clone(), source })?;
        Self::written(name, &text, known)
    }

    /// The text of a TOML file.
    ///
    /// # Errors
    /// It is not TOML.
    pub fn written(name: String, text: &str, known: &Table) -> Result<Self, ConfigError> {
        let syntax = |e: toml::de::Error| ConfigError::Syntax { path: name.clone(), message: e.to_string() };
        let spanned = DeTable::parse(text).map_err(syntax)?;
        let starts: Vec<usize> = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let mut lines = BTreeMap::new();
        note_table(spanned.get_ref(), "", &starts, &mut lines);
        let mut table: Table = text.parse().map_err(syntax)?;
        numbers_as_words(&mut table, known);
        Ok(Self { name, table, lines })
    }

    /// One `a.b.c = text`. The text is read as a TOML value where it is one, else it is a string; where a string is wanted, a number,
    /// a date or a truth value is taken as it is written.
    pub fn text(name: String, key: &str, text: &str, known: &Table) -> Self {
        let parsed = format!("v = {text}").parse::<Table>().ok().filter(|t| t.len() == 1);
        let parsed = parsed.and_then(|mut t| t.remove("v"));
        let scalar = parsed.as_ref().is_none_or(|v| !matches!(v, Value::String(_) | Value::Array(_) | Value::Table(_)));
        let word = scalar && matches!(at(known, key), Some(Value::String(_)));
        let written = || Value::String(text.to_owned());
        let value = if word { written() } else { parsed.unwrap_or_else(written) };
        let table =
            key.rsplit('.').fold(value, |value, part| Value::Table(Table::from_iter([(part.to_owned(), value)])));
        let Value::Table(table) = table else { return Self { name, table: Table::new(), lines: BTreeMap::new() } };
        Self { name, table, lines: BTreeMap::new() }
    }

    /// Where the value of a key stands: `FILE:LINE`, `--set`, `the environment (NAME)`.
    pub fn place(&self, key: &str) -> String {
        match self.lines.get(key) {
            Some(line) => format!("{}:{line}", self.name),
            None => self.name.clone(),
        }
    }

    fn located(&self, key: &str, value: &Value) -> Located {
        let origin = (!self.name.is_empty()).then(|| self.place(key));
        let kind = match value {
            Value::String(s) => ValueKind::String(s.clone()),
            Value::Integer(i) => ValueKind::I64(*i),
            Value::Float(f) => ValueKind::Float(*f),
            Value::Boolean(b) => ValueKind::Boolean(*b),
            Value::Datetime(d) => ValueKind::String(d.to_string()),
            Value::Array(all) => ValueKind::Array(all.iter().map(|v| self.located(key, v)).collect()),
            Value::Table(table) => ValueKind::Table(self.map(key, table)),
        };
        Located::new(origin.as_ref(), kind)
    }

    fn map(&self, prefix: &str, table: &Table) -> Map<String, Located> {
        table.iter().map(|(key, value)| (key.clone(), self.located(&join(prefix, key), value))).collect()
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

/// `prefix.key`.
pub(crate) fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}

/// The value of a dotted key.
pub(crate) fn at<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    let mut parts = key.split('.');
    let first = table.get(parts.next()?)?;
    parts.try_fold(first, |value, part| value.as_table()?.get(part))
}

/// Every dotted key that has a value of its own, and the value.
pub(crate) fn leaves<'a>(table: &'a Table, prefix: &str, out: &mut Vec<(String, &'a Value)>) {
    for (key, value) in table {
        let key = join(prefix, key);
        match value {
            Value::Table(inner) if !inner.is_empty() => leaves(inner, &key, out),
            _ => out.push((key, value)),
        }
    }
}

/// Takes a whole number for a word where a word is wanted: `resume = 40`.
fn numbers_as_words(table: &mut Table, known: &Table) {
    for (key, value) in table.iter_mut() {
        match (value, known.get(key)) {
            (Value::Table(inner), Some(Value::Table(known))) => numbers_as_words(inner, known),
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
