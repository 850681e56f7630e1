//! What a configuration names and does not hold: secrets in the environment or in files, and calibrated heads.

use std::path::Path;

use serde::Deserialize;
use unveil_core::Secret;

use crate::load::ConfigError;
use crate::schema::Config;

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
pub(crate) fn fill_heads(config: &mut Config) -> Result<(), ConfigError> {
    #[derive(Deserialize)]
    struct File {
        heads: Vec<[usize; 2]>,
    }
    let v = &mut config.reward.vision_relevance;
    if v.heads_file.is_empty() {
        return Ok(());
    }
    let fail = |what: String| ConfigError::Invalid(vec![format!("reward.vision_relevance.heads_file {what}")]);
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
