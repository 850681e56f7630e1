//! Metrics pages as a scraper reads them, and their comparison with the documented list (cluster/dashboards/README.md).

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::paths::workspace;

/// Description of a metric on a page or in the list.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Metric {
    kind: String,
    labels: BTreeSet<String>,
    meaning: String,
}

/// A metrics page in the OpenMetrics text format.
#[derive(Debug, Clone)]
pub struct MetricsPage {
    text: String,
}

impl MetricsPage {
    /// Fetches `/metrics`.
    ///
    /// # Panics
    /// Panics if the page is not served.
    pub fn get(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).expect("the page of metrics is served");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let request = format!("GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("a request");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("a page");
        let (head, body) = text.split_once("\r\n\r\n").expect("head and body");
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("application/openmetrics-text"), "{head}");
        Self { text: body.to_owned() }
    }

    /// Returns the value of a series, written as on the page: `name` or `name{label="value"}`.
    pub fn value(&self, series: &str) -> Option<f64> {
        self.text.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
    }

    /// Returns the value of a series; panics if the page does not have it.
    pub fn expect_value(&self, series: &str) -> f64 {
        self.value(series).unwrap_or_else(|| panic!("{series} is not in\n{}", self.text))
    }

    /// Asserts that the page agrees with the documented list of `role`: each metric is listed with the same kind, labels and meaning, and
    /// each listed metric is on the page unless the list gives a condition for it.
    pub fn assert_documented(&self, role: &str) {
        let metrics = self.metrics();
        let (listed, conditional) = documented_metrics(role);
        for (name, metric) in &metrics {
            assert_eq!(Some(metric), listed.get(name), "{name}: page and cluster/dashboards/README.md differ");
        }
        let missing: Vec<&String> =
            listed.keys().filter(|n| !metrics.contains_key(*n) && !conditional.contains(*n)).collect();
        assert!(missing.is_empty(), "{missing:?} are listed for {role} but not in\n{}", self.text);
    }

    /// Asserts that the pages have all of these series, except for those with a condition in the list.
    pub fn assert_contain(pages: &[Self], series: &BTreeSet<String>) {
        let lists = ["learner", "rollout", "reward"].map(documented_metrics);
        for name in series {
            let metric = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap_or(name);
            let (_, conditional) = lists
                .iter()
                .find(|(all, _)| all.contains_key(metric))
                .unwrap_or_else(|| panic!("{name} is not listed"));
            let mut lines = pages.iter().flat_map(|p| p.text.lines());
            let present = lines.any(|l| l.split(['{', ' ']).next() == Some(name));
            assert!(present || conditional.contains(metric), "{name} is not in\n{pages:#?}");
        }
    }

    /// Parses the metrics of the page.
    fn metrics(&self) -> BTreeMap<String, Metric> {
        let mut help = BTreeMap::new();
        let mut out = BTreeMap::new();
        for line in self.text.lines() {
            if let Some((name, text)) = line.strip_prefix("# HELP ").and_then(|l| l.split_once(' ')) {
                help.insert(name.to_owned(), text.trim_end_matches('.').to_owned());
            }
            let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' ')) else { continue };
            let meaning = help.get(name).cloned().unwrap_or_default();
            let labels = self.labels(name);
            let full = if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
            out.insert(full, Metric { kind: kind.to_owned(), labels, meaning });
        }
        out
    }

    /// Returns the labels of all samples of a metric, without the bounds of buckets.
    fn labels(&self, name: &str) -> BTreeSet<String> {
        let mut out = BTreeSet::new();
        for line in self.text.lines().filter_map(|l| l.strip_prefix(name)) {
            let Some((suffix, rest)) = line.split_once('{') else { continue };
            if !["", "_total", "_bucket", "_sum", "_count"].contains(&suffix) {
                continue;
            }
            // Label values contain no commas and no quotes.
            let inside = rest.split('}').next().unwrap_or_default();
            out.extend(inside.split(',').filter_map(|pair| pair.split_once('=')).map(|(key, _)| key.to_owned()));
        }
        out.remove("le");
        out
    }
}

/// Returns the documented metrics of a role, and the names among them that exist under a condition only.
fn documented_metrics(role: &str) -> (BTreeMap<String, Metric>, BTreeSet<String>) {
    let path = workspace().join("cluster/dashboards/README.md");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut out = BTreeMap::new();
    let mut conditional = BTreeSet::new();
    for line in text.lines().filter(|l| l.starts_with(&format!("| `unveil_{role}_"))) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, when, meaning] = cells[..] else { panic!("{line}: a row has five cells") };
        let name = name.trim_matches('`').to_owned();
        let labels = labels.split(", ").filter(|l| *l != "–").map(|l| l.trim_matches('`').to_owned()).collect();
        if when != "always" {
            conditional.insert(name.clone());
        }
        let metric = Metric { kind: kind.to_owned(), labels, meaning: meaning.to_owned() };
        assert!(out.insert(name, metric).is_none(), "{line}: the name is listed twice");
    }
    (out, conditional)
}
