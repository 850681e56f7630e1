//! Faults of the optional addresses: probes, pages of metrics, the collector of traces.

use unveil_core::redact;

use crate::schema::Config;

/// Whether it is `host:port`.
fn whole(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

/// Adds a fault for each address that is neither empty nor whole.
pub(super) fn faults(c: &Config, out: &mut Vec<String>) {
    let listeners = [
        ("health.listen", &c.health.listen),
        ("learner.metrics_listen", &c.learner.metrics_listen),
        ("rollout.metrics_listen", &c.rollout.metrics_listen),
        ("reward.service.metrics_listen", &c.reward.service.metrics_listen),
    ];
    for (key, listen) in listeners {
        if !listen.is_empty() && !whole(listen) {
            out.push(format!("{key} is `{listen}`: use host:port, or leave it empty for none"));
        }
    }
    let collector = &c.telemetry.otlp_endpoint;
    let rest = ["http://", "https://"].iter().find_map(|scheme| collector.strip_prefix(scheme));
    if !collector.is_empty() && !rest.is_some_and(|rest| whole(rest.trim_end_matches('/'))) {
        out.push(format!(
            "telemetry.otlp_endpoint is `{}`: use http://host:port or https://host:port (OTLP over gRPC, usually port 4317), or leave it empty for none",
            redact(collector.split(['?', '#']).next().unwrap_or_default())
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults_of(listen: &str, collector: &str) -> Vec<String> {
        let mut c = Config::default();
        c.health.listen = listen.into();
        c.learner.metrics_listen = listen.into();
        c.rollout.metrics_listen = listen.into();
        c.reward.service.metrics_listen = listen.into();
        c.telemetry.otlp_endpoint = collector.into();
        let mut out = Vec::new();
        faults(&c, &mut out);
        out
    }

    #[test]
    fn an_address_is_empty_or_whole() {
        assert!(faults_of("", "").is_empty());
        assert!(faults_of("0.0.0.0:8086", "http://collector:4317").is_empty());
        assert!(faults_of("[::]:0", "https://[::1]:4317/").is_empty());
        let keys =
            ["health.listen", "learner.metrics_listen", "rollout.metrics_listen", "reward.service.metrics_listen"];
        for bad in ["8086", ":8086", "host", "host:", "host:99999"] {
            let found = faults_of(bad, "");
            assert_eq!(found.len(), keys.len(), "{bad}: {found:?}");
            assert!(found.iter().zip(keys).all(|(f, key)| f.starts_with(key)), "{found:?}");
            assert!(found.iter().all(|f| f.contains(bad) && f.contains("host:port")), "{found:?}");
        }
    }

    #[test]
    fn the_collector_is_reached_by_a_url() {
        for bad in ["collector:4317", "http://collector", "http://", "grpc://collector:4317", "http://:4317"] {
            let found = faults_of("", bad);
            assert!(
                matches!(&found[..], [f] if f.starts_with("telemetry.otlp_endpoint") && f.contains(bad)),
                "{found:?}"
            );
        }
    }
}
