//! Prometheus metrics of the experience server: groups by state and workers, read from the state machine when the page
//! is requested.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};

use unveil_service::prometheus_client::collector::Collector;
use unveil_service::prometheus_client::encoding::DescriptorEncoder;
use unveil_service::prometheus_client::registry::Registry;
use unveil_service::{Series, ServiceAccess, serve_metrics};

use super::error::Result;
use super::{ExperienceServer, PRESENCE_TIMEOUT, Shared};

/// Collector of the queue's metrics, valid while the server exists.
#[derive(Debug)]
struct QueueCollector(Weak<Shared>);

impl ExperienceServer {
    /// Serves the metrics of `registry` and of the queue at `/metrics` on `listen` while the server runs, unless
    /// `listen` is empty. Returns the bound address.
    ///
    /// # Errors
    /// Returns [`crate::ServerError::Service`] if the address cannot be bound.
    pub fn serve_metrics(
        &self,
        listen: &str,
        mut registry: Registry,
        access: &ServiceAccess,
    ) -> Result<Option<SocketAddr>> {
        if listen.is_empty() {
            return Ok(None);
        }
        registry.register_collector(Box::new(QueueCollector(Arc::downgrade(&self.shared))));
        let page = serve_metrics(listen, Arc::new(registry), || (), access, self.stop.clone());
        let address = self.handle.block_on(page)?;
        tracing::info!(%address, "serving metrics at /metrics");
        Ok(Some(address))
    }
}

impl Collector for QueueCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(shared) = self.0.upgrade() else { return Ok(()) };
        let state = shared.lock();
        let now = shared.now();
        let leasable = state.machine.leasable();
        let n = state.machine.stats();
        let rejected: Vec<(String, u64)> = state.rejected.iter().map(|(w, n)| (w.clone(), *n)).collect();
        let present =
            state.workers.values().filter(|last_call| now.saturating_sub(**last_call) < PRESENCE_TIMEOUT).count();
        drop(state);
        let (streams, dropped) = shared.streams.counts();
        let mut s = Series(encoder);
        let groups = [("leasable", leasable), ("leased", n.leased), ("ready", n.ready), ("training", n.training)];
        let groups = groups.map(|(state, n)| (state, n as f64));
        let help = "Groups by state; leasable is the queue that waits for rollout workers";
        s.gauges("groups", help, None, "state", groups)?;
        let lost = [
            ("stale", n.stale),
            ("expired", n.expired),
            ("duplicate", n.duplicates),
            ("refused", n.refused),
            ("rejected", n.rejected),
            ("unscored", n.unscored),
            ("failed", n.failed),
        ];
        s.counters("lost_groups", "Groups whose work did not count, by reason", "reason", lost)?;
        s.counter("trained_groups", "Groups trained since the start of the run", None, n.trained as f64)?;
        s.gauge("weight_streams", "Streams of weights under way", None, streams as f64)?;
        let help = "Streams of weights that were dropped: superseded, or read too slowly";
        s.counter("dropped_weight_streams", help, None, dropped as f64)?;
        let untrained = [
            ("dropped", n.dropped),
            ("skipped", n.skipped),
            ("wholly_masked", n.wholly_masked),
            ("filtered", n.filtered),
            ("replaced", n.replaced),
        ];
        let help = "Groups that trained nothing since the start of the run, by reason";
        s.counters("untrained_groups", help, "reason", untrained)?;
        let help = "Submissions refused for what they hold, by worker";
        s.counters("rejected_submissions", help, "worker", rejected.iter().map(|(w, n)| (w.as_str(), *n)))?;
        s.gauge("weight_version", "Published weight version, the update's number", None, n.version as f64)?;
        s.gauge("workers", "Rollout workers heard of in the last 5 s", None, present as f64)
    }
}
