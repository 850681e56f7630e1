//! Settings and options of an experience server.

use unveil_core::{GroupId, Sampling};
use unveil_experience::Settings;
use unveil_experience_rpc::{ExperienceServerOptions, GroupSource, PreparedGroup, RecordFailure};

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

/// Returns options of a server on a free loopback port: two responses of at most four tokens per group, and no broadcast.
pub fn server_options() -> ExperienceServerOptions {
    ExperienceServerOptions {
        listen: "127.0.0.1:0".into(),
        sampling: Sampling { n: 2, temperature: 1.0, max_new_tokens: 4, seed: 7, ..Default::default() },
        stop: vec![],
        vocab: 50,
        fixed_lease_size: None,
        broadcast: None,
    }
}

/// A source without groups.
#[derive(Debug)]
pub struct NoLeases;

impl GroupSource for NoLeases {
    fn prepare(&self, _: usize, _: &GroupId) -> Result<PreparedGroup, RecordFailure> {
        Err("nothing is leased here".into())
    }
}
