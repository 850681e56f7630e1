//! The suites beyond the summary: which numbers they hold, as JSON and as a table for people.
//!
//! Must not know: how answers were made.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value, json};
use unveil_config::schema::Suite;
use unveil_core::ParseFault;

use crate::bootstrap::{Bootstrap, Estimate, Sums};
use crate::look::Look;
use crate::metrics::{beside, is_zero};
use crate::{EvalError, Judged};

/// What one answer adds to a metric: sum and count; none when the metric does not speak of it.
type Measure = fn(&Judged) -> Option<Sums>;

/// The metrics of the grounding suite.
///
/// `mean_iou`, `acc50`, `acc75`: first predicted box, answers about exactly one true box; a missing or invalid box is 0.
/// `soft_f1`: all answers (those in text are none). `pointing_game`, `in_box_energy`: answers about a lesion that does not fill the
/// image, from the averaged rows of the tokens that name the true class; an answer that does not name it looks nowhere and counts 0, one
/// whose rows are not known is left out (`without_rows` counts these). `pointing_chance`, `energy_chance`: what attention without regard
/// to the lesion would reach, over the answers with rows. `mentioned`: share of answers about a lesion that name the class.
/// `parse_failures`: share of answers that cannot be read whole (every fault but `other_form`, which reads well).
/// `invalid_boxes`: share of the predicted boxes.
const GROUNDING: [(&str, Measure); 12] = [
    ("mean_iou", |j| one(j.prediction.iou?)),
    ("acc50", |j| one(f64::from(u8::from(j.prediction.iou? >= 0.5)))),
    ("acc75", |j| one(f64::from(u8::from(j.prediction.iou? >= 0.75)))),
    ("soft_f1", |j| one(j.prediction.soft_f1)),
    ("pointing_game", |j| looks(j, |r| f64::from(u8::from(r.hit)))),
    ("in_box_energy", |j| looks(j, |r| r.energy)),
    ("pointing_chance", |j| measured(j).and_then(|r| one(r.hit_chance))),
    ("energy_chance", |j| measured(j).and_then(|r| one(r.energy_chance))),
    ("mentioned", |j| (j.look != Look::NotApplicable).then(|| [f64::from(u8::from(j.look != Look::Unnamed)), 1.0])),
    ("parse_failures", |j| one(f64::from(u8::from(j.fault.is_some_and(|f| f != ParseFault::OtherForm))))),
    ("invalid_boxes", |j| {
        (!j.prediction.boxes.is_empty()).then_some([j.invalid as f64, j.prediction.boxes.len() as f64])
    }),
    ("boxes_per_answer", |j| one(j.prediction.boxes.len() as f64)),
];

fn one(value: f64) -> Option<Sums> {
    Some([value, 1.0])
}

fn measured(j: &Judged) -> Option<crate::Rows> {
    match j.look {
        Look::Measured(rows) => Some(rows),
        _ => None,
    }
}

fn looks(j: &Judged, value: fn(&crate::Rows) -> f64) -> Option<Sums> {
    match &j.look {
        Look::Measured(rows) => one(value(rows)),
        Look::Unnamed => one(0.0),
        Look::NotApplicable | Look::NoRows => None,
    }
}

/// Grounding of one set of answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Grounding {
    /// By name.
    pub metrics: BTreeMap<&'static str, Estimate>,
    /// Answers by their first deviation from the form.
    pub faults: BTreeMap<String, usize>,
    /// Answers that name the class, but whose attention rows are not known.
    pub without_rows: usize,
}

/// What a suite found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SuiteResult {
    /// Which suite.
    pub suite: &'static str,
    /// Answers that regions are asked of.
    pub n: usize,
    /// Answers in text, which no number of the suite speaks of.
    #[serde(skip_serializing_if = "is_zero")]
    pub n_text: usize,
    /// Records that the former answer.
    pub records: usize,
    /// How the intervals were made.
    pub bootstrap: Bootstrap,
    /// The numbers.
    #[serde(flatten)]
    pub found: Found,
}

/// Numbers of a suite.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Found {
    /// Boxes and attention.
    Grounding {
        /// Answers to the images.
        #[serde(flatten)]
        shown: Grounding,
        /// Answers to black images of the same sizes, when they were asked for.
        #[serde(skip_serializing_if = "Option::is_none")]
        withheld: Option<Withheld>,
    },
    /// Accuracy by source.
    Mau {
        /// Mean over the sources, each with the same weight, as the paper reports it; `n` counts the sources.
        accuracy: Estimate,
        /// By source.
        sources: BTreeMap<String, Estimate>,
    },
}

/// Grounding when the image is withheld: what the prompt alone lets a model guess.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Withheld {
    /// What stood in for the image.
    pub image: &'static str,
    /// The numbers.
    #[serde(flatten)]
    pub grounding: Grounding,
}

/// Sums by record, in the order of first appearance; only records that the metric speaks of.
fn by_record<'a>(judged: impl Iterator<Item = &'a Judged>, of: Measure) -> Vec<Sums> {
    let mut at: BTreeMap<&str, usize> = BTreeMap::new();
    let mut out: Vec<Sums> = Vec::new();
    for j in judged {
        if let Some([sum, count]) = of(j) {
            let slot = *at.entry(&j.prediction.id).or_insert(out.len());
            if slot == out.len() {
                out.push([0.0, 0.0]);
            }
            out[slot] = [out[slot][0] + sum, out[slot][1] + count];
        }
    }
    out
}

fn grounding(judged: &[&Judged], bootstrap: &Bootstrap) -> Grounding {
    let mut faults = BTreeMap::new();
    for fault in judged.iter().filter_map(|j| j.fault) {
        let name = json!(fault).as_str().unwrap_or_default().to_owned();
        *faults.entry(name).or_default() += 1;
    }
    let metric =
        |(name, of): &(&'static str, Measure)| (*name, bootstrap.mean(&by_record(judged.iter().copied(), *of)));
    Grounding {
        metrics: GROUNDING.iter().map(metric).collect(),
        faults,
        without_rows: judged.iter().filter(|j| j.look == Look::NoRows).count(),
    }
}

fn mau(judged: &[&Judged], bootstrap: &Bootstrap) -> Found {
    let mut sources: BTreeMap<&str, Vec<&Judged>> = BTreeMap::new();
    judged.iter().copied().for_each(|j| sources.entry(j.source.trim()).or_default().push(j));
    let right: Measure = |j| one(f64::from(u8::from(j.prediction.correct)));
    let sums: Vec<Vec<Sums>> = sources.values().map(|of| by_record(of.iter().copied(), right)).collect();
    Found::Mau {
        accuracy: bootstrap.mean_of_means(&sums),
        sources: sources.keys().zip(&sums).map(|(name, sums)| ((*name).to_owned(), bootstrap.mean(sums))).collect(),
    }
}

/// The answers to records that ask for regions.
fn of_regions(judged: &[Judged]) -> Vec<&Judged> {
    judged.iter().filter(|j| !j.is_text()).collect()
}

/// Checks that a suite can speak of records with these ids and sources.
///
/// # Errors
/// `mau`, and a record that does not name its source.
pub fn check<'a>(suite: Suite, mut records: impl Iterator<Item = (&'a str, &'a str)>) -> Result<(), EvalError> {
    match records.find(|(_, source)| suite == Suite::Mau && source.trim().is_empty()) {
        Some((id, _)) => Err(EvalError::NoSource { id: id.to_owned() }),
        None => Ok(()),
    }
}

/// Measures `judged`; `withheld` are the answers to black images, for the suite that has use for them.
///
/// # Errors
/// No answer; a record that the suite cannot speak of ([`check`]).
pub fn measure(
    suite: Suite,
    judged: &[Judged],
    withheld: Option<&[Judged]>,
    bootstrap: &Bootstrap,
) -> Result<SuiteResult, EvalError> {
    if judged.is_empty() {
        return Err(EvalError::NoAnswer);
    }
    let all = judged.len();
    let judged = of_regions(judged);
    check(suite, judged.iter().map(|j| (j.prediction.id.as_str(), j.source.as_str())))?;
    let found = match suite {
        Suite::Grounding => Found::Grounding {
            shown: grounding(&judged, bootstrap),
            withheld: withheld.map(|w| Withheld {
                image: "black, of the same size",
                grounding: grounding(&of_regions(w), bootstrap),
            }),
        },
        Suite::Mau => mau(&judged, bootstrap),
    };
    let mut ids: Vec<&str> = judged.iter().map(|j| j.prediction.id.as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    let (n, n_text) = (judged.len(), all - judged.len());
    Ok(SuiteResult { suite: suite.name(), n, n_text, records: ids.len(), bootstrap: *bootstrap, found })
}

impl SuiteResult {
    /// The numbers alone, without intervals; what the `eval` events carry.
    pub fn values(&self) -> Map<String, Value> {
        let plain = |metrics: &mut dyn Iterator<Item = (&str, &Estimate)>| -> Map<String, Value> {
            metrics.map(|(name, e)| (name.to_owned(), json!(e.value))).collect()
        };
        let of = |g: &Grounding| plain(&mut g.metrics.iter().map(|(n, e)| (*n, e)));
        match &self.found {
            Found::Grounding { shown, withheld } => {
                let mut out = of(shown);
                out.extend(withheld.iter().map(|w| ("withheld".to_owned(), of(&w.grounding).into())));
                out
            }
            Found::Mau { accuracy, sources } => {
                let by_source = plain(&mut sources.iter().map(|(n, e)| (n.as_str(), e)));
                let of = [("accuracy", json!(accuracy.value)), ("sources", by_source.into())];
                of.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
            }
        }
    }

    /// A table for people: a line per metric or source, value and interval.
    pub fn table(&self) -> String {
        let b = &self.bootstrap;
        let text = beside(self.n_text);
        let mut out = format!("{}: {} answers to {} records{text}", self.suite, self.n, self.records);
        if b.resamples > 0 {
            let (share, seed) = (b.confidence * 100.0, b.seed);
            out += &format!("; intervals hold {share:.0} % of {} resamples of the records, seed {seed}", b.resamples);
        }
        out.push('\n');
        match &self.found {
            Found::Grounding { shown, withheld } => {
                let heads = ["", "image", "n", "image withheld (black)", "n"];
                let mut rows =
                    vec![heads[..if withheld.is_some() { 5 } else { 3 }].iter().map(|h| (*h).to_owned()).collect()];
                for (name, _) in GROUNDING {
                    let mut row = vec![name.to_owned()];
                    for g in std::iter::once(shown).chain(withheld.iter().map(|w| &w.grounding)) {
                        row.extend(g.metrics.get(name).map(cells).into_iter().flatten());
                    }
                    rows.push(row);
                }
                out += &align(&rows);
                out +=
                    "attention is that of the tokens that name the class; an answer that does not name it counts 0\n";
                if shown.without_rows > 0 {
                    out += &format!(
                        "{} answers name the class but have no attention rows: left out\n",
                        shown.without_rows
                    );
                }
            }
            Found::Mau { accuracy, sources } => {
                let mut rows = vec![["source", "accuracy", "n"].map(str::to_owned).to_vec()];
                let one = |name: &str, e: &Estimate| std::iter::once(name.to_owned()).chain(cells(e)).collect();
                rows.extend(sources.iter().map(|(name, e)| one(name, e)));
                rows.push(one("mean over the sources", accuracy));
                out += &align(&rows);
            }
        }
        out
    }
}

fn cells(e: &Estimate) -> [String; 2] {
    let value = match (e.value, e.low, e.high) {
        (Some(v), Some(low), Some(high)) => format!("{v:.3} [{low:.3}, {high:.3}]"),
        (Some(v), ..) => format!("{v:.3}"),
        _ => "–".to_owned(),
    };
    [value, e.n.to_string()]
}

/// Columns as wide as their widest cell, the first to the left, the others to the right.
fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let cell = |(c, s): (usize, &String)| {
        let w = widths[c];
        if c == 0 { format!("{s:<w$}") } else { format!("{s:>w$}") }
    };
    rows.iter().map(|r| r.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ") + "\n").collect()
}
