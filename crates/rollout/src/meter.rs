//! What a worker tells Prometheus, and counts for its own report: groups, tokens, times, and how far its weights are behind.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use unveil_model::GpuMemory;
use unveil_proto::v1::release_request::Cause;
use unveil_proto::v1::submit_response::Verdict;
use unveil_service::prometheus_client::collector::Collector;
use unveil_service::prometheus_client::encoding::DescriptorEncoder;
use unveil_service::prometheus_client::metrics::counter::Counter;
use unveil_service::prometheus_client::metrics::family::Family;
use unveil_service::prometheus_client::metrics::gauge::Gauge;
use unveil_service::prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use unveil_service::prometheus_client::registry::{Registry, Unit};
use unveil_service::{Access, CancellationToken, Series, ServiceError, metrics_page, role_registry};

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
    /// 1 while no rewards can be had.
    away: Gauge,
    present: Arc<Mutex<Present>>,
}

#[derive(Debug, Default)]
struct Present {
    /// Version of the weights on the device.
    held: Option<u64>,
    /// The newest that the learner told of.
    newest: u64,
    gpu: Option<GpuMemory>,
}

/// What becomes of a group whose weights the learner does not trust, beside its verdicts.
const DISTRUSTED: &str = "distrusted";
/// And of one whose lease went to another worker while it was made.
const LOST: &str = "lost";
/// What becomes of a group that no reward could be had for.
const UNSCORED: &str = "unscored";
/// What becomes of a group that could not be made or scored.
const FAILED: &str = "failed";

fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 20))
}

impl Meter {
    pub fn new() -> Self {
        Self {
            leases: Counter::default(),
            groups: Family::default(),
            tokens: Counter::default(),
            generate: seconds(),
            reward: seconds(),
            swap: seconds(),
            swaps: Counter::default(),
            away: Gauge::default(),
            present: Arc::default(),
        }
    }

    /// Serves `/metrics` on `listen` until `shutdown`; nothing where it is empty.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn serve(
        &self,
        listen: &str,
        access: &Access,
        shutdown: CancellationToken,
    ) -> Result<Option<SocketAddr>, ServiceError> {
        if listen.is_empty() {
            return Ok(None);
        }
        let address = metrics_page(listen, Arc::new(self.registry()), || (), access, shutdown).await?;
        tracing::info!(%address, "metrics at /metrics");
        Ok(Some(address))
    }

    fn registry(&self) -> Registry {
        let mut registry = role_registry("rollout");
        registry.register("leases", "Groups that were leased", self.leases.clone());
        registry.register("groups", "Groups that were handed in, by verdict", self.groups.clone());
        registry.register("weight_swaps", "Times that weights were taken over", self.swaps.clone());
        registry.register("tokens", "Tokens of groups that the learner answered", self.tokens.clone());
        registry.register("rewards_away", "1 while no rewards can be had and groups are given back", self.away.clone());
        let help = "Time to generate a group, its share of the batch that it was generated in";
        registry.register_with_unit("generate", help, Unit::Seconds, self.generate.clone());
        let help = "Time until a group was scored, tries and waits included";
        registry.register_with_unit("reward", help, Unit::Seconds, self.reward.clone());
        let help = "Time from the arrival of new weights until the device had taken them over";
        registry.register_with_unit("weight_swap", help, Unit::Seconds, self.swap.clone());
        registry.register_collector(Box::new(self.clone()));
        registry
    }

    /// So many groups were leased.
    pub fn leased(&self, groups: usize) {
        self.leases.inc_by(groups as u64);
    }

    /// A group was generated and scored.
    pub fn made(&self, generate_ms: f64, reward_ms: f64) {
        self.generate.observe(generate_ms / 1e3);
        self.reward.observe(reward_ms / 1e3);
    }

    /// The learner's answer to a group of so many tokens.
    pub fn answered(&self, verdict: Verdict, tokens: u64) {
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

    /// A group was not taken because of the weights that made it.
    pub fn distrusted(&self) {
        self.count(DISTRUSTED);
    }

    /// A group was dropped, for its lease is another worker's.
    pub fn lost(&self) {
        self.count(LOST);
    }

    /// A group was given back: no reward could be had, or it could not be made or scored.
    pub fn given_back(&self, cause: Cause) {
        self.count(if cause == Cause::Unscored { UNSCORED } else { FAILED });
    }

    /// Whether rewards can be had.
    pub fn rewards(&self, back: bool) {
        self.away.set(i64::from(!back));
    }

    fn count(&self, verdict: &'static str) {
        self.groups.get_or_create(&[("verdict", verdict)]).inc();
    }

    /// The learner has published this version.
    pub fn newest(&self, version: u64) {
        let mut present = self.lock();
        present.newest = present.newest.max(version);
    }

    /// The learner was started again, and has no version that is newer than this.
    pub fn back_to(&self, version: u64) {
        self.lock().newest = version;
    }

    /// The device has this version, after so long; none = the learner does not trust what it has.
    pub fn holds(&self, version: Option<u64>, took: Duration) {
        self.lock().held = version;
        if let Some(version) = version {
            self.newest(version);
            self.swap.observe(took.as_secs_f64());
            self.swaps.inc();
        }
    }

    /// Memory of the GPU as the device's thread saw it last.
    pub fn gpu(&self, memory: Option<GpuMemory>) {
        self.lock().gpu = memory;
    }

    /// Groups accepted, groups answered otherwise, tokens, times that weights were taken over.
    pub fn totals(&self) -> (u64, u64, u64, u64) {
        let of = |verdict| self.groups.get_or_create(&[("verdict", verdict)]).get();
        let refused = ["duplicate", "stale", "expired", "rejected", "unknown", DISTRUSTED, LOST, UNSCORED, FAILED]
            .into_iter()
            .map(of)
            .sum();
        (of("accepted"), refused, self.tokens.get(), self.swaps.get())
    }

    fn lock(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector for Meter {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut s = Series(encoder);
        let present = self.lock();
        if let Some(held) = present.held {
            s.gauge("weight_version", "Version of the weights that generate", None, held as f64)?;
            let lag = present.newest.saturating_sub(held);
            s.gauge("weight_lag_versions", "Versions that these are behind the learner's", None, lag as f64)?;
        }
        if let Some(gpu) = present.gpu {
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
    fn weights_that_lag_are_told_and_weights_that_are_not_held_are_not() {
        let meter = Meter::new();
        let page = || {
            let mut page = String::new();
            encode(&mut page, &meter.registry()).unwrap();
            page
        };
        assert!(!page().contains("unveil_rollout_weight_version") && !page().contains("gpu_memory"));
        meter.holds(Some(3), Duration::from_millis(250));
        let of = |page: &str, series: &str| -> f64 {
            let value =
                |l: &str| l.strip_prefix("unveil_rollout_")?.strip_prefix(series)?.strip_prefix(' ')?.parse().ok();
            page.lines().find_map(value).unwrap_or_else(|| panic!("{series} is not in\n{page}"))
        };
        assert_eq!(of(&page(), "weight_lag_versions"), 0.0);
        meter.newest(5);
        let told = page();
        assert_eq!((of(&told, "weight_version"), of(&told, "weight_lag_versions")), (3.0, 2.0));
        assert_eq!(of(&told, "weight_swap_seconds_sum"), 0.25);
        meter.holds(None, Duration::ZERO);
        assert!(!page().contains("unveil_rollout_weight_version"));
        meter.answered(Verdict::Accepted, 30);
        meter.answered(Verdict::Stale, 12);
        meter.distrusted();
        meter.lost();
        assert_eq!(meter.totals(), (1, 3, 42, 1));
        meter.back_to(2);
        meter.holds(Some(2), Duration::ZERO);
        assert_eq!(of(&page(), "weight_lag_versions"), 0.0);
    }
}
