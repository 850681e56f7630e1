//! Metric series that are read from their source whenever the metrics page is requested, and the memory metric of every role.

use std::fmt;

use procfs::process::Process;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

/// Writes series to a metrics page; a [`Collector`] creates it from its encoder. Names get the registry's prefix, the unit and, for counters,
/// `_total`.
#[derive(Debug)]
pub struct Series<'a>(pub DescriptorEncoder<'a>);

impl Series<'_> {
    /// Writes a gauge.
    pub fn gauge(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: f64) -> fmt::Result {
        let encoder = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        ConstGauge::new(value).encode(encoder)
    }

    /// Writes a counter since process start.
    pub fn counter(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: f64) -> fmt::Result {
        let encoder = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        ConstCounter::new(value).encode(encoder)
    }

    /// Writes gauges that differ in one label; nothing if there are no values.
    pub fn gauges<'l>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        label: &str,
        values: impl IntoIterator<Item = (&'l str, f64)>,
    ) -> fmt::Result {
        let mut values = values.into_iter().peekable();
        if values.peek().is_none() {
            return Ok(());
        }
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        for (label_value, value) in values {
            ConstGauge::new(value).encode(family.encode_family(&[(label, label_value)])?)?;
        }
        Ok(())
    }

    /// Writes counters that differ in one label; nothing if there are no values.
    pub fn counters<'l>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'l str, u64)>,
    ) -> fmt::Result {
        let mut values = values.into_iter().peekable();
        if values.peek().is_none() {
            return Ok(());
        }
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (label_value, value) in values {
            ConstCounter::new(value).encode(family.encode_family(&[(label, label_value)])?)?;
        }
        Ok(())
    }
}

/// Creates the registry of a role, with prefix `unveil_ROLE_` and the memory metric of this process.
pub fn role_registry(role: &str) -> Registry {
    let mut registry = Registry::with_prefix(format!("unveil_{role}"));
    registry.register_collector(Box::new(Memory));
    registry
}

#[derive(Debug)]
struct Memory;

impl Collector for Memory {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        match resident_bytes() {
            Some(bytes) => {
                let help = "Memory of the process that is resident";
                Series(encoder).gauge("resident_memory", help, Some(&Unit::Bytes), bytes as f64)
            }
            None => Ok(()),
        }
    }
}

/// Returns the resident memory in bytes (`resident` of proc_pid_statm(5)), if the system reports it.
fn resident_bytes() -> Option<u64> {
    let pages = Process::myself().ok()?.statm().ok()?.resident;
    Some(pages * procfs::page_size())
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[derive(Debug)]
    struct Example;

    impl Collector for Example {
        fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
            let mut s = Series(encoder);
            s.gauge("norm", "A norm", None, 2.5)?;
            s.counter("wait", "Waiting", Some(&Unit::Seconds), 0.25)?;
            s.gauges("part", "Parts", None, "part", [("a", 1.0), ("b", f64::NAN)])?;
            s.gauges("nothing", "Nothing", None, "part", [])?;
            s.counters("lost", "Lost", "reason", [("stale", 7)])
        }
    }

    #[test]
    fn names_units_and_labels_follow_prometheus() {
        let mut registry = role_registry("x");
        registry.register_collector(Box::new(Example));
        let block = std::hint::black_box(vec![1u8; 32 << 20]);
        let mut page = String::new();
        encode(&mut page, &registry).unwrap();
        for line in [
            "# TYPE unveil_x_norm gauge",
            "unveil_x_norm 2.5",
            "# TYPE unveil_x_wait_seconds counter",
            "unveil_x_wait_seconds_total 0.25",
            "unveil_x_part{part=\"a\"} 1.0",
            "unveil_x_part{part=\"b\"} NaN",
            "unveil_x_lost_total{reason=\"stale\"} 7",
            "# TYPE unveil_x_resident_memory_bytes gauge",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is missing in\n{page}");
        }
        assert!(!page.contains("nothing"), "{page}");
        let bytes = page.lines().find_map(|l| l.strip_prefix("unveil_x_resident_memory_bytes ")).unwrap();
        assert!(bytes.parse::<f64>().unwrap() >= block.len() as f64, "{bytes}");
    }
}
