//! Fixtures: small runs with workers, and the real rollout worker.

pub(crate) mod real_worker;
pub(crate) mod small_run;
