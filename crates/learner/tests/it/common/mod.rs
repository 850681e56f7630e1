//! Fixtures: those of the tests of the trainer and of the protocol, small runs with workers, and settings of an experience server.

pub mod real_worker;
pub mod small_run;

use unveil_experience::Settings;

#[allow(dead_code)]
#[path = "../../../../trainer/tests/it/common.rs"]
mod trainer;

pub use trainer::*;

#[allow(dead_code)]
#[path = "../../../../experience-rpc/tests/it/common/weight_sync.rs"]
pub mod weight_sync;

/// Returns strictly on-policy settings of an experience server; a worker is lost after `lease_s` seconds of silence.
pub fn experience_settings(groups_per_step: usize, lease_s: f64) -> Settings {
    Settings {
        groups_per_step,
        max_staleness: 0,
        lease_s,
        stall_s: 300.0,
        silence_s: lease_s,
        seed: 0,
        term: 1,
        total_groups: None,
    }
}
