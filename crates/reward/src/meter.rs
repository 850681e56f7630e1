//! Prometheus metrics of the service: values and masks per component, latencies, calls in flight, cost of the judge.

use std::sync::atomic::AtomicU64;
use std::time::Instant;

use unveil_core::{Breakdown, MaskReason};
use unveil_service::chat::ChatSpent;
use unveil_service::prometheus_client::metrics::counter::Counter;
use unveil_service::prometheus_client::metrics::family::Family;
use unveil_service::prometheus_client::metrics::gauge::Gauge;
use unveil_service::prometheus_client::metrics::histogram::{Histogram, exponential_buckets, linear_buckets};
use unveil_service::prometheus_client::registry::{Registry, Unit};
use unveil_service::{GuardCounts, role_registry};

type Values = Family<Vec<(&'static str, String)>, Histogram, fn() -> Histogram>;

/// Counters and histograms of one service.
#[derive(Debug)]
pub(crate) struct Meter {
    values: Values,
    masked: Family<Vec<(&'static str, String)>, Counter>,
    responses: Counter,
    seconds: Histogram,
    in_progress: Gauge,
    calls: Family<Vec<(&'static str, &'static str)>, Gauge>,
    judge: Family<Vec<(&'static str, &'static str)>, Gauge<u64, AtomicU64>>,
}

/// Measures one group from its request to its scores.
pub(crate) struct GroupTimer<'a> {
    meter: &'a Meter,
    start: Instant,
}

impl Meter {
    /// Creates the metrics and the registry that encodes them.
    pub(crate) fn new() -> (Self, Registry) {
        let mut registry = role_registry("reward");
        let buckets: fn() -> Histogram = || Histogram::new(linear_buckets(0.1, 0.1, 10));
        let meter = Self {
            values: Family::new_with_constructor(buckets),
            masked: Family::default(),
            responses: Counter::default(),
            seconds: Histogram::new(exponential_buckets(0.000_25, 2.0, 18)),
            in_progress: Gauge::default(),
            calls: Family::default(),
            judge: Family::default(),
        };
        registry.register("component_value", "Values by component; sum / count is the mean", meter.values.clone());
        registry.register("masked", "Masked components by component and reason", meter.masked.clone());
        registry.register("responses", "Responses scored", meter.responses.clone());
        let help = "Time from a received request to its scores";
        registry.register_with_unit("group", help, Unit::Seconds, meter.seconds.clone());
        registry.register("groups_in_progress", "Groups received and not yet answered", meter.in_progress.clone());
        registry.register(
            "calls",
            "Calls in flight, and calls refused, unauthenticated or late so far",
            meter.calls.clone(),
        );
        registry.register(
            "judge_spent",
            "Requests (with hedges) and tokens spent at the judge so far",
            meter.judge.clone(),
        );
        (meter, registry)
    }

    /// Starts the timer of a group, which counts as in progress until the timer is dropped.
    pub(crate) fn start_group(&self) -> GroupTimer<'_> {
        self.in_progress.inc();
        GroupTimer { meter: self, start: Instant::now() }
    }

    /// Records the values and masks of a scored group.
    pub(crate) fn record_scores(&self, breakdowns: &[Breakdown]) {
        self.responses.inc_by(breakdowns.len() as u64);
        for (name, c) in breakdowns.iter().flat_map(|b| &b.components) {
            let component = || ("component", name.clone());
            match c.value {
                Some(v) => self.values.get_or_create(&vec![component()]).observe(v),
                None => {
                    let reason = ("reason", reason_label(c.reason.as_ref()).to_owned());
                    self.masked.get_or_create(&vec![component(), reason]).inc();
                }
            }
        }
    }

    /// Copies the counts kept by the guard and the judge.
    pub(crate) fn refresh(&self, guard: GuardCounts, judge: Option<ChatSpent>) {
        let set_calls = |state, n: u64| {
            self.calls.get_or_create(&vec![("state", state)]).set(i64::try_from(n).unwrap_or(i64::MAX));
        };
        set_calls("in_flight", guard.in_flight as u64);
        set_calls("refused", guard.refused);
        set_calls("unauthenticated", guard.unauthenticated);
        set_calls("late", guard.timed_out);
        if let Some(spent) = judge {
            for (what, n) in [("requests", spent.requests), ("hedges", spent.hedges), ("tokens", spent.tokens)] {
                self.judge.get_or_create(&vec![("what", what)]).set(n);
            }
        }
    }
}

impl GroupTimer<'_> {
    /// Records the time of an answered group.
    pub(crate) fn finish(self) {
        self.meter.seconds.observe(self.start.elapsed().as_secs_f64());
    }
}

impl Drop for GroupTimer<'_> {
    fn drop(&mut self) {
        self.meter.in_progress.dec();
    }
}

fn reason_label(reason: Option<&MaskReason>) -> &'static str {
    match reason {
        Some(MaskReason::NotApplicable) => "not_applicable",
        Some(MaskReason::NoAttention) => "no_attention",
        Some(MaskReason::GroupMasked) => "group_masked",
        Some(MaskReason::Unavailable(_)) => "unavailable",
        Some(MaskReason::Failed(_) | MaskReason::Form(_)) | None => "failed",
    }
}

#[cfg(test)]
mod tests {
    use unveil_core::Component;
    use unveil_service::prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn metrics_page_shows_scores_masks_and_calls() {
        let (meter, registry) = Meter::new();
        let mut b = Breakdown { id: "a".into(), index: 0, total: Some(1.0), components: Default::default() };
        b.components.insert("format".into(), Component::value(0.5));
        b.components.insert("relevance".into(), Component::masked(MaskReason::Failed("x \"y\"\n".into())));
        let timer = meter.start_group();
        meter.record_scores(&[b.clone(), b]);
        timer.finish();
        let _running = meter.start_group();
        let counts = GuardCounts { in_flight: 3, refused: 7, unauthenticated: 0, timed_out: 0 };
        meter.refresh(counts, Some(ChatSpent { requests: 5, tokens: 90, hedges: 1 }));
        let mut page = String::new();
        encode(&mut page, &registry).unwrap();
        for line in [
            "unveil_reward_component_value_sum{component=\"format\"} 1.0",
            "unveil_reward_component_value_count{component=\"format\"} 2",
            "unveil_reward_masked_total{component=\"relevance\",reason=\"failed\"} 2",
            "unveil_reward_responses_total 2",
            "unveil_reward_group_seconds_count 1",
            "unveil_reward_groups_in_progress 1",
            "unveil_reward_calls{state=\"refused\"} 7",
            "unveil_reward_judge_spent{what=\"tokens\"} 90",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
        }
    }
}
