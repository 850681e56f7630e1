//! Mean and variance of advantages over a whole batch, in a form that micro-batches and ranks can merge, and whitening.

use super::EQUAL;

/// Added to the variance before taking the root.
const VARIANCE_EPS: f64 = 1e-8;

/// Count, mean and sum of squared deviations from the mean.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Moments {
    /// Number of values.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Sum of squared deviations from the mean.
    pub squares: f64,
}

impl Moments {
    /// Computes mean and squared deviations of `values`.
    pub fn from_values(values: &[f64]) -> Self {
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        let squares = values.iter().map(|v| (v - mean).powi(2)).sum();
        Self { count: values.len() as u64, mean, squares }
    }

    /// Returns the moments of both sets of values together (pairwise update; Chan, Golub and LeVeque, 1979), for batches spread over ranks.
    pub fn merge(self, other: Self) -> Self {
        let count = self.count + other.count;
        if count == 0 {
            return self;
        }
        let a = self.count as f64;
        let b = other.count as f64;
        let n = count as f64;
        let gap = other.mean - self.mean;
        Self { count, mean: self.mean + gap * b / n, squares: self.squares + other.squares + gap * gap * a * b / n }
    }

    /// Returns the sample variance; 0 for fewer than two values.
    pub fn variance(&self) -> f64 {
        if self.count < 2 { 0.0 } else { self.squares / (self.count - 1) as f64 }
    }

    /// Shifts `values` to mean 0 and scales them to variance 1 with respect to these moments: (v - mean) / sqrt(variance + 1e-8)
    /// ("What matters in on-policy reinforcement learning", arXiv 2006.05990, appendix B.9; the global normalisation of
    /// REINFORCE++, arXiv 2501.03262). If all values are equal, or there is only one, they become exactly 0.
    pub fn whiten(&self, values: &mut [f64]) {
        let variance = self.variance();
        let scale = if variance <= EQUAL * EQUAL { 0.0 } else { (variance + VARIANCE_EPS).sqrt().recip() };
        values.iter_mut().for_each(|v| *v = (*v - self.mean) * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_become_zero() {
        for values in [vec![0.1 + 0.2, 0.3, 0.3], vec![7.0], vec![]] {
            let mut v = values.clone();
            Moments::from_values(&values).whiten(&mut v);
            assert!(v.iter().all(|x| *x == 0.0), "{v:?}");
        }
    }

    #[test]
    fn merged_moments_match_those_of_all_values() {
        let all: Vec<f64> = (0..17).map(|i| f64::from(i * i % 7) - 2.5).collect();
        let whole = Moments::from_values(&all);
        let merged =
            Moments::from_values(&all[..5]).merge(Moments::from_values(&[])).merge(Moments::from_values(&all[5..]));
        assert_eq!(merged.count, whole.count);
        assert!((merged.mean - whole.mean).abs() < 1e-14 && (merged.squares - whole.squares).abs() < 1e-12);
        assert_eq!(Moments::default().merge(Moments::default()), Moments::default());
    }
}
