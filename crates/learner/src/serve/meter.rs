//! What the host of experience tells Prometheus: how many groups are where, and how many workers there are. Must not know: tensors.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use unveil_service::metrics_page;
use unveil_service::prometheus_client::metrics::counter::Counter;
use unveil_service::prometheus_client::metrics::family::Family;
use unveil_service::prometheus_client::metrics::gauge::Gauge;
use unveil_service::prometheus_client::registry::Registry;

use super::{Host, SILENT, Shared};
use crate::error::Result;

type Value = Gauge<u64, AtomicU64>;
type Labels = Vec<(&'static str, &'static str)>;

/// What is read off the state when a page is asked for.
#[derive(Debug, Default)]
struct Meter {
    groups: Family<Labels, Value>,
    lost: Family<Labels, Counter>,
    trained: Counter,
    version: Value,
    workers: Value,
}

impl Host {
    /// Serves `/metrics` on `listen` for as long as the host runs; nothing where it is empty. The bound address comes back.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn serve_metrics(&self, listen: &str) -> Result<Option<SocketAddr>> {
        if listen.is_empty() {
            return Ok(None);
        }
        let (meter, mut registry) = (Meter::default(), Registry::with_prefix("unveil_learner"));
        meter.register(&mut registry);
        let shared = Arc::downgrade(&self.shared);
        let page = metrics_page(listen, Arc::new(registry), move || meter.read(&shared), self.stop.clone());
        let address = self.handle.block_on(page)?;
        tracing::info!(%address, "metrics at /metrics");
        Ok(Some(address))
    }
}

impl Meter {
    fn register(&self, registry: &mut Registry) {
        let help = "Groups by state; leasable is the queue that waits for rollout workers";
        registry.register("groups", help, self.groups.clone());
        registry.register("lost_groups", "Groups whose work did not count, by reason", self.lost.clone());
        registry.register("trained_groups", "Groups trained since the start of the run", self.trained.clone());
        registry.register("weight_version", "Published weight version, the update's number", self.version.clone());
        registry.register("workers", "Rollout workers heard of in the last 5 s", self.workers.clone());
    }

    fn read(&self, shared: &Weak<Shared>) {
        let Some(shared) = shared.upgrade() else { return };
        let state = shared.lock();
        let (now, leasable, s) = (shared.now(), state.machine.leasable(), state.machine.stats());
        let heard = state.workers.values().filter(|heard| now.saturating_sub(**heard) < SILENT).count();
        drop(state);
        let groups = [("leasable", leasable), ("leased", s.leased), ("ready", s.ready), ("training", s.training)];
        for (name, n) in groups {
            self.groups.get_or_create(&vec![("state", name)]).set(n as u64);
        }
        let lost = [("stale", s.stale), ("expired", s.expired), ("duplicate", s.duplicates), ("refused", s.refused)];
        for (name, n) in lost {
            self.lost.get_or_create(&vec![("reason", name)]).inner().store(n, Ordering::Relaxed);
        }
        self.trained.inner().store(s.trained, Ordering::Relaxed);
        self.version.set(s.version);
        self.workers.set(heard as u64);
    }
}
