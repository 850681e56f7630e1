//! The suites besides the summary: their metrics, as JSON and as a table.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value, json};
use unveil_config::schema::Suite;
use unveil_core::ParseFault;

use crate::attention::LesionAttention;
use crate::bootstrap::{Bootstrap, Estimate, SumAndCount};
use crate::metrics::{is_zero, text_note};
use crate::{EvalError, EvaluatedAnswer};

/// Contribution of one answer to a metric; `None` if the metric does not apply to it.
type MetricFn = fn(&EvaluatedAnswer) -> Option<SumAndCount>;

/// Metrics of the grounding suite.
///
/// - `mean_iou`, `acc50`, `acc75`: first predicted box, over records with exactly one true box; a missing or invalid box is 0.
/// - `soft_f1`: all grounding answers.
/// - `pointing_game`, `in_box_energy`: averaged rows of the tokens that name the true class, over records with a lesion that does not fill
///   the image; an answer that does not name it counts as 0, one whose rows are unknown is left out (counted by `without_rows`).
/// - `pointing_chance`, `energy_chance`: what attention independent of the lesion would reach, over the answers with rows.
/// - `mentioned`: share of answers about a lesion that name the class.
/// - `parse_failures`: share of answers that cannot be parsed completely (problems of the form alone, such as `other_form`, do not count).
/// - `invalid_boxes`: share of the predicted boxes.
const GROUNDING: [(&str, MetricFn); 12] = [
    ("mean_iou", |a| single(a.prediction.iou?)),
    ("acc50", |a| single(f64::from(u8::from(a.prediction.iou? >= 0.5)))),
    ("acc75", |a| single(f64::from(u8::from(a.prediction.iou? >= 0.75)))),
    ("soft_f1", |a| single(a.prediction.soft_f1)),
    ("pointing_game", |a| attention_or_zero(a, |r| f64::from(u8::from(r.hit)))),
    ("in_box_energy", |a| attention_or_zero(a, |r| r.energy)),
    ("pointing_chance", |a| measured(a).and_then(|r| single(r.hit_chance))),
    ("energy_chance", |a| measured(a).and_then(|r| single(r.energy_chance))),
    ("mentioned", |a| {
        (a.attention != LesionAttention::NotApplicable)
            .then(|| [f64::from(u8::from(a.attention != LesionAttention::Unnamed)), 1.0])
    }),
    ("parse_failures", |a| single(f64::from(u8::from(a.fault.is_some_and(ParseFault::prevents_reading))))),
    ("invalid_boxes", |a| {
        (!a.prediction.boxes.is_empty()).then_some([a.invalid as f64, a.prediction.boxes.len() as f64])
    }),
    ("boxes_per_answer", |a| single(a.prediction.boxes.len() as f64)),
];

fn single(value: f64) -> Option<SumAndCount> {
    Some([value, 1.0])
}

fn measured(a: &EvaluatedAnswer) -> Option<crate::AttentionMeasures> {
    match a.attention {
        LesionAttention::Measured(rows) => Some(rows),
        _ => None,
    }
}

fn attention_or_zero(a: &EvaluatedAnswer, value: fn(&crate::AttentionMeasures) -> f64) -> Option<SumAndCount> {
    match &a.attention {
        LesionAttention::Measured(rows) => single(value(rows)),
        LesionAttention::Unnamed => single(0.0),
        LesionAttention::NotApplicable | LesionAttention::NoRows => None,
    }
}

/// Grounding metrics of a set of answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroundingMetrics {
    /// Metrics by name.
    pub metrics: BTreeMap<&'static str, Estimate>,
    /// Number of answers by their first deviation from the form.
    pub faults: BTreeMap<String, usize>,
    /// Number of answers that name the class, but whose attention rows are unknown.
    pub without_rows: usize,
}

/// Result of a suite.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SuiteResult {
    /// Name of the suite.
    pub suite: &'static str,
    /// Number of grounding answers.
    pub n: usize,
    /// Number of answers in text, which the suite ignores.
    #[serde(skip_serializing_if = "is_zero")]
    pub n_text: usize,
    /// Number of records of the grounding answers.
    pub records: usize,
    /// Parameters of the intervals.
    pub bootstrap: Bootstrap,
    /// Metrics of the suite.
    #[serde(flatten)]
    pub metrics: SuiteMetrics,
}

/// Metrics of a suite.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum SuiteMetrics {
    /// Boxes and attention.
    Grounding {
        /// Metrics of answers to the images.
        #[serde(flatten)]
        shown: GroundingMetrics,
        /// Metrics of answers to black images of the same sizes, if requested.
        #[serde(skip_serializing_if = "Option::is_none")]
        withheld: Option<WithheldGrounding>,
    },
    /// Accuracy by source.
    Mau {
        /// Unweighted mean over the sources, as the paper reports it; `n` is the number of sources.
        accuracy: Estimate,
        /// Accuracy by source.
        sources: BTreeMap<String, Estimate>,
    },
}

/// Grounding metrics when the image is withheld: what a model can guess from the prompt alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WithheldGrounding {
    /// Description of the replacement image.
    pub image: &'static str,
    /// Metrics of the answers.
    #[serde(flatten)]
    pub grounding: GroundingMetrics,
}

/// Sums a metric by record, in the order of first appearance; records to which the metric does not apply are left out.
fn by_record<'a>(answers: impl Iterator<Item = &'a EvaluatedAnswer>, metric: MetricFn) -> Vec<SumAndCount> {
    let mut index_of_record: BTreeMap<&str, usize> = BTreeMap::new();
    let mut out: Vec<SumAndCount> = Vec::new();
    for a in answers {
        if let Some([sum, count]) = metric(a) {
            let slot = *index_of_record.entry(&a.prediction.id).or_insert(out.len());
            if slot == out.len() {
                out.push([0.0, 0.0]);
            }
            out[slot] = [out[slot][0] + sum, out[slot][1] + count];
        }
    }
    out
}

fn grounding(answers: &[&EvaluatedAnswer], bootstrap: &Bootstrap) -> GroundingMetrics {
    let mut faults = BTreeMap::new();
    for fault in answers.iter().filter_map(|a| a.fault) {
        let name = json!(fault).as_str().unwrap_or_default().to_owned();
        *faults.entry(name).or_default() += 1;
    }
    let estimate = |(name, metric): &(&'static str, MetricFn)| {
        (*name, bootstrap.mean(&by_record(answers.iter().copied(), *metric)))
    };
    GroundingMetrics {
        metrics: GROUNDING.iter().map(estimate).collect(),
        faults,
        without_rows: answers.iter().filter(|a| a.attention == LesionAttention::NoRows).count(),
    }
}

fn mau(answers: &[&EvaluatedAnswer], bootstrap: &Bootstrap) -> SuiteMetrics {
    let mut sources: BTreeMap<&str, Vec<&EvaluatedAnswer>> = BTreeMap::new();
    answers.iter().copied().for_each(|a| sources.entry(a.source.trim()).or_default().push(a));
    let correct: MetricFn = |a| single(f64::from(u8::from(a.prediction.correct)));
    let sums: Vec<Vec<SumAndCount>> =
        sources.values().map(|answers| by_record(answers.iter().copied(), correct)).collect();
    SuiteMetrics::Mau {
        accuracy: bootstrap.mean_of_means(&sums),
        sources: sources.keys().zip(&sums).map(|(name, sums)| ((*name).to_owned(), bootstrap.mean(sums))).collect(),
    }
}

/// Returns the answers to grounding records.
fn grounding_answers(answers: &[EvaluatedAnswer]) -> Vec<&EvaluatedAnswer> {
    answers.iter().filter(|a| !a.is_text()).collect()
}

/// Checks that a suite can be computed over records with these ids and sources.
///
/// # Errors
/// Returns [`EvalError::NoSource`] for a record without a source in the suite `mau`.
pub fn check_suite<'a>(suite: Suite, mut records: impl Iterator<Item = (&'a str, &'a str)>) -> Result<(), EvalError> {
    match records.find(|(_, source)| suite == Suite::Mau && source.trim().is_empty()) {
        Some((id, _)) => Err(EvalError::NoSource { id: id.to_owned() }),
        None => Ok(()),
    }
}

/// Computes a suite over `answers`; `withheld` are the answers to black images, which the grounding suite uses.
///
/// # Errors
/// Returns [`EvalError::NoAnswer`] without answers, or the error of [`check_suite`].
pub fn measure_suite(
    suite: Suite,
    answers: &[EvaluatedAnswer],
    withheld: Option<&[EvaluatedAnswer]>,
    bootstrap: &Bootstrap,
) -> Result<SuiteResult, EvalError> {
    if answers.is_empty() {
        return Err(EvalError::NoAnswer);
    }
    let total = answers.len();
    let answers = grounding_answers(answers);
    check_suite(suite, answers.iter().map(|a| (a.prediction.id.as_str(), a.source.as_str())))?;
    let metrics = match suite {
        Suite::Grounding => SuiteMetrics::Grounding {
            shown: grounding(&answers, bootstrap),
            withheld: withheld.map(|w| WithheldGrounding {
                image: "black, of the same size",
                grounding: grounding(&grounding_answers(w), bootstrap),
            }),
        },
        Suite::Mau => mau(&answers, bootstrap),
    };
    let mut ids: Vec<&str> = answers.iter().map(|a| a.prediction.id.as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    let n = answers.len();
    let n_text = total - answers.len();
    Ok(SuiteResult { suite: suite.name(), n, n_text, records: ids.len(), bootstrap: *bootstrap, metrics })
}

impl SuiteResult {
    /// Returns the values without intervals, as in the `eval` events.
    pub fn values(&self) -> Map<String, Value> {
        let values = |metrics: &mut dyn Iterator<Item = (&str, &Estimate)>| -> Map<String, Value> {
            metrics.map(|(name, e)| (name.to_owned(), json!(e.value))).collect()
        };
        let grounding_values = |g: &GroundingMetrics| values(&mut g.metrics.iter().map(|(n, e)| (*n, e)));
        match &self.metrics {
            SuiteMetrics::Grounding { shown, withheld } => {
                let mut out = grounding_values(shown);
                out.extend(withheld.iter().map(|w| ("withheld".to_owned(), grounding_values(&w.grounding).into())));
                out
            }
            SuiteMetrics::Mau { accuracy, sources } => {
                let by_source = values(&mut sources.iter().map(|(n, e)| (n.as_str(), e)));
                let entries = [("accuracy", json!(accuracy.value)), ("sources", by_source.into())];
                entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
            }
        }
    }

    /// Formats the result as a table: a line per metric or source, with value and interval.
    pub fn table(&self) -> String {
        let b = &self.bootstrap;
        let text = text_note(self.n_text);
        let mut out = format!("{}: {} answers to {} records{text}", self.suite, self.n, self.records);
        if b.resamples > 0 {
            let share = b.confidence * 100.0;
            let seed = b.seed;
            out +=
                &format!("; intervals contain {share:.0} % of {} resamples of the records, seed {seed}", b.resamples);
        }
        out.push('\n');
        match &self.metrics {
            SuiteMetrics::Grounding { shown, withheld } => {
                let heads = ["", "image", "n", "image withheld (black)", "n"];
                let mut rows =
                    vec![heads[..if withheld.is_some() { 5 } else { 3 }].iter().map(|h| (*h).to_owned()).collect()];
                for (name, _) in GROUNDING {
                    let mut row = vec![name.to_owned()];
                    for g in std::iter::once(shown).chain(withheld.iter().map(|w| &w.grounding)) {
                        row.extend(g.metrics.get(name).map(estimate_cells).into_iter().flatten());
                    }
                    rows.push(row);
                }
                out += &align_columns(&rows);
                out += "attention is taken from the tokens that name the class; an answer that does not name it counts as 0\n";
                if shown.without_rows > 0 {
                    out += &format!(
                        "{} answers name the class but have no attention rows: left out\n",
                        shown.without_rows
                    );
                }
            }
            SuiteMetrics::Mau { accuracy, sources } => {
                let mut rows = vec![["source", "accuracy", "n"].map(str::to_owned).to_vec()];
                let row =
                    |name: &str, e: &Estimate| std::iter::once(name.to_owned()).chain(estimate_cells(e)).collect();
                rows.extend(sources.iter().map(|(name, e)| row(name, e)));
                rows.push(row("mean over the sources", accuracy));
                out += &align_columns(&rows);
            }
        }
        out
    }
}

fn estimate_cells(e: &Estimate) -> [String; 2] {
    let value = match (e.value, e.low, e.high) {
        (Some(v), Some(low), Some(high)) => format!("{v:.3} [{low:.3}, {high:.3}]"),
        (Some(v), ..) => format!("{v:.3}"),
        _ => "–".to_owned(),
    };
    [value, e.n.to_string()]
}

/// Aligns columns to their widest cell, the first to the left, the others to the right.
fn align_columns(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let cell = |(c, s): (usize, &String)| {
        let w = widths[c];
        if c == 0 { format!("{s:<w$}") } else { format!("{s:>w$}") }
    };
    rows.iter().map(|r| r.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ") + "\n").collect()
}
