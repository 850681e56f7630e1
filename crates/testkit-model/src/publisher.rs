//! An experience server that publishes computed weights.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tokio::runtime::{Builder, Runtime};
use unveil_core::TrainGroup;
use unveil_experience::Experience;
use unveil_experience_rpc::{BroadcastOptions, BroadcastReport, ExperienceServer, ExperienceServerOptions, NewWeights};

use crate::computed_weights::computed;
use crate::{BROADCAST_TIMEOUT, NoLeases, PATIENCE, WeightSubscriber, experience_settings, server_options};

/// An experience server that publishes computed weights.
#[derive(Debug)]
pub struct WeightPublisher {
    /// Runtime of the server.
    pub runtime: Runtime,
    /// The server.
    pub server: ExperienceServer,
    device: Device,
}

impl WeightPublisher {
    /// Starts a server that broadcasts tensors on this device.
    pub fn new(device: Device) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let machine: Experience<TrainGroup> =
            Experience::new(experience_settings(1, 9.0), vec!["a".into()]).expect("valid settings");
        let broadcast = Some(BroadcastOptions { device, timeout: BROADCAST_TIMEOUT });
        let options = ExperienceServerOptions { broadcast, ..server_options() };
        let server = ExperienceServer::start(runtime.handle(), options, machine, Arc::new(NoLeases));
        Self { runtime, server: server.expect("a server on a free port"), device }
    }

    /// Publishes the computed weights of a version.
    pub fn publish(&self, version: u64) {
        let named: Vec<_> = computed(version).into_iter().map(|(n, t)| (n, t.to_device(self.device))).collect();
        self.publish_these(version, &named, Kind::BFloat16, &|name| name != "base");
    }

    /// Publishes given weights as `kind`; those for which `may_change` returns false are sent with the first version only.
    pub fn publish_these(
        &self,
        version: u64,
        named: &[(String, Tensor)],
        kind: Kind,
        may_change: &dyn Fn(&str) -> bool,
    ) {
        let weights = NewWeights { version, named, kind, adapters: None, may_change };
        self.server.publish(&weights).expect("weights are published");
    }

    /// Waits for the next completed broadcast; returns (version, round, workers, bytes).
    pub fn sent(&self) -> (u64, u64, usize, u64) {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(BroadcastReport { version, round, workers, bytes, .. }) = self.server.drain_broadcasts().pop() {
                return (version, round, workers, bytes);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no broadcast within {PATIENCE:?}");
    }

    /// Returns the address of the server.
    pub fn address(&self) -> String {
        self.server.address().to_string()
    }

    /// Starts a worker that receives weights on the device of this server.
    pub fn subscribe(&self, name: &str) -> WeightSubscriber {
        WeightSubscriber::start(self.address(), name.to_owned(), self.device)
    }
}
