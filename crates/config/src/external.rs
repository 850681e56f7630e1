//! Values that a configuration refers to: secrets in the environment or in files, and files of calibrated heads.

use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};
use unveil_core::Secret;

use crate::error::ConfigError;
use crate::layer::leaves;
use crate::schema::Config;

/// Environment variables with the headers of the trace exporter; the first one that is set applies.
const OTLP_HEADER_VARIABLES: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"];

/// Returns the environment variable with the headers for the trace collector, if one is set.
pub(crate) fn header_variable(variables: &[(String, String)]) -> Option<&'static str> {
    OTLP_HEADER_VARIABLES.into_iter().find(|name| variables.iter().any(|(n, value)| n == name && !value.is_empty()))
}

/// Registers the secrets in an environment variable for redaction: the value of a credential, the values of headers.
pub(crate) fn remember_secrets(name: &str, value: &str) {
    if is_credential(name) {
        drop(Secret::new(value));
    }
    if OTLP_HEADER_VARIABLES.contains(&name) {
        let values = value.split(',').filter_map(|pair| pair.split_once('=')).map(|(_, value)| value);
        // In `Bearer%20KEY` only the key is secret.
        values.for_each(|value| drop(Secret::new(value.replace("%20", " ").rsplit(' ').next().unwrap_or(value))));
    }
}

/// Returns a message for each environment variable that would be a key but lacks an underscore, such as `UNVEIL_LEARNER_STEPS`.
pub(crate) fn misnamed_variables<'a>(names: impl Iterator<Item = &'a str>, known: &Table) -> Vec<String> {
    let mut all: Vec<(String, &Value)> = Vec::new();
    leaves(known, "", &mut all);
    let flat = |key: &str| key.to_lowercase().replace(['.', '_'], "");
    let problem = |name: &'a str| {
        let rest = name.strip_prefix("UNVEIL_").filter(|rest| !rest.starts_with('_'))?;
        let (key, _) = all.iter().find(|(key, _)| flat(key) == flat(rest))?;
        let variable = key.to_uppercase().replace('.', "__");
        Some(format!(
            "the environment variable {name} has no effect: write UNVEIL__{variable}, with two underscores between the parts"
        ))
    };
    names.filter_map(problem).collect()
}

/// Reads a secret from the environment variable `variable`, or else from `file`; `None` if both names are empty.
///
/// # Errors
/// Returns [`ConfigError::Invalid`], naming the configuration `key`, if the variable is not set, the file cannot be read, or the secret is
/// empty.
#[expect(clippy::disallowed_methods, reason = "this crate reads the environment for all others")]
pub fn read_secret(key: &str, variable: &str, file: &str) -> Result<Option<Secret>, ConfigError> {
    let invalid = |message: String| ConfigError::Invalid(vec![message]);
    let (text, source) = if !variable.is_empty() {
        let text = std::env::var(variable);
        (
            text.map_err(|_| invalid(format!("{key} names the environment variable {variable}, which is not set")))?,
            variable,
        )
    } else if !file.is_empty() {
        (std::fs::read_to_string(file).map_err(|e| invalid(format!("{key} names {file}: {e}")))?, file)
    } else {
        return Ok(None);
    };
    let secret = Secret::new(&text);
    if secret.reveal().is_empty() {
        return Err(invalid(format!("{key} names {source}, which is empty")));
    }
    Ok(Some(secret))
}

/// Returns whether the environment variable holds a credential, judging by its name, rather than a name, an address or a path.
pub(crate) fn is_credential(variable: &str) -> bool {
    let name = variable.to_ascii_uppercase();
    let credentials = ["SECRET", "TOKEN", "PASSWORD", "PASSWD", "CREDENTIAL", "ACCESS_KEY", "API_KEY", "ACCOUNT_KEY"];
    let references = ["_FILE", "_PATH", "_URI", "_URL", "_ENV", "_NAME", "_DIR"];
    credentials.iter().any(|k| name.contains(k)) && !references.iter().any(|n| name.ends_with(n))
}

/// Copies the heads of `reward.vision_relevance.heads_file` to `reward.vision_relevance.heads`. If heads are set too, they must be equal, so
/// that an effective configuration loads again and a calibration cannot change unnoticed.
///
/// # Errors
/// Returns a message if the file cannot be read or conflicts with the configuration.
pub(crate) fn fill_heads(config: &mut Config) -> Result<(), String> {
    #[derive(Deserialize)]
    struct HeadsFile {
        heads: Vec<[usize; 2]>,
    }
    let v = &mut config.reward.vision_relevance;
    if v.heads_file.is_empty() {
        return Ok(());
    }
    let message = |problem: String| format!("reward.vision_relevance.heads_file {problem}");
    let text =
        std::fs::read_to_string(Path::new(&v.heads_file)).map_err(|e| message(format!("{}: {e}", v.heads_file)))?;
    let file: HeadsFile = toml::from_str(&text).map_err(|e| message(format!("{}: {}", v.heads_file, e.message())))?;
    if file.heads.is_empty() {
        return Err(message(format!("{} contains no heads", v.heads_file)));
    }
    if !v.layers.is_empty() || (!v.heads.is_empty() && v.heads != file.heads) {
        return Err(message(format!(
            "{} contains other heads than reward.vision_relevance.layers and heads: leave those empty",
            v.heads_file
        )));
    }
    v.heads = file.heads;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_recognised_by_name() {
        for name in
            ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "UNVEIL_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "db_password"]
        {
            assert!(is_credential(name), "{name}");
        }
        for name in ["AWS_REGION", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "PATH", "HOME"]
        {
            assert!(!is_credential(name), "{name}");
        }
    }

    #[test]
    fn variables_with_missing_underscores_are_reported() {
        let known = crate::layer::Layer::defaults().unwrap().table;
        for (name, expected) in [
            ("UNVEIL_LEARNER_STEPS", "UNVEIL__LEARNER__STEPS,"),
            ("UNVEIL_LEARNER__STEPS", "UNVEIL__LEARNER__STEPS,"),
            ("UNVEIL_REWARD_VISION_RELEVANCE_WEIGHT", "UNVEIL__REWARD__VISION_RELEVANCE__WEIGHT,"),
        ] {
            let message = misnamed_variables([name].into_iter(), &known).join("\n");
            assert!(message.contains(name) && message.contains(expected), "{message}");
        }
        // Variables that are read elsewhere, and those that Kubernetes derives from service names.
        for name in [
            "UNVEIL__LEARNER__STEPS",
            "UNVEIL_TOKEN",
            "UNVEIL_SEED",
            "UNVEIL_LEARNER_SERVICE_HOST",
            "UNVEIL_LEARNER_PORT",
        ] {
            assert_eq!(misnamed_variables([name].into_iter(), &known), [""; 0], "{name}");
        }
    }

    #[test]
    fn exporter_headers_are_redacted() {
        remember_secrets("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20no-word-of-this,x-key=nor-of-that");
        assert_eq!(unveil_core::redact("no-word-of-this, nor-of-that"), "***, ***");
        let of = |n: &str, v: &str| header_variable(&[(n.to_owned(), v.to_owned())]);
        assert_eq!(of("OTEL_EXPORTER_OTLP_HEADERS", "a=b"), Some("OTEL_EXPORTER_OTLP_HEADERS"));
        assert_eq!((of("OTEL_EXPORTER_OTLP_HEADERS", ""), of("PATH", "a=b")), (None, None));
    }

    #[test]
    fn secrets_are_read_from_variables_and_files() {
        let dir = std::env::temp_dir().join(format!("unveil-secret-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let full = dir.join("token");
        let empty = dir.join("empty");
        std::fs::write(&full, "abc\n").unwrap();
        std::fs::write(&empty, " \n").unwrap();
        let read = |file: &std::path::Path| read_secret("x.token_file", "", &file.display().to_string());
        assert_eq!(read(&full).unwrap(), Some(Secret::new("abc")));
        assert_eq!(read_secret("x", "", "").unwrap(), None);
        for e in [read(&empty), read(&dir.join("none")), read_secret("x.token_file", "UNVEIL_NO_SUCH_VARIABLE", "")] {
            let e = e.unwrap_err().to_string();
            assert!(e.contains("x.token_file"), "{e}");
        }
    }
}
