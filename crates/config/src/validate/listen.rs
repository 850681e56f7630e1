//! Checks of optional addresses: health endpoint, metrics pages, trace collector.

use unveil_core::redact;

use crate::schema::Config;

/// Returns whether the address is `host:port`.
fn is_host_port(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

/// Adds a message to `out` for each address that is neither empty nor `host:port`.
pub(super) fn check(c: &Config, out: &mut Vec<String>) {
    let listeners = [
        ("health.listen", &c.health.listen),
        ("learner.metrics_listen", &c.learner.metrics_listen),
        ("rollout.metrics_listen", &c.rollout.metrics_listen),
        ("reward.service.metrics_listen", &c.reward.service.metrics_listen),
    ];
    for (key, listen) in listeners {
        if !listen.is_empty() && !is_host_port(listen) {
            out.push(format!("{key} is `{listen}`: use host:port, or leave it empty to disable it"));
        }
    }
    let collector = &c.telemetry.otlp_endpoint;
    let rest = ["http://", "https://"].iter().find_map(|scheme| collector.strip_prefix(scheme));
    if !collector.is_empty() && !rest.is_some_and(|rest| is_host_port(rest.trim_end_matches('/'))) {
        out.push(format!(
            "telemetry.otlp_endpoint is `{}`: use http://host:port or https://host:port (OTLP over gRPC, usually port 4317), or leave it empty to disable tracing",
            redact(collector.split(['?', '#']).next().unwrap_or_default())
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(listen: &str, collector: &str) -> Vec<String> {
        let mut c = Config::default();
        c.health.listen = listen.into();
        c.learner.metrics_listen = listen.into();
        c.rollout.metrics_listen = listen.into();
        c.reward.service.metrics_listen = listen.into();
        c.telemetry.otlp_endpoint = collector.into();
        let mut out = Vec::new();
        check(&c, &mut out);
        out
    }

    #[test]
    fn listen_addresses_are_empty_or_host_and_port() {
        assert!(problems("", "").is_empty());
        assert!(problems("0.0.0.0:8086", "http://collector:4317").is_empty());
        assert!(problems("[::]:0", "https://[::1]:4317/").is_empty());
        let keys =
            ["health.listen", "learner.metrics_listen", "rollout.metrics_listen", "reward.service.metrics_listen"];
        for bad in ["8086", ":8086", "host", "host:", "host:99999"] {
            let found = problems(bad, "");
            assert_eq!(found.len(), keys.len(), "{bad}: {found:?}");
            assert!(found.iter().zip(keys).all(|(f, key)| f.starts_with(key)), "{found:?}");
            assert!(found.iter().all(|f| f.contains(bad) && f.contains("host:port")), "{found:?}");
        }
    }

    #[test]
    fn the_collector_needs_a_url() {
        for bad in ["collector:4317", "http://collector", "http://", "grpc://collector:4317", "http://:4317"] {
            let found = problems("", bad);
            assert!(
                matches!(&found[..], [f] if f.starts_with("telemetry.otlp_endpoint") && f.contains(bad)),
                "{found:?}"
            );
        }
    }
}
