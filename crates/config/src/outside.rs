//! What a configuration names and does not hold: secrets in the environment or in files, and calibrated heads.

use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};
use unveil_core::Secret;

use crate::layer::leaves;
use crate::load::ConfigError;
use crate::schema::Config;

/// Variables whose headers the exporter of spans sends along, the first that is set.
const OTLP_HEADERS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"];

/// The variable whose headers go to the collector of spans, where one is set.
pub(crate) fn header_variable(variables: &[(String, String)]) -> Option<&'static str> {
    OTLP_HEADERS.into_iter().find(|name| variables.iter().any(|(n, value)| n == name && !value.is_empty()))
}

/// Remembers what of a variable is secret: the value of a credential, the values of headers.
pub(crate) fn remember(name: &str, value: &str) {
    if is_credential(name) {
        drop(Secret::new(value));
    }
    if OTLP_HEADERS.contains(&name) {
        let values = value.split(',').filter_map(|pair| pair.split_once('=')).map(|(_, value)| value);
        // `Bearer%20KEY`: the key alone is the secret.
        values.for_each(|value| drop(Secret::new(value.replace("%20", " ").rsplit(' ').next().unwrap_or(value))));
    }
}

/// Variables that look like keys and are none, since an underscore is missing: `UNVEIL_LEARNER_STEPS`. One message each.
pub(crate) fn misnamed<'a>(names: impl Iterator<Item = &'a str>, known: &Table) -> Vec<String> {
    let mut all: Vec<(String, &Value)> = Vec::new();
    leaves(known, "", &mut all);
    let flat = |key: &str| key.to_lowercase().replace(['.', '_'], "");
    let fault = |name: &'a str| {
        let rest = name.strip_prefix("UNVEIL_").filter(|rest| !rest.starts_with('_'))?;
        let (key, _) = all.iter().find(|(key, _)| flat(key) == flat(rest))?;
        let right = key.to_uppercase().replace('.', "__");
        Some(format!(
            "the environment variable {name} sets nothing: write UNVEIL__{right}, with two underscores between the parts"
        ))
    };
    names.filter_map(fault).collect()
}

/// The secret in the environment variable `variable`, else in `file`; none where neither is named.
///
/// # Errors
/// The variable is not set, the file cannot be read, or there is nothing in it; `key` is the configuration key that names it.
pub fn secret(key: &str, variable: &str, file: &str) -> Result<Option<Secret>, ConfigError> {
    let fail = |what: String| ConfigError::Invalid(vec![what]);
    let (text, place) = if !variable.is_empty() {
        let text = std::env::var(variable);
        (
            text.map_err(|_| fail(format!("{key} names the environment variable {variable}, which is not set")))?,
            variable,
        )
    } else if !file.is_empty() {
        (std::fs::read_to_string(file).map_err(|e| fail(format!("{key} names {file}: {e}")))?, file)
    } else {
        return Ok(None);
    };
    let secret = Secret::new(&text);
    if secret.reveal().is_empty() {
        return Err(fail(format!("{key} names {place}, which is empty")));
    }
    Ok(Some(secret))
}

/// Whether the environment variable of this name holds a credential rather than a name, an address or a path.
pub(crate) fn is_credential(variable: &str) -> bool {
    let name = variable.to_ascii_uppercase();
    let kinds = ["SECRET", "TOKEN", "PASSWORD", "PASSWD", "CREDENTIAL", "ACCESS_KEY", "API_KEY", "ACCOUNT_KEY"];
    let names = ["_FILE", "_PATH", "_URI", "_URL", "_ENV", "_NAME", "_DIR"];
    kinds.iter().any(|k| name.contains(k)) && !names.iter().any(|n| name.ends_with(n))
}

/// Heads of `reward.vision_relevance.heads_file`, put where everything that reads attention looks for them. Heads that are set
/// besides must be the same, so that an effective configuration loads again and a calibration stays frozen.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn fill_heads(config: &mut Config) -> Result<(), String> {
    #[derive(Deserialize)]
    struct File {
        heads: Vec<[usize; 2]>,
    }
    let v = &mut config.reward.vision_relevance;
    if v.heads_file.is_empty() {
        return Ok(());
    }
    let fail = |what: String| format!("reward.vision_relevance.heads_file {what}");
    let text = std::fs::read_to_string(Path::new(&v.heads_file)).map_err(|e| fail(format!("{}: {e}", v.heads_file)))?;
    let file: File = toml::from_str(&text).map_err(|e| fail(format!("{}: {}", v.heads_file, e.message())))?;
    if file.heads.is_empty() {
        return Err(fail(format!("{} chooses no head", v.heads_file)));
    }
    if !v.layers.is_empty() || (!v.heads.is_empty() && v.heads != file.heads) {
        return Err(fail(format!(
            "{} chooses other heads than reward.vision_relevance.layers and heads: leave those empty",
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
    fn credentials_are_told_by_their_names() {
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
    fn a_variable_with_too_few_underscores_is_named() {
        let known = crate::layer::Layer::defaults().unwrap().table;
        for (name, right) in [
            ("UNVEIL_LEARNER_STEPS", "UNVEIL__LEARNER__STEPS,"),
            ("UNVEIL_LEARNER__STEPS", "UNVEIL__LEARNER__STEPS,"),
            ("UNVEIL_REWARD_VISION_RELEVANCE_WEIGHT", "UNVEIL__REWARD__VISION_RELEVANCE__WEIGHT,"),
        ] {
            let said = misnamed([name].into_iter(), &known).join("\n");
            assert!(said.contains(name) && said.contains(right), "{said}");
        }
        // Those that are read elsewhere, and those that a cluster makes of the names of services.
        for name in [
            "UNVEIL__LEARNER__STEPS",
            "UNVEIL_TOKEN",
            "UNVEIL_SEED",
            "UNVEIL_LEARNER_SERVICE_HOST",
            "UNVEIL_LEARNER_PORT",
        ] {
            assert_eq!(misnamed([name].into_iter(), &known), [""; 0], "{name}");
        }
    }

    #[test]
    fn headers_of_the_exporter_are_known_secrets() {
        remember("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20no-word-of-this,x-key=nor-of-that");
        assert_eq!(unveil_core::redact("no-word-of-this, nor-of-that"), "***, ***");
        let of = |n: &str, v: &str| header_variable(&[(n.to_owned(), v.to_owned())]);
        assert_eq!(of("OTEL_EXPORTER_OTLP_HEADERS", "a=b"), Some("OTEL_EXPORTER_OTLP_HEADERS"));
        assert_eq!((of("OTEL_EXPORTER_OTLP_HEADERS", ""), of("PATH", "a=b")), (None, None));
    }

    #[test]
    fn secrets_come_from_where_they_are_named() {
        let dir = std::env::temp_dir().join(format!("unveil-secret-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (full, empty) = (dir.join("token"), dir.join("empty"));
        std::fs::write(&full, "abc\n").unwrap();
        std::fs::write(&empty, " \n").unwrap();
        let read = |file: &std::path::Path| secret("x.token_file", "", &file.display().to_string());
        assert_eq!(read(&full).unwrap(), Some(Secret::new("abc")));
        assert_eq!(secret("x", "", "").unwrap(), None);
        for e in [read(&empty), read(&dir.join("none")), secret("x.token_file", "UNVEIL_NO_SUCH_VARIABLE", "")] {
            let e = e.unwrap_err().to_string();
            assert!(e.contains("x.token_file"), "{e}");
        }
    }
}
