//! Series that are read when a page of metrics is asked for, from the very values that they are about; and the one that every role
//! has, its memory.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

/// Writes series into a page; a [`Collector`] makes one of its encoder. Names get the registry's prefix, then the unit, then `_total`
/// where it is a counter.
#[derive(Debug)]
pub struct Series<'a>(pub DescriptorEncoder<'a>);

impl Series<'_> {
    /// A value that goes up and down.
    pub fn gauge(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: f64) -> fmt::Result {
        let encoder = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        ConstGauge::new(value).encode(encoder)
    }

    /// A count since the process was started.
    pub fn counter(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: f64) -> fmt::Result {
        let encoder = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        ConstCounter::new(value).encode(encoder)
    }

    /// Gauges that differ in one label; none where there are no values.
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
        for (of, value) in values {
            ConstGauge::new(value).encode(family.encode_family(&[(label, of)])?)?;
        }
        Ok(())
    }

    /// Counters that differ in one label; none where there are no values.
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
        for (of, value) in values {
            ConstCounter::new(value).encode(family.encode_family(&[(label, of)])?)?;
        }
        Ok(())
    }
}

/// The registry of a role, `unveil_ROLE_…`, with the memory of this process in it.
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

/// `VmRSS` of proc_pid_status(5); none where the system does not say.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[derive(Debug)]
    struct Some3;

    impl Collector for Some3 {
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
    fn names_units_and_labels_are_prometheus_own() {
        let mut registry = role_registry("x");
        registry.register_collector(Box::new(Some3));
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
            assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
        }
        assert!(!page.contains("nothing"), "{page}");
        let bytes = page.lines().find_map(|l| l.strip_prefix("unveil_x_resident_memory_bytes ")).unwrap();
        assert!(bytes.parse::<f64>().unwrap() >= block.len() as f64, "{bytes}");
    }
}
