//! What the service tells Prometheus: values and masks per component, latencies, calls under way, what the judge costs.

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
    waiting: Gauge,
    calls: Family<Vec<(&'static str, &'static str)>, Gauge>,
    judge: Family<Vec<(&'static str, &'static str)>, Gauge<u64, AtomicU64>>,
}

/// One group on its way.
pub(crate) struct Timer<'a> {
    meter: &'a Meter,
    start: Instant,
}

impl Meter {
    /// The metrics, and the registry that encodes them.
    pub fn new() -> (Self, Registry) {
        let mut registry = role_registry("reward");
        let buckets: fn() -> Histogram = || Histogram::new(linear_buckets(0.1, 0.1, 10));
        let meter = Self {
            values: Family::new_with_constructor(buckets),
            masked: Family::default(),
            responses: Counter::default(),
            seconds: Histogram::new(exponential_buckets(0.000_25, 2.0, 18)),
            waiting: Gauge::default(),
            calls: Family::default(),
            judge: Family::default(),
        };
        registry.register("component_value", "Values by component; sum / count is the mean", meter.values.clone());
        registry.register("masked", "Masked components by component and reason", meter.masked.clone());
        registry.register("responses", "Responses scored", meter.responses.clone());
        let help = "Time from a read request to its scores";
        registry.register_with_unit("group", help, Unit::Seconds, meter.seconds.clone());
        registry.register("groups_in_progress", "Groups read and not answered yet", meter.waiting.clone());
        registry.register("calls", "Calls under way, and refused, unauthenticated or late so far", meter.calls.clone());
        registry.register(
            "judge_spent",
            "Requests, hedges among them, and tokens at the judge so far",
            meter.judge.clone(),
        );
        (meter, registry)
    }

    /// A group is on its way; it counts as in progress until the timer is dropped.
    pub fn begin(&self) -> Timer<'_> {
        self.waiting.inc();
        Timer { meter: self, start: Instant::now() }
    }

    /// Counts what a group got.
    pub fn scored(&self, breakdowns: &[Breakdown]) {
        self.responses.inc_by(breakdowns.len() as u64);
        for (name, c) in breakdowns.iter().flat_map(|b| &b.components) {
            let component = || ("component", name.clone());
            match c.value {
                Some(v) => self.values.get_or_create(&vec![component()]).observe(v),
                None => {
                    let reason = ("reason", reason(c.reason.as_ref()).to_owned());
                    self.masked.get_or_create(&vec![component(), reason]).inc();
                }
            }
        }
    }

    /// Takes over what others count.
    pub fn refresh(&self, guard: GuardCounts, judge: Option<ChatSpent>) {
        let call = |state, n: u64| {
            self.calls.get_or_create(&vec![("state", state)]).set(i64::try_from(n).unwrap_or(i64::MAX));
        };
        call("in_flight", guard.in_flight as u64);
        call("refused", guard.refused);
        call("unauthenticated", guard.unauthenticated);
        call("late", guard.late);
        if let Some(spent) = judge {
            for (what, n) in [("requests", spent.requests), ("hedges", spent.hedges), ("tokens", spent.tokens)] {
                self.judge.get_or_create(&vec![("what", what)]).set(n);
            }
        }
    }
}

impl Timer<'_> {
    /// The group was answered.
    pub fn done(self) {
        self.meter.seconds.observe(self.start.elapsed().as_secs_f64());
    }
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        self.meter.waiting.dec();
    }
}

fn reason(reason: Option<&MaskReason>) -> &'static str {
    match reason {
        Some(MaskReason::NotApplicable) => "not_applicable",
        Some(MaskReason::NoAttention) => "no_attention",
        Some(MaskReason::GroupMasked) => "group_masked",
        Some(MaskReason::Unavailable(_)) => "unavailable",
        Some(MaskReason::Failed(_)) | None => "failed",
    }
}

#[cfg(test)]
mod tests {
    use unveil_core::Component;
    use unveil_service::prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn what_happened_is_on_the_page() {
        let (meter, registry) = Meter::new();
        let mut b = Breakdown { id: "a".into(), index: 0, total: Some(1.0), components: Default::default() };
        b.components.insert("format".into(), Component::value(0.5));
        b.components.insert("relevance".into(), Component::masked(MaskReason::Failed("x \"y\"\n".into())));
        let timer = meter.begin();
        meter.scored(&[b.clone(), b]);
        timer.done();
        let _running = meter.begin();
        let counts = GuardCounts { in_flight: 3, refused: 7, unauthenticated: 0, late: 0 };
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
