//! Percentile bootstrap (Efron 1979) of a mean over records: the group of answers to one record is what is drawn.
//!
//! Must not know: what the numbers mean.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// How intervals are made.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bootstrap {
    /// Share of the resampled means that an interval holds, in (0, 1).
    pub confidence: f64,
    /// Resamples; 0 = no intervals.
    pub resamples: usize,
    /// Seed of the resampling.
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self { confidence: 0.95, resamples: 2000, seed: 0 }
    }
}

/// A mean with its interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean; absent when there is nothing to average.
    pub value: Option<f64>,
    /// Lower end of the interval; absent without a value, or without resamples.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
    /// What was averaged over: answers, or what the metric counts in them.
    pub n: usize,
}

/// Sum and count of one record's answers, count above 0.
pub type Sums = [f64; 2];

impl Bootstrap {
    /// `resamples` draws of `n` indices below `n`; a function of (seed, stream, n, number of the resample) alone.
    pub fn draws(&self, stream: u64, n: usize) -> impl Iterator<Item = Vec<usize>> + use<> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(stream);
        (0..self.resamples).map(move |_| (0..n).map(|_| random.random_range(0..n)).collect())
    }

    /// Mean over all answers of the records, `sum of sums / sum of counts`, and its percentile interval when records are drawn.
    pub fn mean(&self, records: &[Sums]) -> Estimate {
        let all: Vec<usize> = (0..records.len()).collect();
        let n = records.iter().map(|r| r[1]).sum::<f64>() as usize;
        if n == 0 {
            return Estimate { value: None, low: None, high: None, n };
        }
        let drawn = self.draws(0, records.len()).map(|d| ratio(records, &d)).collect();
        self.estimate(ratio(records, &all), drawn, n)
    }

    /// Mean of the strata's means, each with the same weight, and its interval when records are drawn within each stratum.
    pub fn mean_of_means(&self, strata: &[Vec<Sums>]) -> Estimate {
        let n = strata.len();
        if n == 0 {
            return Estimate { value: None, low: None, high: None, n };
        }
        let mut drawn = vec![0.0; self.resamples];
        let mut value = 0.0;
        for (stream, records) in strata.iter().enumerate() {
            let all: Vec<usize> = (0..records.len()).collect();
            value += ratio(records, &all) / n as f64;
            for (mean, d) in drawn.iter_mut().zip(self.draws(stream as u64, records.len())) {
                *mean += ratio(records, &d) / n as f64;
            }
        }
        self.estimate(value, drawn, n)
    }

    fn estimate(&self, value: f64, mut drawn: Vec<f64>, n: usize) -> Estimate {
        drawn.sort_by(f64::total_cmp);
        let tail = (1.0 - self.confidence) / 2.0;
        Estimate { value: Some(value), low: quantile(&drawn, tail), high: quantile(&drawn, 1.0 - tail), n }
    }
}

fn ratio(records: &[Sums], chosen: &[usize]) -> f64 {
    let (sum, count) = chosen.iter().fold((0.0, 0.0), |(s, c), &i| (s + records[i][0], c + records[i][1]));
    sum / count
}

/// Quantile `q` in `[0, 1]` with linear interpolation between the sorted values, as `numpy.quantile` gives it.
fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let at = q * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(low + (high - low) * at.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let b = Bootstrap { confidence: 0.8, resamples: 200, seed: 3 };
        assert_eq!(b.mean(&[]).value, None);
        let one = b.mean(&[[3.0, 4.0]]);
        assert_eq!((one.value, one.low, one.high, one.n), (Some(0.75), Some(0.75), Some(0.75), 4));
        let two = b.mean(&[[0.0, 1.0], [1.0, 1.0]]);
        assert_eq!((two.value, two.low, two.high), (Some(0.5), Some(0.0), Some(1.0)));
        assert_eq!(b.mean(&[[0.0, 1.0], [1.0, 1.0]]), two, "the same seed gives the same interval");
        let none = Bootstrap { resamples: 0, ..b }.mean(&[[1.0, 1.0]]);
        assert_eq!((none.value, none.low, none.high), (Some(1.0), None, None));
        let strata = [vec![[1.0, 1.0]; 30], vec![[0.0, 1.0]]];
        assert_eq!(b.mean_of_means(&strata).value, Some(0.5), "strata weigh the same");
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), Some(3.0));
    }

    #[test]
    fn draws_differ_by_seed_and_stream_only() {
        let draw =
            |seed, stream| Bootstrap { seed, resamples: 3, ..Default::default() }.draws(stream, 50).collect::<Vec<_>>();
        assert_eq!(draw(1, 0), draw(1, 0));
        assert_ne!(draw(1, 0), draw(2, 0));
        assert_ne!(draw(1, 0), draw(1, 1));
        assert!(draw(1, 0).iter().all(|d| d.len() == 50 && d.iter().all(|i| *i < 50)));
    }
}
