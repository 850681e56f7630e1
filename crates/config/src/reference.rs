//! The JSON Schema of the configuration, and the reference page of all keys that is generated from it.

use std::fmt::Write;

use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use crate::base::{BASE_KEY, BASE_MEANING};
use crate::schema::Config;

/// Returns the JSON Schema (draft 7) of a configuration file, for editors that check and complete TOML.
pub fn json_schema() -> Value {
    let mut schema = SchemaSettings::draft07().into_generator().into_root_schema_for::<Config>().to_value();
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        let files = json!([{"type": "array", "items": {"type": "string"}}, {"type": "string"}]);
        properties.insert(BASE_KEY.to_owned(), json!({"description": BASE_MEANING, "anyOf": files}));
    }
    schema
}

/// A key of the configuration.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Key {
    /// Section, as in a file: `rollout`, or `[reward.custom]` for a list of tables.
    pub section: String,
    /// Name within the section.
    pub name: String,
    /// Type in words, or the accepted values.
    pub kind: String,
    /// Default as in a file; `None` if the key is required.
    pub default: Option<String>,
    /// Accepted numbers; all if empty.
    pub range: Range,
    /// Meaning.
    pub meaning: String,
}

/// Bounds of a number.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Range {
    /// Lower bound, and whether it is excluded.
    pub min: Option<(f64, bool)>,
    /// Upper bound, and whether it is excluded.
    pub max: Option<(f64, bool)>,
}

impl Range {
    fn of(schema: &Value) -> Self {
        let bound = |included: &str, excluded: &str| {
            let number = |key: &str| schema.get(key).and_then(Value::as_f64);
            number(excluded).map(|v| (v, true)).or_else(|| number(included).map(|v| (v, false)))
        };
        Self { min: bound("minimum", "exclusiveMinimum"), max: bound("maximum", "exclusiveMaximum") }
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.min, self.max) {
            (None, None) => Ok(()),
            (Some((min, true)), None) => write!(f, "above {min}"),
            (Some((min, false)), None) => write!(f, "{min} or more"),
            (None, Some((max, true))) => write!(f, "below {max}"),
            (None, Some((max, false))) => write!(f, "up to {max}"),
            (Some((min, min_excluded)), Some((max, max_excluded))) => {
                let from = if min_excluded { "above " } else { "" };
                let to = if max_excluded { "below " } else { "" };
                write!(f, "{from}{min} to {to}{max}")
            }
        }
    }
}

/// Returns all keys in the order of the schema, with the title of each section.
pub(crate) fn keys() -> Vec<(String, Vec<Key>)> {
    let settings = SchemaSettings::draft07().with(|s| s.inline_subschemas = true);
    let root = settings.into_generator().into_root_schema_for::<Config>().to_value();
    let mut sections = Vec::new();
    for (name, section) in properties(&root) {
        collect_section(name, section, &mut sections);
    }
    sections
}

/// Returns the reference page of all keys, in Markdown.
pub fn reference_page() -> String {
    let mut page = format!(
        "# Configuration reference\n\nGenerated from the doc comments of `config/src/schema`; `UNVEIL_UPDATE=1 cargo test -p unveil-config reference` \
         writes it again. Values come from the files of `--config` (repeatable, the last one wins), then from variables \
         (`UNVEIL__SECTION__KEY`), then from `--set section.key=value`.\n\
         `unveil config show` prints the effective values (`--explain`: with these texts), `unveil config schema` a JSON Schema for editors.\n\n\
         A file may begin with `{BASE_KEY} = [\"other.toml\"]`. {BASE_MEANING}\n"
    );
    for (title, keys) in keys() {
        let section = &keys[0].section;
        let _ = write!(
            page,
            "\n## `{}`\n\n{title}\n\n| key | type | default | range | meaning |\n|---|---|---|---|---|\n",
            table_header(section)
        );
        for key in &keys {
            let default = key.default.as_ref().map_or_else(|| "required".to_owned(), |value| format!("`{value}`"));
            let cells =
                [format!("`{}`", key.name), key.kind.clone(), default, key.range.to_string(), key.meaning.clone()];
            let cells = cells.map(|cell| cell.replace('|', "\\|").replace('\n', " "));
            let _ = writeln!(page, "| {} |", cells.join(" | "));
        }
    }
    page
}

/// Returns the header of a section in TOML. A section inside the entries of a list is called `[list].section`, and its header follows that of
/// an entry.
fn table_header(section: &str) -> String {
    let name = section.replace(['[', ']'], "");
    if section.ends_with(']') { format!("[[{name}]]") } else { format!("[{name}]") }
}

fn properties(schema: &Value) -> impl Iterator<Item = (&str, &Value)> {
    schema
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(name, value)| (name.as_str(), value))
}

fn description(schema: &Value) -> String {
    schema.get("description").and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn is_section(schema: &Value) -> bool {
    schema.get("properties").is_some()
}

/// Returns the schema of the entries of a list of tables.
fn table_of_list(schema: &Value) -> Option<&Value> {
    schema.get("items").filter(|items| is_section(items))
}

/// Adds a section and, after it, the sections inside it.
fn collect_section(path: &str, schema: &Value, sections: &mut Vec<(String, Vec<Key>)>) {
    let required = schema.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
    let leaves = properties(schema).filter(|(_, p)| !is_section(p) && table_of_list(p).is_none());
    let keys: Vec<Key> = leaves
        .map(|(name, p)| Key {
            section: path.to_owned(),
            name: name.to_owned(),
            kind: kind(p),
            default: if required.iter().any(|r| r == name) { None } else { p.get("default").map(toml_text) },
            range: Range::of(p),
            meaning: description(p),
        })
        .collect();
    if !keys.is_empty() {
        sections.push((description(schema), keys));
    }
    for (name, p) in properties(schema) {
        let path = format!("{path}.{name}");
        if is_section(p) {
            collect_section(&path, p, sections);
        } else if let Some(table) = table_of_list(p) {
            collect_section(&format!("[{path}]"), table, sections);
        }
    }
}

/// Returns the type of a key in words, or its accepted values.
fn kind(schema: &Value) -> String {
    let texts = |list: &Vec<Value>| {
        list.iter().map(|v| format!("`{}`", v.as_str().unwrap_or_default())).collect::<Vec<_>>().join(", ")
    };
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        return texts(values);
    }
    if let Some(variants) = schema.get("oneOf").and_then(Value::as_array) {
        let constants = variants.iter().flat_map(|variant| match (variant.get("const"), variant.get("enum")) {
            (Some(constant), _) => vec![constant.clone()],
            (None, Some(Value::Array(values))) => values.clone(),
            _ => Vec::new(),
        });
        return texts(&constants.collect());
    }
    let name = schema.get("type").and_then(Value::as_str).unwrap_or_default();
    match (name, schema.get("items")) {
        ("array", Some(Value::Array(parts))) => {
            format!("list of [{}]", parts.iter().map(kind).collect::<Vec<_>>().join(", "))
        }
        ("array", Some(item)) if schema.get("minItems").is_some() => {
            let n = schema.get("minItems").and_then(Value::as_u64).unwrap_or_default();
            format!("{n} of {}", kind(item))
        }
        ("array", Some(item)) => format!("list of {}", kind(item)),
        ("object", _) => {
            schema.get("additionalProperties").map_or_else(|| "table".to_owned(), |v| format!("table of {}", kind(v)))
        }
        _ => name.to_owned(),
    }
}

/// Writes a JSON value as TOML does on one line.
fn toml_text(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(toml_text).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            format!("{{{}}}", map.iter().map(|(k, v)| format!("{k} = {}", toml_text(v))).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_path(key: &Key) -> String {
        format!("{}.{}", key.section, key.name)
    }

    fn all_keys() -> Vec<Key> {
        keys().into_iter().flat_map(|(_, keys)| keys).collect()
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "the user asks for an update")]
    fn reference_page_is_current() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
        let page = reference_page();
        if std::env::var_os("UNVEIL_UPDATE").is_some() {
            std::fs::write(&path, &page).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap();
        assert!(
            written == page,
            "crates/config/README.md is out of date: UNVEIL_UPDATE=1 cargo test -p unveil-config reference"
        );
    }

    #[test]
    fn every_key_has_a_type_a_default_and_a_meaning() {
        let keys = all_keys();
        let known: Vec<String> = crate::change::entries(&Config::default()).into_iter().map(|(key, _)| key).collect();
        for path in &known {
            let listed = keys.iter().any(|k| key_path(k) == *path || path.starts_with(&format!("{}.", key_path(k))));
            let tables = [
                "reward.custom",
                "reward.gates",
                "learner.freeze",
                "sft.stage",
                "sft.optimizer.groups",
                "learner.optimizer.groups",
            ];
            assert!(listed || tables.contains(&path.as_str()), "{path}");
        }
        for key in &keys {
            let required = key.section.starts_with('[');
            assert!(!key.kind.is_empty() && !key.meaning.is_empty(), "{key:?}");
            assert!(required || key.default.is_some(), "{key:?}");
        }
        assert!(keys.len() > 200, "{} keys", keys.len());
    }

    #[test]
    fn numbers_beyond_a_range_are_refused() {
        let refused = |path: &str, value: f64, whole: bool| {
            let value = if whole { format!("{}", value as i64) } else { format!("{value:?}") };
            let set = format!("{path}={value}");
            let error = crate::load::load_from(None, std::iter::empty(), std::slice::from_ref(&set))
                .err()
                .map(|e| e.to_string());
            let name = path.rsplit('.').next().unwrap();
            assert!(error.as_ref().is_some_and(|e| e.contains(name)), "{set}: {error:?}");
        };
        let mut ranges = 0;
        for key in all_keys().iter().filter(|k| !k.section.starts_with('[')) {
            let whole = key.kind == "integer";
            let path = key_path(key);
            let step = if whole { 1.0 } else { 0.5 };
            if let Some((min, excluded)) = key.range.min {
                refused(&path, if excluded { min } else { min - step }, whole);
                ranges += 1;
            }
            if let Some((max, excluded)) = key.range.max {
                refused(&path, if excluded { max } else { max + step }, whole);
                ranges += 1;
            }
        }
        assert!(ranges > 100, "{ranges} bounds");
    }

    /// Follows references from `schema` to the schema that they name.
    fn resolved<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
        let reference = schema.get("$ref").or_else(|| schema.pointer("/allOf/0/$ref")).and_then(Value::as_str);
        reference.map_or(schema, |r| root.pointer(r.trim_start_matches('#')).unwrap())
    }

    #[test]
    fn json_schema_has_the_bases_of_a_file() {
        let schema = json_schema();
        assert_eq!(schema["properties"][BASE_KEY]["anyOf"][0]["type"], "array");
        assert!(reference_page().contains("base = [\"other.toml\"]"));
        assert!(keys().iter().flat_map(|(_, keys)| keys).all(|key| key.name != BASE_KEY), "it is no key of a section");
    }

    #[test]
    fn json_schema_has_the_keys_of_the_shipped_files() {
        let root = json_schema();
        let mut checked = 0;
        for file in ["quickstart", "bccd", "rewards", "instruct"] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../configs/{file}.toml"));
            let table: toml::Table = std::fs::read_to_string(path).unwrap().parse().unwrap();
            let mut todo: Vec<(&Value, toml::Value)> = vec![(&root, toml::Value::Table(table))];
            while let Some((schema, value)) = todo.pop() {
                let schema = resolved(&root, schema);
                if let (toml::Value::Table(table), Some(_)) = (&value, schema.get("properties")) {
                    assert_eq!(schema["additionalProperties"], false);
                    for (key, value) in table {
                        let property = schema["properties"].get(key);
                        todo.push((property.unwrap_or_else(|| panic!("{file}: {key}")), value.clone()));
                        checked += 1;
                    }
                }
            }
        }
        assert!(checked > 50, "{checked} keys");
    }
}
