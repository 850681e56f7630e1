//! What the host of experience tells Prometheus: how many groups are where, and how many workers there are, read off the state machine
//! when a page is asked for. Must not know: tensors.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};

use unveil_service::prometheus_client::collector::Collector;
use unveil_service::prometheus_client::encoding::DescriptorEncoder;
use unveil_service::prometheus_client::registry::Registry;
use unveil_service::{Access, Series, metrics_page};

use super::{Host, SILENT, Shared};
use crate::error::Result;

/// The state, for as long as the host has it.
#[derive(Debug)]
struct Queue(Weak<Shared>);

impl Host {
    /// Serves `/metrics` of `registry` and of the queue on `listen` for as long as the host runs; nothing where it is empty. The bound
    /// address comes back.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn serve_metrics(&self, listen: &str, mut registry: Registry, access: &Access) -> Result<Option<SocketAddr>> {
        if listen.is_empty() {
            return Ok(None);
        }
        registry.register_collector(Box::new(Queue(Arc::downgrade(&self.shared))));
        let page = metrics_page(listen, Arc::new(registry), || (), access, self.stop.clone());
        let address = self.handle.block_on(page)?;
        tracing::info!(%address, "metrics at /metrics");
        Ok(Some(address))
    }
}

impl Collector for Queue {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(shared) = self.0.upgrade() else { return Ok(()) };
        let state = shared.lock();
        let (now, leasable, n) = (shared.now(), state.machine.leasable(), state.machine.stats());
        let rejected: Vec<(String, u64)> = state.rejected.iter().map(|(w, n)| (w.clone(), *n)).collect();
        let heard = state.workers.values().filter(|heard| now.saturating_sub(**heard) < SILENT).count();
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
        let untrained = [("dropped", n.dropped), ("skipped", n.skipped), ("wholly_masked", n.wholly_masked)];
        let help = "Groups that trained nothing since the start of the run, by reason";
        s.counters("untrained_groups", help, "reason", untrained)?;
        let help = "Submissions refused for what they hold, by worker";
        s.counters("rejected_submissions", help, "worker", rejected.iter().map(|(w, n)| (w.as_str(), *n)))?;
        s.gauge("weight_version", "Published weight version, the update's number", None, n.version as f64)?;
        s.gauge("workers", "Rollout workers heard of in the last 5 s", None, heard as f64)
    }
}
