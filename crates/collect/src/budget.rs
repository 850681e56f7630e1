//! Budget of a run: cost of answers, and admission of requests.

use std::sync::{Mutex, PoisonError};

/// Prices, budget and spending, all in the same currency.
#[derive(Debug)]
pub(crate) struct BudgetTracker {
    /// Price per million tokens of prompts and of answers.
    prices: [f64; 2],
    /// Budget; 0: no limit.
    budget: f64,
    /// Minimum estimate of the cost of a request, until an answer costs more.
    min_estimate: f64,
    spending: Mutex<Spending>,
}

#[derive(Debug, Clone, Copy)]
struct Spending {
    spent: f64,
    /// Highest cost of an answer so far.
    max_cost: f64,
    in_flight: usize,
}

impl BudgetTracker {
    /// Creates a tracker for answers of at most `max_tokens`, after earlier runs have spent `spent` and at most `max_cost` on one answer.
    pub(crate) fn new(prices: [f64; 2], budget: f64, max_tokens: u32, (spent, max_cost): (f64, f64)) -> Self {
        let min_estimate = f64::from(max_tokens) * prices[1] / 1e6;
        Self { prices, budget, min_estimate, spending: Mutex::new(Spending { spent, max_cost, in_flight: 0 }) }
    }

    /// Computes the cost of an answer with this usage.
    pub(crate) fn cost(&self, [prompt, answer]: [u64; 2]) -> f64 {
        (prompt as f64 * self.prices[0] + answer as f64 * self.prices[1]) / 1e6
    }

    /// Reserves budget for a request; `false` if it and the requests in flight, at the highest cost so far, could exceed the budget.
    pub(crate) fn try_reserve(&self) -> bool {
        let mut s = self.spending.lock().unwrap_or_else(PoisonError::into_inner);
        let estimate = s.max_cost.max(self.min_estimate);
        let admitted = self.budget == 0.0 || s.spent + estimate * (s.in_flight + 1) as f64 <= self.budget;
        s.in_flight += usize::from(admitted);
        admitted
    }

    /// Records the end of an admitted request, and its cost.
    pub(crate) fn settle(&self, cost: f64) {
        let mut s = self.spending.lock().unwrap_or_else(PoisonError::into_inner);
        s.in_flight = s.in_flight.saturating_sub(1);
        s.spent += cost;
        s.max_cost = s.max_cost.max(cost);
    }

    /// Returns the amount spent, including earlier runs.
    pub(crate) fn spent(&self) -> f64 {
        self.spending.lock().unwrap_or_else(PoisonError::into_inner).spent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_in_flight_count_towards_the_budget() {
        // 1000 tokens at 10 per million: 0.01 each.
        let l = BudgetTracker::new([2.0, 10.0], 0.035, 1000, (0.0, 0.0));
        assert!((l.cost([500_000, 1000]) - 1.01).abs() < 1e-12);
        assert!(l.try_reserve() && l.try_reserve() && l.try_reserve() && !l.try_reserve());
        l.settle(0.001);
        assert!(l.try_reserve() && !l.try_reserve(), "0.001 + 3 x 0.01 fits, a fourth does not");
        l.settle(0.02);
        assert!(!l.try_reserve(), "answers cost more than estimated");
        assert!((l.spent() - 0.021).abs() < 1e-12);
        let free = BudgetTracker::new([2.0, 10.0], 0.0, 1000, (99.0, 9.0));
        assert!((0..50).all(|_| free.try_reserve()));
        assert!(!BudgetTracker::new([0.0, 1.0], 1.0, 10, (1.0, 0.1)).try_reserve(), "earlier runs count");
    }
}
