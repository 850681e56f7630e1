//! The one loader: layers, then types, then combinations. Owns the wording of every configuration error.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use config::{Value as Located, ValueKind};
use toml::Table;

use crate::hint::Hints;
use crate::layer::{Layer, join};
use crate::schema::Config;
use crate::{outside, validate, words};

/// What is wrong with a configuration; each message names the key and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML.
    #[error("{path} is not valid TOML: {message}")]
    Syntax {
        /// The file.
        path: String,
        /// Line, column and what was expected.
        message: String,
    },
    /// Keys that do not exist and values of the wrong type, one message each.
    #[error("{}", listed("the configuration cannot be read", .0))]
    Keys(Vec<String>),
    /// `--set` without `=`.
    #[error("`--set {0}`: write it as section.key=value")]
    Set(String),
    /// Values that cannot work, one message each.
    #[error("the configuration cannot run:\n  {}", .0.join("\n  "))]
    Invalid(Vec<String>),
}

/// One fault on the line of the error, several below it.
fn listed(what: &str, faults: &[String]) -> String {
    match faults {
        [one] => one.clone(),
        all => format!("{what}:\n  {}", all.join("\n  ")),
    }
}

/// A configuration, and where each of its values comes from.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The configuration itself.
    pub config: Config,
    /// Where the value of each key comes from that a layer names: `FILE:LINE`, `--set` or `the environment (NAME)`.
    origins: BTreeMap<String, String>,
}

impl Loaded {
    /// Loads a configuration: defaults, then `file`, then variables of the environment that begin with `UNVEIL__`, then `sets`
    /// (`a.b=c`), and checks it.
    ///
    /// # Errors
    /// Whatever is wrong with it, all faults of a kind at once.
    pub fn new(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        sets: &[String],
    ) -> Result<Self, ConfigError> {
        let defaults = Layer::defaults()?;
        let known = &defaults.table;
        let mut layers = Vec::new();
        if let Some(path) = file {
            layers.push(Layer::file(path, known)?);
        }
        let mut variables: Vec<(String, String)> = environment.collect();
        let headers = outside::header_variable(&variables);
        variables.retain(|(name, _)| name.starts_with("UNVEIL_"));
        variables.sort();
        let mut faults = outside::misnamed(variables.iter().map(|(name, _)| name.as_str()), known);
        for (name, value) in variables {
            let Some(key) = name.strip_prefix("UNVEIL__") else { continue };
            let key = key.to_lowercase().replace("__", ".");
            layers.push(Layer::text(format!("the environment ({name})"), &key, &value, known));
        }
        for set in sets {
            let (key, value) = set.split_once('=').ok_or_else(|| ConfigError::Set(set.clone()))?;
            let key = key.trim();
            if key.split('.').any(str::is_empty) {
                return Err(ConfigError::Set(set.clone()));
            }
            layers.push(Layer::text("--set".to_owned(), key, value.trim(), known));
        }
        let hints = Hints::new(known);
        faults.extend(layers.iter().flat_map(|layer| words::faults(layer, &hints)));
        if !faults.is_empty() {
            return Err(ConfigError::Keys(faults));
        }
        let invalid = |what: String| ConfigError::Invalid(vec![what]);
        let mut builder = config::Config::builder().add_source(defaults);
        for layer in layers {
            builder = builder.add_source(layer);
        }
        let merged = builder.build().map_err(|e| invalid(e.to_string()))?;
        let mut origins = BTreeMap::new();
        note_origins(&merged.cache, "", &mut origins);
        // By a table, whose values are taken as they are; the crate itself would round numbers and read words as truth values.
        let table: Table = merged.try_deserialize().map_err(|e| invalid(e.to_string()))?;
        let mut loaded = Self { config: words::typed(table).map_err(|e| invalid(e.message().to_owned()))?, origins };
        let heads = outside::fill_heads(&mut loaded.config);
        heads.map_err(|what| loaded.refuse(vec![what]))?;
        let mut faults = validate::faults(&loaded.config);
        faults.extend(headers.and_then(|variable| validate::plain::collector(&loaded.config, variable)));
        if faults.is_empty() { Ok(loaded) } else { Err(loaded.refuse(faults)) }
    }

    /// Where the value of a key comes from; none where it is the default that nothing names.
    pub fn origin(&self, key: &str) -> Option<&str> {
        self.origins.get(key).map(String::as_str)
    }

    /// How many keys are named by a layer.
    pub fn named(&self) -> usize {
        self.origins.len()
    }

    /// Faults of values, each with where the values of the keys that it names come from.
    pub fn refuse(&self, faults: Vec<String>) -> ConfigError {
        ConfigError::Invalid(faults.into_iter().map(|fault| self.with_origins(fault)).collect())
    }

    fn with_origins(&self, fault: String) -> String {
        let tokens = fault.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.'));
        let mut keys: Vec<&str> = Vec::new();
        for key in tokens.map(|t| t.trim_matches('.')).filter(|t| self.origins.contains_key(*t)) {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let place = |key: &&str| self.origin(key).unwrap_or_default().to_owned();
        let said = match &keys[..] {
            [] => return fault,
            [one] => format!("in {}", place(one)),
            all => all.iter().map(|k| format!("{k} in {}", place(k))).collect::<Vec<_>>().join(", "),
        };
        format!("{fault} ({said})")
    }
}

/// Loads a configuration: defaults, then `file`, then the environment, then `sets` (`a.b=c`), and checks it.
///
/// # Errors
/// Whatever is wrong with it, all faults of a kind at once.
pub fn load(file: Option<&Path>, sets: &[String]) -> Result<Config, ConfigError> {
    load_from(file, environment().into_iter(), sets)
}

/// The environment, for libraries that read their own variables from it (object store credentials). What of it is a credential is
/// remembered as a secret, so that [`unveil_core::redact`] knows it.
pub fn environment() -> Vec<(String, String)> {
    let text =
        |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned()));
    let all: Vec<(String, String)> = std::env::vars_os().filter_map(text).collect();
    all.iter().for_each(|(name, value)| outside::remember(name, value));
    all
}

/// [`load`] with the environment given.
///
/// # Errors
/// As [`load`].
pub fn load_from(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    sets: &[String],
) -> Result<Config, ConfigError> {
    Loaded::new(file, environment, sets).map(|loaded| loaded.config)
}

/// The configuration that a text is, strict about keys and types alone: what was effective once may not be any more. `name` is what
/// messages call the text.
///
/// # Errors
/// It is not TOML, or holds keys or kinds of values that this version does not know.
pub fn read(name: &str, text: &str) -> Result<Config, ConfigError> {
    let defaults = Layer::defaults()?;
    let layer = Layer::written(name.to_owned(), text, &defaults.table)?;
    match words::faults(&layer, &Hints::new(&defaults.table)) {
        faults if faults.is_empty() => {
            words::typed(layer.table).map_err(|e| ConfigError::Keys(vec![e.message().to_owned()]))
        }
        faults => Err(ConfigError::Keys(faults)),
    }
}

fn note_origins(value: &Located, key: &str, origins: &mut BTreeMap<String, String>) {
    match &value.kind {
        ValueKind::Table(table) if !table.is_empty() => {
            table.iter().for_each(|(name, value)| note_origins(value, &join(key, name), origins));
        }
        _ => {
            if let Some(origin) = value.origin() {
                origins.insert(key.to_owned(), origin.to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests;
