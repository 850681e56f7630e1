//! Loading of configurations: merges layers, checks types, then values and combinations.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use config::{Value as Located, ValueKind};
use toml::Table;

use crate::error::ConfigError;
use crate::hint::Hints;
use crate::layer::{Layer, join};
use crate::schema::Config;
use crate::{base, external, type_errors, validate};

/// Loaded configuration with the origins of its values.
///
/// # Examples
/// ```
/// use unveil_config::Loaded;
///
/// # let dir = tempfile::tempdir()?;
/// # let file = dir.path().join("run.toml");
/// std::fs::write(&file, "[run]\nseed = 1\n\n[learner]\nsteps = 40\n")?;
/// let loaded = Loaded::new(&[file], std::iter::empty(), &["run.seed=7".to_owned()])?;
/// assert_eq!(loaded.config.run.seed, 7);
/// assert_eq!(loaded.origin("run.seed"), Some("--set"));
/// assert!(loaded.origin("learner.steps").is_some_and(|origin| origin.ends_with("run.toml:5")));
/// assert_eq!(loaded.origin("learner.groups"), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Origin of each key that is set by a layer: `FILE:LINE`, `--set` or `the environment (NAME)`.
    origins: BTreeMap<String, String>,
}

impl Loaded {
    /// Loads and checks a configuration from the defaults, then `files`, each after the files that it names as `base`, then the variables in
    /// `environment` that start with `UNVEIL__`, then `sets` (`a.b=c`).
    ///
    /// # Errors
    /// Returns a [`ConfigError`] with all problems of one kind.
    pub fn new(
        files: &[PathBuf],
        environment: impl Iterator<Item = (String, String)>,
        sets: &[String],
    ) -> Result<Self, ConfigError> {
        let defaults = Layer::defaults()?;
        let known = &defaults.table;
        let mut layers = Vec::new();
        for path in files {
            layers.extend(base::read_with_bases(path, known)?);
        }
        let mut variables: Vec<(String, String)> = environment.collect();
        let headers = external::header_variable(&variables);
        variables.retain(|(name, _)| name.starts_with("UNVEIL_"));
        variables.sort();
        let mut problems = external::misnamed_variables(variables.iter().map(|(name, _)| name.as_str()), known);
        for (name, value) in variables {
            let Some(key) = name.strip_prefix("UNVEIL__") else { continue };
            let key = key.to_lowercase().replace("__", ".");
            layers.push(Layer::single(format!("the environment ({name})"), &key, &value, known));
        }
        for set in sets {
            let (key, value) = set.split_once('=').ok_or_else(|| ConfigError::Set(set.clone()))?;
            let key = key.trim();
            if key.split('.').any(str::is_empty) {
                return Err(ConfigError::Set(set.clone()));
            }
            layers.push(Layer::single("--set".to_owned(), key, value.trim(), known));
        }
        let hints = Hints::new(known);
        problems.extend(layers.iter().flat_map(|layer| type_errors::problems(layer, &hints)));
        if !problems.is_empty() {
            return Err(ConfigError::Keys(problems));
        }
        let invalid = |message: String| ConfigError::Invalid(vec![message]);
        let mut builder = config::Config::builder().add_source(defaults);
        for layer in layers {
            builder = builder.add_source(layer);
        }
        let merged = builder.build().map_err(|e| invalid(e.to_string()))?;
        let mut origins = BTreeMap::new();
        collect_origins(&merged.cache, "", &mut origins);
        // Through a TOML table, which keeps values unchanged; the `config` crate would round numbers and read words as booleans.
        let table: Table = merged.try_deserialize().map_err(|e| invalid(e.to_string()))?;
        let mut loaded =
            Self { config: type_errors::deserialize(table).map_err(|e| invalid(e.message().to_owned()))?, origins };
        let heads = external::fill_heads(&mut loaded.config);
        heads.map_err(|message| loaded.invalid(vec![message]))?;
        let mut problems = validate::problems(&loaded.config);
        problems.extend(headers.and_then(|variable| validate::plaintext::collector_problem(&loaded.config, variable)));
        if problems.is_empty() { Ok(loaded) } else { Err(loaded.invalid(problems)) }
    }

    /// Returns the origin of a key's value; `None` if it is a default.
    pub fn origin(&self, key: &str) -> Option<&str> {
        self.origins.get(key).map(String::as_str)
    }

    /// Returns the number of keys that are set by a layer.
    pub fn set_key_count(&self) -> usize {
        self.origins.len()
    }

    /// Returns [`ConfigError::Invalid`] with each problem extended by the origins of the keys that it names.
    pub fn invalid(&self, problems: Vec<String>) -> ConfigError {
        ConfigError::Invalid(problems.into_iter().map(|problem| self.with_origins(problem)).collect())
    }

    fn with_origins(&self, problem: String) -> String {
        let tokens = problem.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.'));
        let mut keys: Vec<&str> = Vec::new();
        for key in tokens.map(|t| t.trim_matches('.')).filter(|t| self.origins.contains_key(*t)) {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let origin = |key: &&str| self.origin(key).unwrap_or_default().to_owned();
        let origins = match &keys[..] {
            [] => return problem,
            [one] => format!("in {}", origin(one)),
            all => all.iter().map(|k| format!("{k} in {}", origin(k))).collect::<Vec<_>>().join(", "),
        };
        format!("{problem} ({origins})")
    }
}

/// Loads and checks a configuration from the defaults, then `file`, then the environment, then `sets` (`a.b=c`).
///
/// # Errors
/// Returns a [`ConfigError`] with all problems of one kind.
pub fn load(file: Option<&Path>, sets: &[String]) -> Result<Config, ConfigError> {
    load_from(file, environment().into_iter(), sets)
}

/// Returns the environment variables, also for libraries that have their own (object store credentials). Registers the credentials among
/// them for [`unveil_core::redact`].
#[expect(clippy::disallowed_methods, reason = "this crate reads the environment for all others")]
pub fn environment() -> Vec<(String, String)> {
    let text =
        |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned()));
    let all: Vec<(String, String)> = std::env::vars_os().filter_map(text).collect();
    all.iter().for_each(|(name, value)| external::remember_secrets(name, value));
    all
}

/// Loads and checks a configuration like [`load`], with the given environment.
///
/// # Errors
/// Returns a [`ConfigError`] with all problems of one kind.
pub fn load_from(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    sets: &[String],
) -> Result<Config, ConfigError> {
    let files: Vec<PathBuf> = file.map(Path::to_owned).into_iter().collect();
    Loaded::new(&files, environment, sets).map(|loaded| loaded.config)
}

/// Parses a complete configuration, checking only keys and types: a configuration saved by another version may be invalid by the rules of
/// this one. `name` is its origin in messages.
///
/// # Errors
/// Returns [`ConfigError::Syntax`] if the text is not TOML and [`ConfigError::Keys`] for unknown keys and wrong types.
pub fn parse(name: &str, text: &str) -> Result<Config, ConfigError> {
    let defaults = Layer::defaults()?;
    let layer = Layer::parse(name.to_owned(), text, &defaults.table)?;
    match type_errors::problems(&layer, &Hints::new(&defaults.table)) {
        problems if problems.is_empty() => {
            type_errors::deserialize(layer.table).map_err(|e| ConfigError::Keys(vec![e.message().to_owned()]))
        }
        problems => Err(ConfigError::Keys(problems)),
    }
}

/// Collects the origins of all keys below `key`.
fn collect_origins(value: &Located, key: &str, origins: &mut BTreeMap<String, String>) {
    match &value.kind {
        ValueKind::Table(table) if !table.is_empty() => {
            table.iter().for_each(|(name, value)| collect_origins(value, &join(key, name), origins));
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
