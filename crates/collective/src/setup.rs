//! What a rank is told when it starts.

use std::time::Duration;

use tch::Device;
use unveil_core::Secret;

use crate::{CollectiveError, Result};

/// What carries the calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// A world of one rank, on any device.
    Solo,
    /// libtorch's Gloo, for tensors on the CPU.
    Gloo,
    /// NCCL, for tensors on GPU `device`.
    Nccl {
        /// The GPU of this rank.
        device: usize,
    },
}

impl Backend {
    /// What carries calls among several ranks whose tensors are on this kind of device.
    pub fn of(device: Device) -> Self {
        match device {
            Device::Cuda(device) => Self::Nccl { device },
            _ => Self::Gloo,
        }
    }

    /// The name in configurations and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Solo => "solo",
            Self::Gloo => "gloo",
            Self::Nccl { .. } => "nccl",
        }
    }
}

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// For all ranks to come together.
    pub join: Duration,
    /// The longest that any call may take, whatever deadline its caller has.
    pub call: Duration,
    /// Between two signs of life.
    pub beat: Duration,
    /// A rank that gave no sign of life for so long is gone.
    pub lost: Duration,
}

impl Timing {
    /// Everything within `limit`: to come together, each call, and silence.
    pub fn within(limit: Duration) -> Self {
        let beat = Self::default().beat.min(limit / 20);
        Self { join: limit, call: limit, beat, lost: limit }
    }
}

impl Default for Timing {
    /// Five minutes to come together and for a call; a gone rank is found within 15 s.
    fn default() -> Self {
        let minutes = Duration::from_secs(300);
        Self { join: minutes, call: minutes, beat: Duration::from_millis(500), lost: Duration::from_secs(10) }
    }
}

/// One rank of a world.
#[derive(Debug, Clone)]
pub struct Setup {
    /// This rank, from 0.
    pub rank: usize,
    /// Ranks in all.
    pub world: usize,
    /// Where the ranks meet, `host:port`. Rank 0 listens there; its port 0 picks a free one, which [`crate::open_with`] tells.
    pub address: String,
    /// The address by which other ranks reach this one; none: that of the route to rank 0.
    pub local: Option<String>,
    /// What carries the calls.
    pub backend: Backend,
    /// What must be the same on all ranks, in lines: configuration, version of the binary. Errors show the lines that differ.
    pub fingerprint: String,
    /// What all ranks know and nobody else does: each proves it to all before the world opens. Needed where ranks meet beyond
    /// loopback; none: whoever comes first is taken.
    pub token: Option<Secret>,
    /// How long things may take.
    pub timing: Timing,
}

impl Setup {
    pub(crate) fn check(&self) -> Result<()> {
        let Self { rank, world, timing, .. } = self;
        let fault = if *world == 0 || rank >= world {
            format!("rank {rank} of a world of {world}: ranks count from 0 and are below the size of the world")
        } else if self.backend == Backend::Solo && *world != 1 {
            format!("the solo backend is a world of one rank, not {world}; use gloo or nccl")
        } else if timing.beat.is_zero() || timing.lost < timing.beat * 10 {
            format!(
                "a rank is gone after {:?} without a sign of life, but signs come every {:?}: wait for ten at least",
                timing.lost, timing.beat
            )
        } else {
            return Ok(());
        };
        Err(CollectiveError::Setup(fault))
    }

    /// All that must agree among ranks.
    pub(crate) fn print(&self) -> String {
        let token = if self.token.is_some() { "with a token" } else { "without a token" };
        format!("{} ranks\n{}\n{token}\n{}", self.world, self.backend.name(), self.fingerprint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_setups_are_named() {
        let setup = |rank, world, backend| Setup {
            rank,
            world,
            address: "127.0.0.1:0".into(),
            local: None,
            backend,
            fingerprint: String::new(),
            token: None,
            timing: Timing::default(),
        };
        setup(0, 1, Backend::Solo).check().unwrap();
        setup(1, 2, Backend::Gloo).check().unwrap();
        assert!(setup(2, 2, Backend::Gloo).check().unwrap_err().to_string().contains("rank 2 of a world of 2"));
        assert!(setup(0, 0, Backend::Gloo).check().is_err());
        assert!(setup(0, 2, Backend::Solo).check().unwrap_err().to_string().contains("not 2"));
        let mut hasty = setup(0, 2, Backend::Gloo);
        hasty.timing.beat = hasty.timing.lost;
        assert!(hasty.check().unwrap_err().to_string().contains("10s"));
        for seconds in [1, 10, 600] {
            let timing = Timing::within(Duration::from_secs(seconds));
            Setup { timing, ..setup(0, 2, Backend::of(Device::Cpu)) }.check().unwrap();
        }
        assert_eq!(Backend::of(Device::Cuda(3)), Backend::Nccl { device: 3 });
    }
}
