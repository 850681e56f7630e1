//! Prometheus metrics of a worker, which also make its report: groups, tokens, times, and the lag of its weights.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use unveil_proto::v1::release_request::Cause;
use unveil_proto::v1::submit_response::Verdict;
use unveil_service::prometheus_client::collector::Collector;
use unveil_service::prometheus_client::encoding::DescriptorEncoder;
use unveil_service::prometheus_client::metrics::counter::Counter;
use unveil_service::prometheus_client::metrics::family::Family;
use unveil_service::prometheus_client::metrics::gauge::Gauge;
use unveil_service::prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use unveil_service::prometheus_client::registry::{Registry, Unit};
use unveil_service::{CancellationToken, Series, ServiceAccess, ServiceError, role_registry, serve_metrics};
use unveil_torch_ext::GpuMemory;

/// Metrics of one worker. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Meter {
    leases: Counter,
    groups: Family<[(&'static str, &'static str); 1], Counter>,
    tokens: Counter,
    generate: Histogram,
    reward: Histogram,
    swap: Histogram,
    swaps: Counter,
    /// 1 while rewards are unavailable.
    rewards_away: Gauge,
    status: Arc<Mutex<DeviceStatus>>,
}

/// Latest values of the gauges.
#[derive(Debug, Default)]
struct DeviceStatus {
    /// Version of the weights on the device.
    held: Option<u64>,
    /// Newest version reported by the learner.
    newest: u64,
    gpu: Option<GpuMemory>,
}

/// Label of a group whose weights the learner rejected.
const WEIGHTS_REJECTED: &str = "distrusted";
/// Label of a group whose lease went to another worker.
const LOST: &str = "lost";
/// Label of a group that was released because rewards were unavailable.
const UNSCORED: &str = "unscored";
/// Label of a group that could not be generated or scored.
const FAILED: &str = "failed";

fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 20))
}

impl Meter {
    pub(crate) fn new() -> Self {
        Self {
            leases: Counter::default(),
            groups: Family::default(),
            tokens: Counter::default(),
            generate: seconds(),
            reward: seconds(),
            swap: seconds(),
            swaps: Counter::default(),
            rewards_away: Gauge::default(),
            status: Arc::default(),
        }
    }

    /// Serves `/metrics` on `listen` until `shutdown`, unless `listen` is empty. Returns the bound address.
    ///
    /// # Errors
    /// Returns a [`ServiceError`] if the address cannot be listened on.
    pub(crate) async fn serve(
        &self,
        listen: &str,
        access: &ServiceAccess,
        shutdown: CancellationToken,
    ) -> Result<Option<SocketAddr>, ServiceError> {
        if listen.is_empty() {
            return Ok(None);
        }
        let address = serve_metrics(listen, Arc::new(self.registry()), || (), access, shutdown).await?;
        tracing::info!(%address, "metrics at /metrics");
        Ok(Some(address))
    }

    fn registry(&self) -> Registry {
        let mut registry = role_registry("rollout");
        registry.register("leases", "Groups that were leased", self.leases.clone());
        registry.register("groups", "Groups submitted or released, by verdict", self.groups.clone());
        registry.register("weight_swaps", "Times that new weights were loaded", self.swaps.clone());
        registry.register("tokens", "Tokens of the groups that the learner answered", self.tokens.clone());
        registry.register(
            "rewards_away",
            "1 while rewards are unavailable and groups are released",
            self.rewards_away.clone(),
        );
        let help = "Time to generate a group, as its share of its batch";
        registry.register_with_unit("generate", help, Unit::Seconds, self.generate.clone());
        let help = "Time until a group was scored, with retries and waits";
        registry.register_with_unit("reward", help, Unit::Seconds, self.reward.clone());
        let help = "Time from the arrival of new weights until the device had loaded them";
        registry.register_with_unit("weight_swap", help, Unit::Seconds, self.swap.clone());
        registry.register_collector(Box::new(self.clone()));
        registry
    }

    /// Counts leased groups.
    pub(crate) fn count_leased(&self, groups: usize) {
        self.leases.inc_by(groups as u64);
    }

    /// Records the times of a group that was generated and scored.
    pub(crate) fn observe_group(&self, generate_ms: f64, reward_ms: f64) {
        self.generate.observe(generate_ms / 1e3);
        self.reward.observe(reward_ms / 1e3);
    }

    /// Counts the learner's verdict on a group of `tokens` tokens.
    pub(crate) fn count_verdict(&self, verdict: Verdict, tokens: u64) {
        self.count(match verdict {
            Verdict::Accepted => "accepted",
            Verdict::Duplicate => "duplicate",
            Verdict::Stale => "stale",
            Verdict::Expired => "expired",
            Verdict::Rejected => "rejected",
            Verdict::Unspecified => "unknown",
        });
        self.tokens.inc_by(tokens);
    }

    /// Counts a group that was rejected because of the weights that sampled it.
    pub(crate) fn count_weights_rejected(&self) {
        self.count(WEIGHTS_REJECTED);
    }

    /// Counts a group that was dropped because another worker has its lease.
    pub(crate) fn count_lost(&self) {
        self.count(LOST);
    }

    /// Counts a group that was released because rewards were unavailable, or it could not be generated or scored.
    pub(crate) fn count_released(&self, cause: Cause) {
        self.count(if cause == Cause::Unscored { UNSCORED } else { FAILED });
    }

    /// Records whether rewards are available.
    pub(crate) fn set_rewards_available(&self, available: bool) {
        self.rewards_away.set(i64::from(!available));
    }

    fn count(&self, verdict: &'static str) {
        self.groups.get_or_create(&[("verdict", verdict)]).inc();
    }

    /// Records a version published by the learner.
    pub(crate) fn set_newest(&self, version: u64) {
        let mut status = self.lock();
        status.newest = status.newest.max(version);
    }

    /// Records that the learner was restarted at this version, its newest.
    pub(crate) fn reset_newest(&self, version: u64) {
        self.lock().newest = version;
    }

    /// Records that the device has loaded this version in the time `took`; `None`: the learner rejected its weights.
    pub(crate) fn set_held(&self, version: Option<u64>, took: Duration) {
        self.lock().held = version;
        if let Some(version) = version {
            self.set_newest(version);
            self.swap.observe(took.as_secs_f64());
            self.swaps.inc();
        }
    }

    /// Records the GPU memory as last reported by the device thread.
    pub(crate) fn set_gpu_memory(&self, memory: Option<GpuMemory>) {
        self.lock().gpu = memory;
    }

    /// Returns the numbers of accepted groups, of other groups, of tokens, and of loaded weights.
    pub(crate) fn totals(&self) -> (u64, u64, u64, u64) {
        let count = |verdict| self.groups.get_or_create(&[("verdict", verdict)]).get();
        let refused =
            ["duplicate", "stale", "expired", "rejected", "unknown", WEIGHTS_REJECTED, LOST, UNSCORED, FAILED]
                .into_iter()
                .map(count)
                .sum();
        (count("accepted"), refused, self.tokens.get(), self.swaps.get())
    }

    fn lock(&self) -> MutexGuard<'_, DeviceStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector for Meter {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut s = Series(encoder);
        let status = self.lock();
        if let Some(held) = status.held {
            s.gauge("weight_version", "Version of the weights on the device", None, held as f64)?;
            let lag = status.newest.saturating_sub(held);
            let help = "Number of versions that the weights on the device are behind the learner's";
            s.gauge("weight_lag_versions", help, None, lag as f64)?;
        }
        if let Some(gpu) = status.gpu {
            let values = [("free", gpu.free as f64), ("total", gpu.total as f64)];
            s.gauges("gpu_memory", "Memory of the GPU", Some(&Unit::Bytes), "state", values)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use unveil_service::prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn metrics_report_staleness_only_when_weights_are_held() {
        let meter = Meter::new();
        let page = || {
            let mut page = String::new();
            encode(&mut page, &meter.registry()).unwrap();
            page
        };
        assert!(!page().contains("unveil_rollout_weight_version") && !page().contains("gpu_memory"));
        meter.set_held(Some(3), Duration::from_millis(250));
        let value_of = |page: &str, series: &str| -> f64 {
            let value =
                |l: &str| l.strip_prefix("unveil_rollout_")?.strip_prefix(series)?.strip_prefix(' ')?.parse().ok();
            page.lines().find_map(value).unwrap_or_else(|| panic!("{series} is not in\n{page}"))
        };
        assert_eq!(value_of(&page(), "weight_lag_versions"), 0.0);
        meter.set_newest(5);
        let lagging = page();
        assert_eq!((value_of(&lagging, "weight_version"), value_of(&lagging, "weight_lag_versions")), (3.0, 2.0));
        assert_eq!(value_of(&lagging, "weight_swap_seconds_sum"), 0.25);
        meter.set_held(None, Duration::ZERO);
        assert!(!page().contains("unveil_rollout_weight_version"));
        meter.count_verdict(Verdict::Accepted, 30);
        meter.count_verdict(Verdict::Stale, 12);
        meter.count_weights_rejected();
        meter.count_lost();
        assert_eq!(meter.totals(), (1, 3, 42, 1));
        meter.reset_newest(2);
        meter.set_held(Some(2), Duration::ZERO);
        assert_eq!(value_of(&page(), "weight_lag_versions"), 0.0);
    }
}
