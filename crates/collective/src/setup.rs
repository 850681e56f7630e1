//! Configuration of a rank: its world, backend and timeouts.

use std::time::Duration;

use tch::Device;
use unveil_core::Secret;

use crate::{CollectiveError, Result};

/// The library that carries out the calls.
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
    /// Returns the backend for several ranks with tensors on this kind of device.
    pub fn for_device(device: Device) -> Self {
        match device {
            Device::Cuda(device) => Self::Nccl { device },
            _ => Self::Gloo,
        }
    }

    /// Returns the backend's name in configurations and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Solo => "solo",
            Self::Gloo => "gloo",
            Self::Nccl { .. } => "nccl",
        }
    }
}

/// Timeouts of the rendezvous, of calls and of heartbeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Time for all ranks to join.
    pub rendezvous: Duration,
    /// Upper limit of every call, whatever deadline its caller passes.
    pub call: Duration,
    /// Interval between two heartbeats of a rank.
    pub heartbeat_interval: Duration,
    /// A rank without a heartbeat for this long has failed.
    pub heartbeat: Duration,
}

impl Timeouts {
    /// Uses one limit for the rendezvous, for each call and for missing heartbeats.
    pub fn within(limit: Duration) -> Self {
        let heartbeat_interval = Self::default().heartbeat_interval.min(limit / 20);
        Self { rendezvous: limit, call: limit, heartbeat_interval, heartbeat: limit }
    }
}

impl Default for Timeouts {
    /// Five minutes for the rendezvous and for a call; a failed rank is detected within 15 s.
    fn default() -> Self {
        Self {
            rendezvous: Duration::from_secs(300),
            call: Duration::from_secs(300),
            heartbeat_interval: Duration::from_millis(500),
            heartbeat: Duration::from_secs(10),
        }
    }
}

/// The configuration of one rank of a world.
#[derive(Debug, Clone)]
pub struct Setup {
    /// This rank, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// Address of the rendezvous, `host:port`. Rank 0 listens there; with port 0 it picks a free port, which
    /// [`crate::open_reporting_address`] reports.
    pub address: String,
    /// Address at which other ranks reach this one; `None`: the local address of the route to rank 0.
    pub local_address: Option<String>,
    /// The library that carries out the calls.
    pub backend: Backend,
    /// Text that must be equal on all ranks: configuration, version of the binary. Errors show the lines that differ.
    pub fingerprint: String,
    /// Secret shared by all ranks, which each proves to all before the world opens. Required for a rendezvous beyond loopback;
    /// `None`: any process may join.
    pub token: Option<Secret>,
    /// Timeouts of the rendezvous, of calls and of heartbeats.
    pub timeouts: Timeouts,
}

impl Setup {
    pub(crate) fn check(&self) -> Result<()> {
        let Self { rank, world, timeouts, .. } = self;
        let problem = if *world == 0 || rank >= world {
            format!("rank {rank} of a world of {world}: ranks start at 0 and are less than the size of the world")
        } else if self.backend == Backend::Solo && *world != 1 {
            format!("the solo backend supports one rank, not {world}; use gloo or nccl")
        } else if timeouts.heartbeat_interval.is_zero() || timeouts.heartbeat < timeouts.heartbeat_interval * 10 {
            format!(
                "the heartbeat timeout is {:?} with a heartbeat every {:?}: it must be at least ten intervals",
                timeouts.heartbeat, timeouts.heartbeat_interval
            )
        } else {
            return Ok(());
        };
        Err(CollectiveError::Setup(problem))
    }

    /// Returns the text that must be equal on all ranks.
    pub(crate) fn full_fingerprint(&self) -> String {
        let token = if self.token.is_some() { "with a token" } else { "without a token" };
        format!("{} ranks\n{}\n{token}\n{}", self.world, self.backend.name(), self.fingerprint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_setups_are_rejected() {
        let setup = |rank, world, backend| Setup {
            rank,
            world,
            address: "127.0.0.1:0".into(),
            local_address: None,
            backend,
            fingerprint: String::new(),
            token: None,
            timeouts: Timeouts::default(),
        };
        setup(0, 1, Backend::Solo).check().unwrap();
        setup(1, 2, Backend::Gloo).check().unwrap();
        assert!(setup(2, 2, Backend::Gloo).check().unwrap_err().to_string().contains("rank 2 of a world of 2"));
        assert!(setup(0, 0, Backend::Gloo).check().is_err());
        assert!(setup(0, 2, Backend::Solo).check().unwrap_err().to_string().contains("not 2"));
        let mut hasty = setup(0, 2, Backend::Gloo);
        hasty.timeouts.heartbeat_interval = hasty.timeouts.heartbeat;
        assert!(hasty.check().unwrap_err().to_string().contains("10s"));
        for seconds in [1, 10, 600] {
            let timeouts = Timeouts::within(Duration::from_secs(seconds));
            Setup { timeouts, ..setup(0, 2, Backend::for_device(Device::Cpu)) }.check().unwrap();
        }
        assert_eq!(Backend::for_device(Device::Cuda(3)), Backend::Nccl { device: 3 });
    }
}
