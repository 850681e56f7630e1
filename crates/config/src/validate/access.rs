//! Checks of the sections `[tls]` and `[auth]`, and of all keys for credentials in their values.

use unveil_core::find_url_credential;

use crate::change::entries;
use crate::identity::Role;
use crate::schema::Config;

/// Adds a message to `out` for every problem.
pub(super) fn check(c: &Config, out: &mut Vec<String>) {
    if !c.auth.token_env.is_empty() && !c.auth.token_file.is_empty() {
        out.push("auth.token_env and auth.token_file are both set: use one".into());
    }
    if !c.tls.mutual && c.tls.dir.is_empty() {
        out.push("tls.mutual = false has no effect without tls.dir: set tls.dir or remove tls.mutual".into());
    }
    for (role, names) in &c.tls.names {
        if !Role::ALL.iter().any(|r| r.name() == role) {
            out.push(format!("tls.names.{role} is not a role: use learner, rollout, reward or client"));
        }
        if names.is_empty() || names.iter().any(|n| n.is_empty() || n.matches('*').count() > 1) {
            out.push(format!("tls.names.{role} must list certificate names, each with at most one `*`"));
        }
    }
    for (key, value) in entries(c) {
        let text: toml::Value = match format!("v = {value}").parse::<toml::Table>() {
            Ok(mut t) => t.remove("v").unwrap_or(toml::Value::Boolean(false)),
            Err(_) => continue,
        };
        refuse_credentials(&key, &text, out);
    }
}

/// Refuses credentials in values, which would end up in files, logs and process lists. The message does not repeat them.
fn refuse_credentials(key: &str, value: &toml::Value, out: &mut Vec<String>) {
    match value {
        toml::Value::String(text) => {
            if let Some(name) = find_url_credential(text) {
                out.push(format!(
                    "{key} is a URL with credentials (`{name}`): remove them; keys and tokens are read from environment variables \
                     or files"
                ));
            }
            if key.ends_with("_env") && !(text.is_empty() || is_variable_name(text)) {
                out.push(format!(
                    "{key} is not the name of an environment variable (letters, digits and _, at most 64 characters): it names \
                     the variable that holds the secret, never the secret itself"
                ));
            }
        }
        toml::Value::Array(all) => all.iter().for_each(|v| refuse_credentials(key, v, out)),
        toml::Value::Table(table) => {
            table.iter().for_each(|(name, v)| refuse_credentials(&format!("{key}.{name}"), v, out))
        }
        _ => {}
    }
}

fn is_variable_name(text: &str) -> bool {
    text.len() <= 64
        && !text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate::changed::problems_after;

    fn problems(set: impl FnOnce(&mut Config)) -> String {
        problems_after(check, set).join("\n")
    }

    #[test]
    fn credentials_in_urls_are_refused_and_not_repeated() {
        let bad = "https://alice:hunter2@host:1/v1";
        let custom = custom_at(bad);
        let places: [(&str, String); 6] = [
            ("reward.judge.base_url", problems(|c| c.reward.judge.base_url = bad.into())),
            ("collect.base_url", problems(|c| c.collect.base_url = bad.into())),
            ("checkpoint.url", problems(|c| c.checkpoint.url = "s3://key:hunter2@bucket/prefix".into())),
            ("learner.address", problems(|c| c.learner.address = bad.into())),
            ("data.root", problems(|c| c.data.root = bad.into())),
            ("reward.custom.address", problems(|c| c.reward.custom = vec![custom.clone()])),
        ];
        for (key, message) in places {
            assert!(message.starts_with(key) && message.contains("credentials"), "{key}: {message}");
            assert!(!message.contains("hunter2") && !message.contains("alice"), "{message}");
        }
        for name in ["token", "sig", "api_key", "X-Amz-Signature", "access_token"] {
            let bad = format!("https://host/v1?version=2&{name}=hunter2");
            let places: [(&str, String); 9] = [
                ("reward.judge.base_url", problems(|c| c.reward.judge.base_url = bad.clone())),
                ("collect.base_url", problems(|c| c.collect.base_url = bad.clone())),
                ("checkpoint.url", problems(|c| c.checkpoint.url = bad.clone())),
                ("learner.address", problems(|c| c.learner.address = bad.clone())),
                ("reward.address", problems(|c| c.reward.address = bad.clone())),
                ("telemetry.otlp_endpoint", problems(|c| c.telemetry.otlp_endpoint = bad.clone())),
                ("data.root", problems(|c| c.data.root = bad.clone())),
                ("model.dir", problems(|c| c.model.dir = bad.clone())),
                ("reward.custom.address", problems(|c| c.reward.custom = vec![custom_at(&bad)])),
            ];
            for (key, message) in places {
                assert!(
                    message.starts_with(key) && message.contains(name) && !message.contains("hunter2"),
                    "{key}: {message}"
                );
            }
        }
        for good in ["https://host:1/v1/@me", "s3://bucket/a@b", "a@b", "http://[::1]:80", ""] {
            assert_eq!(problems(|c| c.reward.judge.base_url = good.into()), "", "{good}");
        }
    }

    fn custom_at(address: &str) -> crate::schema::Custom {
        toml::from_str(&format!("name = \"a\"\naddress = \"{address}\"")).unwrap()
    }

    #[test]
    fn secrets_as_variable_names_are_refused_and_not_repeated() {
        for secret in ["sk-live-123456", "a b", "9a", "x".repeat(65).as_str()] {
            let message = problems(|c| c.reward.judge.key_env = secret.into());
            assert!(message.starts_with("reward.judge.key_env") && !message.contains(secret), "{message}");
            assert!(problems(|c| c.auth.token_env = secret.into()).starts_with("auth.token_env"));
        }
        assert_eq!(problems(|c| c.auth.token_env = "UNVEIL_TOKEN".into()), "");
    }

    #[test]
    fn conflicting_keys_are_refused() {
        let both = problems(|c| (c.auth.token_env, c.auth.token_file) = ("A".into(), "b".into()));
        assert!(both.contains("auth.token_env") && both.contains("auth.token_file"), "{both}");
        assert!(problems(|c| c.tls.mutual = false).contains("tls.mutual"));
        assert_eq!(problems(|c| (c.tls.mutual, c.tls.dir) = (false, "d".into())), "");
    }
}
