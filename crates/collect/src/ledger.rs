//! What may still be spent. Pure but for a lock.

use std::sync::{Mutex, PoisonError};

/// Prices and budget in one currency, whichever it is.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// Per million tokens of prompts and of answers.
    prices: [f64; 2],
    /// 0 = no limit.
    budget: f64,
    /// A request is taken to cost this at least, until answers cost more.
    least: f64,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy)]
struct State {
    spent: f64,
    /// The dearest answer so far.
    most: f64,
    under_way: usize,
}

impl Ledger {
    /// A ledger in which `spent` is gone already and no answer was dearer than `most`. Answers have `max_tokens` at most.
    pub(crate) fn new(prices: [f64; 2], budget: f64, max_tokens: u32, (spent, most): (f64, f64)) -> Self {
        let least = f64::from(max_tokens) * prices[1] / 1e6;
        Self { prices, budget, least, state: Mutex::new(State { spent, most, under_way: 0 }) }
    }

    /// What an answer with this usage costs.
    pub(crate) fn cost(&self, [prompt, answer]: [u64; 2]) -> f64 {
        (prompt as f64 * self.prices[0] + answer as f64 * self.prices[1]) / 1e6
    }

    /// Lets a request go out; no when it and those under way, each as dear as the dearest so far, would pass the budget.
    pub(crate) fn admit(&self) -> bool {
        let mut s = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let each = s.most.max(self.least);
        let ok = self.budget == 0.0 || s.spent + each * (s.under_way + 1) as f64 <= self.budget;
        s.under_way += usize::from(ok);
        ok
    }

    /// Notes the end of a request that was let out, and what it cost.
    pub(crate) fn settle(&self, cost: f64) {
        let mut s = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        s.under_way = s.under_way.saturating_sub(1);
        s.spent += cost;
        s.most = s.most.max(cost);
    }

    /// What was spent, earlier runs included.
    pub(crate) fn spent(&self) -> f64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).spent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_under_way_count() {
        // 1000 tokens at 10 a million: 0.01 each.
        let l = Ledger::new([2.0, 10.0], 0.035, 1000, (0.0, 0.0));
        assert!((l.cost([500_000, 1000]) - 1.01).abs() < 1e-12);
        assert!(l.admit() && l.admit() && l.admit() && !l.admit());
        l.settle(0.001);
        assert!(l.admit() && !l.admit(), "0.001 + 3 x 0.01 fits, a fourth does not");
        l.settle(0.02);
        assert!(!l.admit(), "answers are dearer than thought");
        assert!((l.spent() - 0.021).abs() < 1e-12);
        let free = Ledger::new([2.0, 10.0], 0.0, 1000, (99.0, 9.0));
        assert!((0..50).all(|_| free.admit()));
        assert!(!Ledger::new([0.0, 1.0], 1.0, 10, (1.0, 0.1)).admit(), "earlier runs count");
    }
}
