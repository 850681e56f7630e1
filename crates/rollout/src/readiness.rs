//! Readiness of a worker: it is ready while it holds weights, the experience service answers, and rewards are available. Reported
//! through the health service.

use std::sync::{Arc, Mutex, PoisonError};

use unveil_service::Health;

/// Readiness of a worker; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Readiness {
    health: Health,
    conditions: Arc<Mutex<Conditions>>,
}

/// Conditions of readiness.
#[derive(Debug)]
struct Conditions {
    learner_answers: bool,
    rewards_available: bool,
}

impl Readiness {
    /// Creates the readiness of a worker that is not ready until the learner answers.
    pub(crate) fn new(health: Health) -> Self {
        let conditions = Conditions { learner_answers: false, rewards_available: true };
        Self { health, conditions: Arc::new(Mutex::new(conditions)) }
    }

    /// Records whether the learner answers a worker that holds weights.
    pub(crate) fn set_learner_answers(&self, answers: bool) {
        self.update(|conditions| conditions.learner_answers = answers);
    }

    /// Records whether rewards are available.
    pub(crate) fn set_rewards_available(&self, available: bool) {
        self.update(|conditions| conditions.rewards_available = available);
    }

    fn update(&self, change: impl FnOnce(&mut Conditions)) {
        let mut conditions = self.conditions.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut conditions);
        if conditions.learner_answers && conditions.rewards_available {
            self.health.set_ready()
        } else {
            self.health.set_not_ready()
        }
    }
}
