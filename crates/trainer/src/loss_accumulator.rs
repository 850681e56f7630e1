//! Accumulates the loss parts of an update: summed over micro-batches and ranks, averaged over mini-batches.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};
use unveil_algo::LossParts;

use crate::error::Result;
use crate::update_report::UpdateReport;

/// All parts, in the order in which ranks exchange them.
const PARTS: [&str; 8] = ["loss", "policy", "value", "attention", "entropy", "kl_reference", "clip_fraction", "kl"];
/// Parts that exist only with importance weights.
const IMPORTANCE_PARTS: [&str; 2] = ["importance", "importance_bounded"];

/// Loss parts, summed over micro-batches and averaged over mini-batches.
#[derive(Default, Debug)]
pub(crate) struct LossAccumulator {
    parts: BTreeMap<&'static str, f64>,
    /// Parts of the micro-batches that were added, one vector each, still on the device.
    pending: Vec<Tensor>,
    norm: f64,
    mini_batches: u64,
}

impl LossAccumulator {
    /// Adds a micro-batch without waiting for the device to compute it.
    pub(crate) fn add(&mut self, loss: &LossParts) -> Result<()> {
        let means = &loss.means;
        let parts = [
            &loss.loss,
            &loss.policy,
            &loss.value,
            &loss.attention,
            &means.entropy,
            &means.kl,
            &means.clip_fraction,
            &means.approx_kl,
        ];
        let importance = means.importance.iter().flat_map(|(mean, bounded)| [mean, bounded]);
        let scalar = |t: &Tensor| -> Result<Tensor> { Ok(t.f_detach()?.f_to_kind(Kind::Double)?.f_view([1])?) };
        let scalars = parts.into_iter().chain(importance).map(scalar).collect::<Result<Vec<_>>>()?;
        self.pending.push(Tensor::f_cat(&scalars, 0)?);
        Ok(())
    }

    /// Returns the sums of the parts as a list that has the same length on all ranks; `weighted` says whether there are importance
    /// weights. Copies the parts of all micro-batches to the host at once.
    pub(crate) fn into_list(self, weighted: bool) -> Result<Vec<f64>> {
        let importance = if weighted { IMPORTANCE_PARTS.len() } else { 0 };
        let mut sums = vec![0.0; PARTS.len() + importance];
        for micro_batch in rows_to_host(&self.pending)? {
            sums.iter_mut().zip(micro_batch).for_each(|(sum, part)| *sum += part);
        }
        Ok(sums)
    }

    /// Reads the list of [`LossAccumulator::to_list`].
    pub(crate) fn from_list(list: &[f64]) -> Self {
        let parts = PARTS.iter().chain(&IMPORTANCE_PARTS).copied().zip(list.iter().copied()).collect();
        Self { parts, ..Self::default() }
    }

    /// Returns the loss.
    pub(crate) fn loss(&self) -> f64 {
        self.parts.get("loss").copied().unwrap_or(0.0)
    }

    /// Adds a mini-batch whose gradients have the L2 norm `norm`.
    pub(crate) fn add_mini_batch(&mut self, other: Self, norm: f64) {
        for (name, v) in other.parts {
            *self.parts.entry(name).or_default() += v;
        }
        self.norm += norm;
        self.mini_batches += 1;
    }

    /// Writes the means over mini-batches to a report.
    pub(crate) fn write_to(&self, report: &mut UpdateReport) {
        let n = self.mini_batches.max(1) as f64;
        let mean = |k: &str| self.parts.get(k).map(|v| v / n);
        let mean_or_0 = |k: &str| mean(k).unwrap_or(0.0);
        report.clip_fraction = mean_or_0("clip_fraction");
        report.kl = mean_or_0("kl");
        report.kl_reference = mean_or_0("kl_reference");
        report.importance = mean("importance");
        report.importance_bounded = mean("importance_bounded");
        report.entropy = mean_or_0("entropy");
        report.grad_norm = self.norm / n;
        let loss_parts = PARTS[..4].iter().filter(|k| self.parts.contains_key(*k));
        report.loss = loss_parts.map(|k| ((*k).to_owned(), mean_or_0(k))).collect();
    }
}

/// Copies fp64 vectors of equal length to the host at once.
pub(crate) fn rows_to_host(rows: &[Tensor]) -> Result<Vec<Vec<f64>>> {
    let Some(width) = rows.first().map(Tensor::numel).filter(|width| *width > 0) else { return Ok(Vec::new()) };
    let all = Vec::<f64>::try_from(Tensor::f_cat(rows, 0)?)?;
    Ok(all.chunks(width).map(<[f64]>::to_vec).collect())
}
