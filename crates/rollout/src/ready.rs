//! Whether a worker can do its work: the experience service answers while it holds weights, and rewards can be had. Both together are
//! what it tells whoever started it.

use std::sync::{Arc, Mutex, PoisonError};

use unveil_service::Health;

/// Readiness; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    health: Health,
    /// The learner answers, and rewards can be had.
    state: Arc<Mutex<(bool, bool)>>,
}

impl Ready {
    /// Not ready before the learner answers.
    pub fn new(health: Health) -> Self {
        Self { health, state: Arc::new(Mutex::new((false, true))) }
    }

    /// Whether the learner answers a worker that holds weights.
    pub fn learner(&self, answers: bool) {
        self.say(|state| state.0 = answers);
    }

    /// Whether rewards can be had.
    pub fn rewards(&self, back: bool) {
        self.say(|state| state.1 = back);
    }

    fn say(&self, change: impl FnOnce(&mut (bool, bool))) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        if state.0 && state.1 { self.health.ready() } else { self.health.waiting() }
    }
}
