//! Keys and tokens that would go over a network in the clear: over plain HTTP they stay on this machine, unless `tls.insecure` says
//! that the network encrypts by itself. Between the roles the client of the service room sees to it.

use std::net::IpAddr;

use unveil_core::redact;

use crate::schema::Config;

/// Adds every fault to `out`.
pub(super) fn faults(c: &Config, out: &mut Vec<String>) {
    let places = [
        ("reward.judge.base_url", &c.reward.judge.base_url, "reward.judge.key_env", !c.reward.judge.key_env.is_empty()),
        ("collect.base_url", &c.collect.base_url, "collect.key_env", !c.collect.key_env.is_empty()),
    ];
    for (key, url, names, sent) in places {
        if sent && !c.tls.insecure && in_the_clear(url) {
            out.push(format!(
                "{key} is `{}`: what {names} names would be sent over plain HTTP; {WAY_OUT}",
                redact(url)
            ));
        }
    }
}

const WAY_OUT: &str = "use https://, or set tls.insecure = true where the network encrypts by itself";

/// The fault of sending the exporter's headers, which are taken from the variable of the environment, to a collector in the clear.
pub(crate) fn collector(c: &Config, variable: &str) -> Option<String> {
    let url = &c.telemetry.otlp_endpoint;
    (!c.tls.insecure && in_the_clear(url)).then(|| {
        let url = redact(url);
        format!("telemetry.otlp_endpoint is `{url}`: the headers that {variable} holds would be sent over plain HTTP; {WAY_OUT}")
    })
}

/// Whether what is sent there can be read on the way: no TLS, and beyond loopback.
fn in_the_clear(url: &str) -> bool {
    let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
    let plain = matches!(scheme.to_ascii_lowercase().as_str(), "http" | "grpc");
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    let here = host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    plain && !host.is_empty() && !here
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
    fn a_key_stays_on_this_machine_or_goes_by_tls() {
        for url in [
            "http://10.0.0.1/v1",
            "http://judge:8000/v1",
            "HTTP://judge",
            "http://[2001:db8::1]:80",
            "http://127.0.0.1.evil/v1",
            "http://localhost.evil/v1",
        ] {
            let said = of(|c| (c.reward.judge.base_url, c.reward.judge.key_env) = (url.into(), "K".into()));
            assert!(said.starts_with("reward.judge.base_url is") && said.contains("https://"), "{url}: {said}");
            assert!(said.contains("reward.judge.key_env") && said.contains("tls.insecure"), "{said}");
            let said = of(|c| (c.collect.base_url, c.collect.key_env) = (url.into(), "K".into()));
            assert!(said.starts_with("collect.base_url"), "{url}: {said}");
            assert_eq!(of(|c| c.reward.judge.base_url = url.into()), "", "no key is sent");
            let insecure = of(|c| {
                (c.reward.judge.base_url, c.reward.judge.key_env, c.tls.insecure) = (url.into(), "K".into(), true);
            });
            assert_eq!(insecure, "");
        }
        for url in ["https://10.0.0.1/v1", "http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:9", ""] {
            assert_eq!(
                of(|c| (c.reward.judge.base_url, c.reward.judge.key_env) = (url.into(), "K".into())),
                "",
                "{url}"
            );
        }
    }

    #[test]
    fn headers_go_to_no_collector_in_the_clear() {
        let mut c = Config::default();
        assert_eq!(collector(&c, "H"), None);
        c.telemetry.otlp_endpoint = "http://collector:4317".into();
        assert!(collector(&c, "H").is_some_and(|f| f.starts_with("telemetry.otlp_endpoint") && f.contains("H holds")));
        c.telemetry.otlp_endpoint = "http://[::1]:4317".into();
        assert_eq!(collector(&c, "H"), None);
    }
}
