//! Faults of the optional listen addresses: probes and pages of metrics.

use crate::schema::Config;

/// Adds a fault for each address that is neither empty nor `host:port`.
pub(super) fn faults(c: &Config, out: &mut Vec<String>) {
    for (key, listen) in [("health.listen", &c.health.listen), ("learner.metrics_listen", &c.learner.metrics_listen)] {
        let sound = listen.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        if !listen.is_empty() && !sound {
            out.push(format!("{key} is `{listen}`: use host:port, or leave it empty for none"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_empty_or_whole() {
        let faults_of = |health: &str, metrics: &str| {
            let mut c = Config::default();
            c.health.listen = health.into();
            c.learner.metrics_listen = metrics.into();
            let mut out = Vec::new();
            faults(&c, &mut out);
            out
        };
        assert!(faults_of("", "").is_empty() && faults_of("0.0.0.0:8086", "[::]:0").is_empty());
        for bad in ["8086", ":8086", "host", "host:", "host:99999"] {
            let found = faults_of(bad, bad);
            assert_eq!(found.len(), 2, "{bad}: {found:?}");
            assert!(found[0].contains("health.listen") && found[1].contains("learner.metrics_listen"), "{found:?}");
            assert!(found.iter().all(|f| f.contains(bad) && f.contains("host:port")), "{found:?}");
        }
    }
}
