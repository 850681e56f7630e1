//! Pages of metrics as a scraper reads them, and the list of names that they are held against (cluster/dashboards/README.md).

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::paths::workspace;

/// What a page, or the list, says of a metric.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Metric {
    kind: String,
    labels: BTreeSet<String>,
    meaning: String,
}

/// A page in the text format of OpenMetrics.
#[derive(Debug, Clone)]
pub struct MetricsPage {
    text: String,
}

impl MetricsPage {
    /// Fetches `/metrics`.
    pub fn get(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).expect("the page of metrics is served");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let ask = format!("GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(ask.as_bytes()).expect("a request");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("a page");
        let (head, body) = text.split_once("\r\n\r\n").expect("head and body");
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("application/openmetrics-text"), "{head}");
        Self { text: body.to_owned() }
    }

    /// The value of a series, written as the page writes it: `name` or `name{label="value"}`.
    pub fn value(&self, series: &str) -> Option<f64> {
        self.text.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
    }

    /// [`Self::value`] of a series that must be there.
    pub fn of(&self, series: &str) -> f64 {
        self.value(series).unwrap_or_else(|| panic!("{series} is not in\n{}", self.text))
    }

    /// Panics unless the page holds what the list says of `role`: each of its names is listed with the same kind, labels and meaning,
    /// and each listed name is there, but for those that the list ties to a condition.
    pub fn is_listed(&self, role: &str) {
        let (found, (listed, conditional)) = (self.metrics(), listed(role));
        for (name, metric) in &found {
            assert_eq!(Some(metric), listed.get(name), "{name}: the page, and cluster/dashboards/README.md");
        }
        let missing: Vec<&String> =
            listed.keys().filter(|n| !found.contains_key(*n) && !conditional.contains(*n)).collect();
        assert!(missing.is_empty(), "{missing:?} are listed for {role} and not in\n{}", self.text);
    }

    /// Panics unless the pages have each of these names of series, but for those that the list ties to a condition.
    pub fn have(pages: &[Self], series: &BTreeSet<String>) {
        let lists = ["learner", "rollout", "reward"].map(listed);
        for name in series {
            let metric = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap_or(name);
            let (_, conditional) = lists
                .iter()
                .find(|(all, _)| all.contains_key(metric))
                .unwrap_or_else(|| panic!("{name} is not listed"));
            let mut lines = pages.iter().flat_map(|p| p.text.lines());
            let there = lines.any(|l| l.split(['{', ' ']).next() == Some(name));
            assert!(there || conditional.contains(metric), "{name} is not in\n{pages:#?}");
        }
    }

    fn metrics(&self) -> BTreeMap<String, Metric> {
        let (mut help, mut out) = (BTreeMap::new(), BTreeMap::new());
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

    /// Labels of all samples of a metric, but for the bounds of buckets.
    fn labels(&self, name: &str) -> BTreeSet<String> {
        let mut out = BTreeSet::new();
        for line in self.text.lines().filter_map(|l| l.strip_prefix(name)) {
            let Some((suffix, rest)) = line.split_once('{') else { continue };
            if !["", "_total", "_bucket", "_sum", "_count"].contains(&suffix) {
                continue;
            }
            // Values of labels here hold no comma and no quotes.
            let inside = rest.split('}').next().unwrap_or_default();
            out.extend(inside.split(',').filter_map(|pair| pair.split_once('=')).map(|(key, _)| key.to_owned()));
        }
        out.remove("le");
        out
    }
}

/// The rows of the list for a role, and the names among them that are only there under a condition.
fn listed(role: &str) -> (BTreeMap<String, Metric>, BTreeSet<String>) {
    let path = workspace().join("cluster/dashboards/README.md");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (mut out, mut conditional) = (BTreeMap::new(), BTreeSet::new());
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
