//! Faults of the sections `[tls]` and `[auth]`, and of any key that would hold a credential itself.

use unveil_core::url_credential;

use crate::change::entries;
use crate::identity::Role;
use crate::schema::Config;

/// Adds every fault to `out`.
pub(super) fn faults(c: &Config, out: &mut Vec<String>) {
    if !c.auth.token_env.is_empty() && !c.auth.token_file.is_empty() {
        out.push("auth.token_env and auth.token_file exclude each other".into());
    }
    if !c.tls.mutual && c.tls.dir.is_empty() {
        out.push("tls.mutual = false says who needs a certificate, but without tls.dir there is none".into());
    }
    for (role, names) in &c.tls.names {
        if !Role::ALL.iter().any(|r| r.name() == role) {
            out.push(format!("tls.names.{role} names no role: use learner, rollout, reward or client"));
        }
        if names.is_empty() || names.iter().any(|n| n.is_empty() || n.matches('*').count() > 1) {
            out.push(format!("tls.names.{role} must list names of certificates, each with one `*` at most"));
        }
    }
    for (key, value) in entries(c) {
        let text: toml::Value = match format!("v = {value}").parse::<toml::Table>() {
            Ok(mut t) => t.remove("v").unwrap_or(toml::Value::Boolean(false)),
            Err(_) => continue,
        };
        look(&key, &text, out);
    }
}

/// A credential in a configuration would be in files, logs and process lists: it is refused, and not repeated.
fn look(key: &str, value: &toml::Value, out: &mut Vec<String>) {
    match value {
        toml::Value::String(text) => {
            if let Some(name) = url_credential(text) {
                out.push(format!(
                    "{key} holds a URL with credentials in it (`{name}`): take them out; keys and tokens come from environment \
                     variables or files"
                ));
            }
            if key.ends_with("_env") && !(text.is_empty() || is_variable(text)) {
                out.push(format!(
                    "{key} is not the name of an environment variable (letters, digits and _, 64 at most): it names the \
                     variable that holds the secret, never the secret itself"
                ));
            }
        }
        toml::Value::Array(all) => all.iter().for_each(|v| look(key, v, out)),
        toml::Value::Table(table) => table.iter().for_each(|(name, v)| look(&format!("{key}.{name}"), v, out)),
        _ => {}
    }
}

fn is_variable(text: &str) -> bool {
    text.len() <= 64
        && !text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(set: impl FnOnce(&mut Config)) -> String {
        let mut c = Config::default();
        set(&mut c);
        let mut out = Vec::new();
        faults(&c, &mut out);
        out.join("\n")
    }

    #[test]
    fn credentials_in_urls_are_refused_and_not_repeated() {
        let bad = "https://alice:hunter2@host:1/v1";
        let custom = custom_at(bad);
        let places: [(&str, String); 6] = [
            ("reward.judge.base_url", of(|c| c.reward.judge.base_url = bad.into())),
            ("collect.base_url", of(|c| c.collect.base_url = bad.into())),
            ("checkpoint.url", of(|c| c.checkpoint.url = "s3://key:hunter2@bucket/prefix".into())),
            ("learner.address", of(|c| c.learner.address = bad.into())),
            ("data.root", of(|c| c.data.root = bad.into())),
            ("reward.custom.address", of(|c| c.reward.custom = vec![custom.clone()])),
        ];
        for (key, said) in places {
            assert!(said.starts_with(key) && said.contains("credentials"), "{key}: {said}");
            assert!(!said.contains("hunter2") && !said.contains("alice"), "{said}");
        }
        for name in ["token", "sig", "api_key", "X-Amz-Signature", "access_token"] {
            let bad = format!("https://host/v1?version=2&{name}=hunter2");
            let places: [(&str, String); 9] = [
                ("reward.judge.base_url", of(|c| c.reward.judge.base_url = bad.clone())),
                ("collect.base_url", of(|c| c.collect.base_url = bad.clone())),
                ("checkpoint.url", of(|c| c.checkpoint.url = bad.clone())),
                ("learner.address", of(|c| c.learner.address = bad.clone())),
                ("reward.address", of(|c| c.reward.address = bad.clone())),
                ("telemetry.otlp_endpoint", of(|c| c.telemetry.otlp_endpoint = bad.clone())),
                ("data.root", of(|c| c.data.root = bad.clone())),
                ("model.dir", of(|c| c.model.dir = bad.clone())),
                ("reward.custom.address", of(|c| c.reward.custom = vec![custom_at(&bad)])),
            ];
            for (key, said) in places {
                assert!(said.starts_with(key) && said.contains(name) && !said.contains("hunter2"), "{key}: {said}");
            }
        }
        for good in ["https://host:1/v1/@me", "s3://bucket/a@b", "a@b", "http://[::1]:80", ""] {
            assert_eq!(of(|c| c.reward.judge.base_url = good.into()), "", "{good}");
        }
    }

    fn custom_at(address: &str) -> crate::schema::Custom {
        toml::from_str(&format!("name = \"a\"\naddress = \"{address}\"")).unwrap()
    }

    #[test]
    fn a_secret_in_place_of_its_name_is_refused_and_not_repeated() {
        for secret in ["sk-live-123456", "a b", "9a", "x".repeat(65).as_str()] {
            let said = of(|c| c.reward.judge.key_env = secret.into());
            assert!(said.starts_with("reward.judge.key_env") && !said.contains(secret), "{said}");
            assert!(of(|c| c.auth.token_env = secret.into()).starts_with("auth.token_env"));
        }
        assert_eq!(of(|c| c.auth.token_env = "UNVEIL_TOKEN".into()), "");
    }

    #[test]
    fn what_excludes_each_other() {
        let both = of(|c| (c.auth.token_env, c.auth.token_file) = ("A".into(), "b".into()));
        assert!(both.contains("auth.token_env") && both.contains("auth.token_file"), "{both}");
        assert!(of(|c| c.tls.mutual = false).contains("tls.mutual"));
        assert_eq!(of(|c| (c.tls.mutual, c.tls.dir) = (false, "d".into())), "");
    }
}
