//! Checks against sending keys and tokens in plaintext: plain HTTP is allowed to this machine only, unless `tls.insecure` declares that
//! the network encrypts. Between the roles, the client of the service crate checks this.

use std::net::IpAddr;

use unveil_core::redact;

use crate::schema::Config;

/// Adds a message to `out` for every problem.
pub(super) fn check(c: &Config, out: &mut Vec<String>) {
    let endpoints = [
        ("reward.judge.base_url", &c.reward.judge.base_url, "reward.judge.key_env", !c.reward.judge.key_env.is_empty()),
        ("collect.base_url", &c.collect.base_url, "collect.key_env", !c.collect.key_env.is_empty()),
    ];
    for (key, url, secret_key, has_secret) in endpoints {
        if has_secret && !c.tls.insecure && is_plaintext(url) {
            out.push(format!(
                "{key} is `{}`: the secret of {secret_key} would be sent over plain HTTP; {ADVICE}",
                redact(url)
            ));
        }
    }
}

const ADVICE: &str = "use https://, or set tls.insecure = true if the network encrypts";

/// Returns a message if the exporter's headers, from the given environment variable, would be sent to the trace collector in plaintext.
pub(crate) fn collector_problem(c: &Config, variable: &str) -> Option<String> {
    let url = &c.telemetry.otlp_endpoint;
    (!c.tls.insecure && is_plaintext(url)).then(|| {
        let url = redact(url);
        format!("telemetry.otlp_endpoint is `{url}`: the headers in {variable} would be sent over plain HTTP; {ADVICE}")
    })
}

/// Returns whether the URL is without TLS and not on loopback.
fn is_plaintext(url: &str) -> bool {
    let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
    let plain = matches!(scheme.to_ascii_lowercase().as_str(), "http" | "grpc");
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    let is_loopback = host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    plain && !host.is_empty() && !is_loopback
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate::changed::problems_after;

    fn problems(set: impl FnOnce(&mut Config)) -> String {
        problems_after(check, set).join("\n")
    }

    #[test]
    fn keys_are_not_sent_in_plaintext() {
        for url in [
            "http://10.0.0.1/v1",
            "http://judge:8000/v1",
            "HTTP://judge",
            "http://[2001:db8::1]:80",
            "http://127.0.0.1.evil/v1",
            "http://localhost.evil/v1",
        ] {
            let message = problems(|c| (c.reward.judge.base_url, c.reward.judge.key_env) = (url.into(), "K".into()));
            assert!(
                message.starts_with("reward.judge.base_url is") && message.contains("https://"),
                "{url}: {message}"
            );
            assert!(message.contains("reward.judge.key_env") && message.contains("tls.insecure"), "{message}");
            let message = problems(|c| (c.collect.base_url, c.collect.key_env) = (url.into(), "K".into()));
            assert!(message.starts_with("collect.base_url"), "{url}: {message}");
            assert_eq!(problems(|c| c.reward.judge.base_url = url.into()), "", "no key is sent");
            let insecure = problems(|c| {
                c.reward.judge.base_url = url.into();
                c.reward.judge.key_env = "K".into();
                c.tls.insecure = true;
            });
            assert_eq!(insecure, "");
        }
        for url in ["https://10.0.0.1/v1", "http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:9", ""] {
            assert_eq!(
                problems(|c| (c.reward.judge.base_url, c.reward.judge.key_env) = (url.into(), "K".into())),
                "",
                "{url}"
            );
        }
    }

    #[test]
    fn headers_are_not_sent_in_plaintext() {
        let mut c = Config::default();
        assert_eq!(collector_problem(&c, "H"), None);
        c.telemetry.otlp_endpoint = "http://collector:4317".into();
        assert!(
            collector_problem(&c, "H")
                .is_some_and(|f| f.starts_with("telemetry.otlp_endpoint") && f.contains("headers in H"))
        );
        c.telemetry.otlp_endpoint = "http://[::1]:4317".into();
        assert_eq!(collector_problem(&c, "H"), None);
    }
}
