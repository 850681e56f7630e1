//! Spans of a group's way through the roles, and how one role's span goes on in another: W3C trace context
//! (<https://www.w3.org/TR/trace-context/>) in gRPC metadata or in a message.
//!
//! Where no collector is configured these spans are disabled: making one costs a comparison, and nothing is put into a call. Must not
//! know: who collects them.

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::Request;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Target of every span that [`span!`](crate::span) makes: the one that a collector gets, and logs do not.
pub const SPANS: &str = "unveil::spans";

/// Metadata key of the context.
const TRACEPARENT: &str = "traceparent";

/// A span for the collector: `span!("name", field = value…)` below the current one, `span!(parent: &other, "name", …)` below another,
/// `span!(parent: None, …)` as the first of a trace.
#[macro_export]
macro_rules! span {
    (parent: $parent:expr, $name:literal $($fields:tt)*) => {
        $crate::tracing::trace_span!(target: $crate::SPANS, parent: $parent, $name $($fields)*)
    };
    ($name:literal $($fields:tt)*) => {
        $crate::tracing::trace_span!(target: $crate::SPANS, $name $($fields)*)
    };
}

/// The context of a span, as a `traceparent`; empty where the span is disabled.
pub fn context(span: &Span) -> String {
    if span.is_disabled() {
        return String::new();
    }
    let mut carrier: HashMap<String, String> = HashMap::with_capacity(2);
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.remove(TRACEPARENT).unwrap_or_default()
}

/// Makes a span that was just made the child of the one that `traceparent` names. A text that names none changes nothing.
pub fn continues(span: &Span, traceparent: &str) {
    if span.is_disabled() || traceparent.is_empty() {
        return;
    }
    let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
    let parent = TraceContextPropagator::new().extract(&carrier);
    if let Err(e) = span.set_parent(parent) {
        tracing::debug!("a span starts a trace of its own: {e}");
    }
}

/// Puts the context of a span into a request.
pub fn carry<T>(mut request: Request<T>, span: &Span) -> Request<T> {
    let context = context(span);
    // A context is hexadecimal digits and hyphens, which any header can hold.
    if let Some(value) = context.parse().ok().filter(|_| !context.is_empty()) {
        request.metadata_mut().insert(TRACEPARENT, value);
    }
    request
}

/// The context that came with a request; empty where there was none.
pub fn carried<T>(request: &Request<T>) -> String {
    let value = request.metadata().get(TRACEPARENT);
    value.and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_collector_nothing_is_made_and_nothing_is_carried() {
        let logs = tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).with_writer(std::io::sink).finish();
        tracing::subscriber::with_default(logs, || {
            let span = crate::span!("group", record = "a");
            assert!(span.is_disabled());
            continues(&span, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
            assert_eq!(context(&span), "");
            let request = carry(Request::new(()), &span);
            assert!(request.metadata().is_empty());
            assert_eq!(carried(&request), "");
        });
    }
}
