//! Loss parts of an update: added over micro-batches and ranks, averaged over mini-batches. Knows names, no formulas.

use std::collections::BTreeMap;

use unveil_algo::LossParts;

use crate::error::Result;
use crate::measure::UpdateReport;

/// Every part, in the order in which ranks exchange them.
const NAMES: [&str; 8] = ["loss", "policy", "value", "attention", "entropy", "kl_reference", "clip_fraction", "kl"];
/// What is there only where importance weights are.
const WEIGHTS: [&str; 2] = ["importance", "importance_bounded"];

/// Loss parts over micro-batches (added) and mini-batches (averaged).
#[derive(Default)]
pub(crate) struct Sums {
    parts: BTreeMap<&'static str, f64>,
    norm: f64,
    count: u64,
}

impl Sums {
    /// Adds a micro-batch.
    pub fn add(&mut self, loss: &LossParts) -> Result<()> {
        let means = &loss.means;
        let own = [
            &loss.loss,
            &loss.policy,
            &loss.value,
            &loss.attention,
            &means.entropy,
            &means.kl,
            &means.clip_fraction,
            &means.approx_kl,
        ];
        let weights = means.importance.iter().flat_map(|(mean, bounded)| [mean, bounded]);
        for (name, t) in NAMES.iter().zip(own).chain(WEIGHTS.iter().zip(weights)) {
            *self.parts.entry(name).or_default() += t.f_double_value(&[])?;
        }
        Ok(())
    }

    /// The parts as a list that all ranks have equally long; `weighted` says whether there are importance weights.
    pub fn list(&self, weighted: bool) -> Vec<f64> {
        let weights = if weighted { &WEIGHTS[..] } else { &[] };
        NAMES.iter().chain(weights).map(|name| self.parts.get(name).copied().unwrap_or(0.0)).collect()
    }

    /// [`Sums::list`] read back.
    pub fn of(list: &[f64]) -> Self {
        let parts = NAMES.iter().chain(&WEIGHTS).copied().zip(list.iter().copied()).collect();
        Self { parts, ..Self::default() }
    }

    /// The loss.
    pub fn loss(&self) -> f64 {
        self.parts.get("loss").copied().unwrap_or(0.0)
    }

    /// Takes a mini-batch in, whose gradients have this norm.
    pub fn take(&mut self, other: Sums, norm: f64) {
        for (name, v) in other.parts {
            *self.parts.entry(name).or_default() += v;
        }
        self.norm += norm;
        self.count += 1;
    }

    /// Writes the means into a report.
    pub fn report(&self, report: &mut UpdateReport) {
        let n = self.count.max(1) as f64;
        let found = |k: &str| self.parts.get(k).map(|v| v / n);
        let of = |k: &str| found(k).unwrap_or(0.0);
        (report.clip_fraction, report.kl, report.kl_reference) = (of("clip_fraction"), of("kl"), of("kl_reference"));
        (report.importance, report.importance_bounded) = (found("importance"), found("importance_bounded"));
        report.entropy = of("entropy");
        report.grad_norm = self.norm / n;
        report.loss =
            NAMES[..4].iter().filter(|k| self.parts.contains_key(*k)).map(|k| ((*k).to_owned(), of(k))).collect();
    }
}
