//! The effective configuration as TOML with the meaning of every key, for `unveil config show --explain`.

use std::fmt::Write;

use toml::{Table, Value};

use crate::error::ConfigError;
use crate::layer::{join, lookup};
use crate::load::Loaded;
use crate::reference::{Key, keys};

/// Maximum width of a comment line in characters.
const WIDTH: usize = 110;

impl Loaded {
    /// Returns the effective configuration as TOML that loads again, in which comments explain sections and keys and name the origin of
    /// values that are not defaults.
    ///
    /// # Errors
    /// Returns [`ConfigError::Invalid`] if a value cannot be represented in TOML.
    pub fn explain(&self) -> Result<String, ConfigError> {
        let table = Table::try_from(&self.config).map_err(|e| ConfigError::Invalid(vec![e.to_string()]))?;
        let sections = keys();
        let mut out = String::new();
        for (title, keys) in sections.iter().filter(|(_, keys)| !keys[0].section.starts_with('[')) {
            let section = &keys[0].section;
            let Some(Value::Table(values)) = lookup(&table, section) else { continue };
            if !out.is_empty() {
                out.push('\n');
            }
            comment(&mut out, title);
            let _ = writeln!(out, "[{section}]");
            for key in keys {
                if let Some(value) = values.get(&key.name) {
                    comment(&mut out, &key.meaning);
                    comment(&mut out, &self.facts(key));
                    let _ = writeln!(out, "{} = {}", key.name, inline(value));
                }
            }
            // Lists of sections, whose keys are explained in the reference page.
            for (name, value) in values {
                let path = join(section, name);
                let list = sections.iter().find(|(_, keys)| keys[0].section == format!("[{path}]"));
                if let Some((title, keys)) = list {
                    let names: Vec<&str> = keys.iter().map(|k| k.name.as_str()).collect();
                    comment(&mut out, title);
                    comment(
                        &mut out,
                        &format!("list of sections with {}{}", names.join(", "), self.origin_text(&path)),
                    );
                    let _ = writeln!(out, "{name} = {}", inline(value));
                }
            }
        }
        Ok(out)
    }

    /// Returns type, range, default and origin of a key on one line.
    fn facts(&self, key: &Key) -> String {
        let range = match key.range.to_string() {
            range if range.is_empty() => String::new(),
            range => format!(", {range}"),
        };
        let default = key.default.as_ref().map_or_else(String::new, |default| format!("; default {default}"));
        format!("{}{range}{default}{}", key.kind, self.origin_text(&join(&key.section, &key.name)))
    }

    fn origin_text(&self, key: &str) -> String {
        self.origin(key).map_or_else(String::new, |origin| format!("; set in {origin}"))
    }
}

/// Appends a text as comment lines, broken between words.
fn comment(out: &mut String, text: &str) {
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(out, "# {line}");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() {
        let _ = writeln!(out, "# {line}");
    }
}

/// Writes a value on one line; small numbers with an exponent.
fn inline(value: &Value) -> String {
    match value {
        Value::Float(number) if *number != 0.0 && number.abs() < 1e-4 => format!("{number:e}"),
        Value::Array(items) => format!("[{}]", items.iter().map(inline).collect::<Vec<_>>().join(", ")),
        Value::Table(table) if table.is_empty() => "{}".to_owned(),
        Value::Table(table) => {
            let pairs: Vec<String> = table.iter().map(|(k, v)| format!("{} = {}", quoted(k), inline(v))).collect();
            format!("{{ {} }}", pairs.join(", "))
        }
        Value::String(text) => quoted(text),
        other => other.to_string(),
    }
}

/// Writes a TOML basic string. A JSON string is one, except that TOML also wants DEL escaped.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded(sets: &[&str]) -> Loaded {
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        Loaded::new(&[], std::iter::empty(), &sets).unwrap()
    }

    #[test]
    fn explained_configurations_load_back() {
        let custom = r#"reward.custom=[{name="a", address="http://127.0.0.1:9", weight=2}, {name="b", address="grpc://127.0.0.1:9"}]"#;
        let sets = [
            "run.seed=7",
            "learner.optimizer.lr=1e-6",
            "data.synonyms={nodule=[\"lump\"], b-c=[]}",
            "prompt.template=a \"b\"\n[run]\n\u{7f}é\\ {{ question }}",
            "reward.localization.curriculum=[[0, 0.1], [100, 0.5]]",
            custom,
        ];
        for sets in [&sets[..], &[]] {
            let loaded = loaded(sets);
            let text = loaded.explain().unwrap();
            let parsed = crate::load::parse("explained", &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
            assert_eq!(parsed, loaded.config, "{text}");
        }
    }

    #[test]
    fn every_key_is_explained_once_with_its_origin() {
        let text = loaded(&["run.seed=7", "learner.optimizer.lr=1e-6"]).explain().unwrap();
        for line in [
            "# Seed of all random numbers of the run.",
            "# integer, 0 or more; default 0; set in --set",
            "seed = 7",
            "lr = 1e-6",
            "[reward.vision_relevance]",
            "# User-defined scorer behind gRPC",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        let shown = |key: &Key| {
            let body = text.split(&format!("[{}]\n", key.section)).nth(1).unwrap_or_default();
            let body = body.split("\n[").next().unwrap_or_default();
            body.lines().filter(|l| l.starts_with(&format!("{} = ", key.name))).count()
        };
        for (_, keys) in keys() {
            for key in keys.iter().filter(|k| !k.section.starts_with('[')) {
                assert_eq!(shown(key), 1, "{}.{}", key.section, key.name);
            }
        }
        assert!(text.lines().all(|l| !l.starts_with('#') || l.chars().count() <= WIDTH + 2 || !l[2..].contains(' ')));
    }
}
