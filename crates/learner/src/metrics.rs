//! Prometheus metrics of stage 2: the values of the `train` events and the duration of each part of a step. Metrics of
//! the queue belong to the experience server.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use unveil_core::TrainGroup;
use unveil_service::prometheus_client::collector::Collector;
use unveil_service::prometheus_client::encoding::DescriptorEncoder;
use unveil_service::prometheus_client::metrics::counter::Counter;
use unveil_service::prometheus_client::metrics::family::Family;
use unveil_service::prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use unveil_service::prometheus_client::registry::{Registry, Unit};
use unveil_service::{Series, role_registry};
use unveil_torch_ext::GpuMemory;
use unveil_trainer::{UpdateReport, staleness};

/// Upper bounds of the staleness buckets, in versions.
const STALENESS_BUCKETS: [f64; 10] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0];

type Seconds = Family<[(&'static str, &'static str); 1], Histogram, fn() -> Histogram>;

/// Metrics of rank 0; clones share them.
#[derive(Debug, Clone)]
pub(crate) struct LearnerMetrics {
    totals: Arc<Mutex<UpdateTotals>>,
    parts: Seconds,
    staleness: Histogram,
    saves: SaveMetrics,
}

/// Values that are encoded when the metrics page is requested.
#[derive(Debug)]
struct UpdateTotals {
    last: UpdateReport,
    updates: u64,
    skipped: u64,
    responses: u64,
    filtered: u64,
    tokens: u64,
    masked: BTreeMap<String, u64>,
    /// Seconds in which gradient reductions were in progress.
    reduce_s: f64,
    /// Seconds that the trainer waited for gradient reductions.
    reduce_wait_s: f64,
    agreement_limit: f64,
    gpu: Option<GpuMemory>,
}

/// Metrics of checkpoint saves.
#[derive(Debug, Clone)]
pub(crate) struct SaveMetrics {
    seconds: Histogram,
    failures: Counter,
    /// Time of the last commit, or of the start if there was none.
    last_commit: Arc<Mutex<Instant>>,
}

impl SaveMetrics {
    /// Counts a failed save.
    pub(crate) fn failed(&self) {
        self.failures.inc();
    }

    /// Records a committed checkpoint and the duration of its save.
    pub(crate) fn committed(&self, duration: Duration) {
        self.seconds.observe(duration.as_secs_f64());
        *lock(&self.last_commit) = Instant::now();
    }
}

/// Creates a histogram of seconds from 1 ms to 1000 s.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 21))
}

impl LearnerMetrics {
    /// Creates the metrics; `agreement_limit` is the limit of |delta log p| in nats.
    pub(crate) fn new(agreement_limit: f64) -> Self {
        let totals = UpdateTotals {
            last: UpdateReport::default(),
            updates: 0,
            skipped: 0,
            responses: 0,
            filtered: 0,
            tokens: 0,
            masked: BTreeMap::new(),
            reduce_s: 0.0,
            reduce_wait_s: 0.0,
            agreement_limit,
            gpu: None,
        };
        Self {
            totals: Arc::new(Mutex::new(totals)),
            parts: Seconds::new_with_constructor(seconds),
            staleness: Histogram::new(STALENESS_BUCKETS),
            saves: SaveMetrics {
                seconds: seconds(),
                failures: Counter::default(),
                last_commit: Arc::new(Mutex::new(Instant::now())),
            },
        }
    }

    /// Creates a registry of all metrics.
    pub(crate) fn registry(&self) -> Registry {
        let mut registry = role_registry("learner");
        let help = "Time by part of a step: wait for the batch, update, publish, evaluate, save";
        registry.register_with_unit("part", help, Unit::Seconds, self.parts.clone());
        let help = "Versions that the oldest token of a trained group is behind";
        registry.register("staleness_versions", help, self.staleness.clone());
        let help = "Checkpoints that could not be written";
        registry.register("checkpoint_failures", help, self.saves.failures.clone());
        let help = "Time from a checkpoint's first byte to its commit";
        registry.register_with_unit("checkpoint_save", help, Unit::Seconds, self.saves.seconds.clone());
        registry.register_collector(Box::new(self.clone()));
        registry
    }

    /// Returns the metrics of checkpoint saves.
    pub(crate) fn save_metrics(&self) -> SaveMetrics {
        self.saves.clone()
    }

    /// Runs a part of a step and records its duration.
    pub(crate) fn time<T>(&self, part: &'static str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.record_duration(part, start.elapsed().as_secs_f64());
        result
    }

    fn record_duration(&self, part: &'static str, seconds: f64) {
        self.parts.get_or_create(&[("part", part)]).observe(seconds);
    }

    /// Records an update and its batch.
    pub(crate) fn record_update(&self, report: &UpdateReport, batch: &[TrainGroup], gpu: Option<GpuMemory>) {
        self.record_duration("wait", report.wait_ms / 1e3);
        self.record_duration("update", report.step_ms / 1e3);
        // Staleness is relative to the version that the update started from.
        let start_version = report.version.saturating_sub(1);
        batch.iter().for_each(|g| self.staleness.observe(staleness(g, start_version) as f64));
        let mut n = lock(&self.totals);
        n.updates += 1;
        n.skipped += u64::from(report.skipped.is_some());
        n.responses += report.responses as u64;
        n.filtered += report.filtered_responses as u64;
        n.tokens += report.tokens as u64;
        for (name, masked) in &report.masked {
            *n.masked.entry(name.clone()).or_default() += masked;
        }
        n.reduce_s += report.reduce_ms / 1e3;
        n.reduce_wait_s += report.reduce_wait_ms / 1e3;
        n.last = report.clone();
        n.gpu = gpu;
    }
}

impl Collector for LearnerMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut s = Series(encoder);
        let age = lock(&self.saves.last_commit).elapsed().as_secs_f64();
        let help = "Time since this process committed a checkpoint, or since it was started";
        s.gauge("checkpoint_age", help, Some(&Unit::Seconds), age)?;
        let n = lock(&self.totals);
        s.counter("updates", "Updates, skipped ones too", None, n.updates as f64)?;
        s.counter("skipped_updates", "Updates that left the weights as they were", None, n.skipped as f64)?;
        s.counter("responses", "Responses in the batches of updates", None, n.responses as f64)?;
        let help = "Responses left out of the loss because they were cut at the length limit";
        s.counter("filtered_responses", help, None, n.filtered as f64)?;
        s.counter("tokens", "Response tokens trained on", None, n.tokens as f64)?;
        let masked = n.masked.iter().map(|(k, v)| (k.as_str(), *v));
        s.counters("masked", "Responses for which a reward component, or the total, is masked", "component", masked)?;
        let help = "Time in which sums of gradients over ranks were under way";
        s.counter("collective", help, Some(&Unit::Seconds), n.reduce_s)?;
        let help = "Of this, time that was spent waiting: the rest is hidden behind computing";
        s.counter("collective_wait", help, Some(&Unit::Seconds), n.reduce_wait_s)?;
        s.gauge("agreement_limit_nats", "Agreement above which the run stops", None, n.agreement_limit)?;
        if let Some(gpu) = n.gpu {
            let values = [("free", gpu.free as f64), ("total", gpu.total as f64)];
            s.gauges("gpu_memory", "Memory of the GPU", Some(&Unit::Bytes), "state", values)?;
        }
        if n.updates > 0 { encode_update(&mut s, &n.last) } else { Ok(()) }
    }
}

/// Encodes the values of the last update.
fn encode_update(s: &mut Series<'_>, r: &UpdateReport) -> fmt::Result {
    s.gauges("loss", "The loss and its parts, weights not applied to the parts", None, "part", named(&r.loss))?;
    s.gauges("reward", "Mean reward by component, and in total", None, "component", named(&r.reward))?;
    s.gauge("gradient_norm", "Norm of the gradient before clipping", None, r.grad_norm)?;
    s.gauge("learning_rate", "Learning rate", None, r.lr)?;
    s.gauge("entropy_nats", "Mean entropy per token", None, r.entropy)?;
    s.gauge("clipped_ratio", "Share of tokens whose ratio was clipped", None, r.clip_fraction)?;
    s.gauge("kl_nats", "KL of the policy before the update to the policy at the loss", None, r.kl)?;
    s.gauge("kl_reference_nats", "KL to the reference model per token", None, r.kl_reference)?;
    let optional = [
        ("kl_coefficient", "Weight of KL to the reference model", r.kl_coef),
        (
            "agreement_nats",
            "Mean difference of log-probabilities between rollout and learner for the same weights",
            r.agreement,
        ),
        ("drift_nats", "The same for tokens of older weights", r.drift),
        ("vision_lift_ratio", "Mean attention on the lesion over chance", r.vision_lift),
    ];
    for (name, help, value) in optional {
        if let Some(value) = value {
            s.gauge(name, help, None, value)?;
        }
    }
    Ok(())
}

fn named(values: &BTreeMap<String, f64>) -> impl Iterator<Item = (&str, f64)> {
    values.iter().map(|(k, v)| (k.as_str(), *v))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use unveil_service::prometheus_client::encoding::text::encode;

    use super::*;

    fn page(metrics: &LearnerMetrics) -> String {
        let mut page = String::new();
        encode(&mut page, &metrics.registry()).unwrap();
        page
    }

    /// Returns the value of a series.
    fn value_of(page: &str, series: &str) -> f64 {
        let value = |l: &str| l.strip_prefix("unveil_learner_")?.strip_prefix(series)?.strip_prefix(' ')?.parse().ok();
        page.lines().find_map(value).unwrap_or_else(|| panic!("{series} is not in\n{page}"))
    }

    #[test]
    fn absent_values_have_no_series() {
        let metrics = LearnerMetrics::new(1e-5);
        let before = page(&metrics);
        assert_eq!((value_of(&before, "updates_total"), value_of(&before, "agreement_limit_nats")), (0.0, 1e-5));
        for absent in ["gradient_norm", "gpu_memory", "agreement_nats", "masked", "loss"] {
            assert!(!before.contains(&format!("unveil_learner_{absent}")), "{absent} is in\n{before}");
        }
        let report = UpdateReport { version: 3, grad_norm: 0.5, skipped: Some("why".into()), ..Default::default() };
        metrics.record_update(&report, &[], Some(GpuMemory { free: 5, total: 7 }));
        let after = page(&metrics);
        assert_eq!((value_of(&after, "gradient_norm"), value_of(&after, "skipped_updates_total")), (0.5, 1.0));
        assert_eq!(value_of(&after, "gpu_memory_bytes{state=\"free\"}"), 5.0);
        assert!(!after.contains("unveil_learner_agreement_nats") && !after.contains("kl_coefficient"), "{after}");
    }

    #[test]
    fn counters_add_up_and_a_commit_resets_the_age() {
        let metrics = LearnerMetrics::new(1e-5);
        let mut report = UpdateReport { responses: 8, tokens: 100, reduce_ms: 500.0, ..Default::default() };
        report.filtered_responses = 3;
        report.reduce_wait_ms = 125.0;
        report.masked.insert("relevance".into(), 3);
        for agreement in [None, Some(2e-6)] {
            report.agreement = agreement;
            metrics.record_update(&report, &[], None);
        }
        let text = page(&metrics);
        for (series, value) in [
            ("updates_total", 2.0),
            ("responses_total", 16.0),
            ("filtered_responses_total", 6.0),
            ("tokens_total", 200.0),
            ("masked_total{component=\"relevance\"}", 6.0),
            ("collective_seconds_total", 1.0),
            ("collective_wait_seconds_total", 0.25),
            ("part_seconds_count{part=\"update\"}", 2.0),
            ("agreement_nats", 2e-6),
        ] {
            assert_eq!(value_of(&text, series), value, "{series}");
        }
        let age = |page: &str| value_of(page, "checkpoint_age_seconds");
        std::thread::sleep(Duration::from_millis(120));
        let old = page(&metrics);
        assert!(age(&old) >= 0.12);
        metrics.save_metrics().committed(Duration::from_secs(2));
        let new = page(&metrics);
        assert!(age(&new) < 0.12, "{new}");
        let saves = |page: &str| value_of(page, "checkpoint_save_seconds_count");
        assert_eq!((saves(&old), saves(&new), value_of(&new, "checkpoint_save_seconds_sum")), (0.0, 1.0, 2.0));
        assert_eq!(metrics.time("publish", || 7), 7);
        assert_eq!(value_of(&page(&metrics), "part_seconds_count{part=\"publish\"}"), 1.0);
    }
}
