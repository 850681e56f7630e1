//! Percentile bootstrap (Efron 1979) of a mean over records; all answers to a record are resampled together.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// Parameters of the bootstrap intervals.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bootstrap {
    /// Share of the resampled means inside an interval, in (0, 1).
    pub confidence: f64,
    /// Number of resamples; 0: no intervals.
    pub resamples: usize,
    /// Random seed.
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self { confidence: 0.95, resamples: 2000, seed: 0 }
    }
}

/// A mean with its confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean; `None` if there is nothing to average.
    pub value: Option<f64>,
    /// Lower end of the interval; `None` without a value or without resamples.
    pub low: Option<f64>,
    /// Upper end of the interval.
    pub high: Option<f64>,
    /// Number of values averaged: answers, or what the metric counts in them.
    pub n: usize,
}

/// Sum and count of a metric over the answers to one record; the count is above 0.
pub type SumAndCount = [f64; 2];

impl Bootstrap {
    /// Returns `resamples` draws of `n` indices below `n`, a function of (seed, stream, n, number of the resample).
    pub fn draws(&self, stream: u64, n: usize) -> impl Iterator<Item = Vec<usize>> + use<> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(stream);
        (0..self.resamples).map(move |_| (0..n).map(|_| random.random_range(0..n)).collect())
    }

    /// Computes the mean over all answers, `sum of sums / sum of counts`, and its percentile interval under resampling of records.
    pub fn mean(&self, records: &[SumAndCount]) -> Estimate {
        let all: Vec<usize> = (0..records.len()).collect();
        let n = records.iter().map(|r| r[1]).sum::<f64>() as usize;
        if n == 0 {
            return Estimate { value: None, low: None, high: None, n };
        }
        let drawn = self.draws(0, records.len()).map(|d| ratio(records, &d)).collect();
        self.estimate(ratio(records, &all), drawn, n)
    }

    /// Computes the mean of the strata's means with equal weights, and its interval under resampling of records within each stratum.
    pub fn mean_of_means(&self, strata: &[Vec<SumAndCount>]) -> Estimate {
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

fn ratio(records: &[SumAndCount], chosen: &[usize]) -> f64 {
    let (sum, count) = chosen.iter().fold((0.0, 0.0), |(s, c), &i| (s + records[i][0], c + records[i][1]));
    sum / count
}

/// Computes quantile `q` in `[0, 1]` with linear interpolation, like `numpy.quantile`; `None` without values.
fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let position = q * sorted.len().checked_sub(1)? as f64;
    let low = sorted[position.floor() as usize];
    let high = sorted[position.ceil() as usize];
    Some(low + (high - low) * position.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_match_by_hand() {
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
        assert_eq!(b.mean_of_means(&strata).value, Some(0.5), "strata have equal weights");
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), Some(3.0));
    }

    #[test]
    fn draws_depend_on_seed_and_stream_only() {
        let draw =
            |seed, stream| Bootstrap { seed, resamples: 3, ..Default::default() }.draws(stream, 50).collect::<Vec<_>>();
        assert_eq!(draw(1, 0), draw(1, 0));
        assert_ne!(draw(1, 0), draw(2, 0));
        assert_ne!(draw(1, 0), draw(1, 1));
        assert!(draw(1, 0).iter().all(|d| d.len() == 50 && d.iter().all(|i| *i < 50)));
    }
}
