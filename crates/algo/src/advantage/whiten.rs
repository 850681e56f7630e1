//! Mean and variance of advantages over a whole batch, in a form that micro-batches and ranks can merge, and whitening by them.

use super::EQUAL;

/// Added to the variance before the root.
const VARIANCE_EPS: f64 = 1e-8;

/// Count, mean and sum of squared distances from the mean.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Moments {
    /// How many numbers.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Sum of the squared distances from it.
    pub squares: f64,
}

impl Moments {
    /// Of `values`.
    pub fn of(values: &[f64]) -> Self {
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        let squares = values.iter().map(|v| (v - mean).powi(2)).sum();
        Self { count: values.len() as u64, mean, squares }
    }

    /// Of both together (pairwise update; Chan, Golub and LeVeque, 1979), for batches that are spread over ranks.
    pub fn merge(self, other: Self) -> Self {
        let count = self.count + other.count;
        if count == 0 {
            return self;
        }
        let (a, b, n) = (self.count as f64, other.count as f64, count as f64);
        let gap = other.mean - self.mean;
        Self { count, mean: self.mean + gap * b / n, squares: self.squares + other.squares + gap * gap * a * b / n }
    }

    /// Sample variance; 0 for fewer than two numbers.
    pub fn variance(&self) -> f64 {
        if self.count < 2 { 0.0 } else { self.squares / (self.count - 1) as f64 }
    }

    /// Shifts `values` to mean 0 and scales them to variance 1, as these moments have it: (v - mean) / sqrt(variance + 1e-8)
    /// ("What matters in on-policy reinforcement learning", arXiv 2006.05990, appendix B.9; the global normalisation of
    /// REINFORCE++, arXiv 2501.03262). Where all numbers are equal, also where there is only one, they become exactly 0.
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
    fn equal_numbers_become_zero() {
        for values in [vec![0.1 + 0.2, 0.3, 0.3], vec![7.0], vec![]] {
            let mut v = values.clone();
            Moments::of(&values).whiten(&mut v);
            assert!(v.iter().all(|x| *x == 0.0), "{v:?}");
        }
    }

    #[test]
    fn merged_moments_are_those_of_the_whole() {
        let all: Vec<f64> = (0..17).map(|i| f64::from(i * i % 7) - 2.5).collect();
        let whole = Moments::of(&all);
        let merged = Moments::of(&all[..5]).merge(Moments::of(&[])).merge(Moments::of(&all[5..]));
        assert_eq!(merged.count, whole.count);
        assert!((merged.mean - whole.mean).abs() < 1e-14 && (merged.squares - whole.squares).abs() < 1e-12);
        assert_eq!(Moments::default().merge(Moments::default()), Moments::default());
    }
}
