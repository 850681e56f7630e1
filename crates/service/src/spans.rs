//! Spans that follow a group through the roles, and their propagation between roles as W3C trace context
//! (<https://www.w3.org/TR/trace-context/>) in gRPC metadata or in a message.
//!
//! Without a configured collector these spans are disabled: creating one costs a comparison, and nothing is added to a call.

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::Request;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Target of all spans created by [`span!`](crate::span); they are exported to the collector but not logged.
pub const SPAN_TARGET: &str = "unveil::spans";

/// Metadata key of the trace context.
const TRACEPARENT: &str = "traceparent";

/// Creates a span for the collector: `span!("name", field = value…)` as child of the current span, `span!(parent: &other, "name", …)` as
/// child of another one, and `span!(parent: None, …)` as root of a new trace.
#[macro_export]
macro_rules! span {
    (parent: $parent:expr, $name:literal $($fields:tt)*) => {
        $crate::tracing::trace_span!(target: $crate::SPAN_TARGET, parent: $parent, $name $($fields)*)
    };
    ($name:literal $($fields:tt)*) => {
        $crate::tracing::trace_span!(target: $crate::SPAN_TARGET, $name $($fields)*)
    };
}

/// Returns the context of a span as a `traceparent`, or an empty string if the span is disabled.
pub fn traceparent(span: &Span) -> String {
    if span.is_disabled() {
        return String::new();
    }
    let mut carrier: HashMap<String, String> = HashMap::with_capacity(2);
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.remove(TRACEPARENT).unwrap_or_default()
}

/// Makes a new span a child of the remote span in `traceparent`. An invalid `traceparent` is ignored.
pub fn set_remote_parent(span: &Span, traceparent: &str) {
    if span.is_disabled() || traceparent.is_empty() {
        return;
    }
    let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
    let parent = TraceContextPropagator::new().extract(&carrier);
    if let Err(e) = span.set_parent(parent) {
        tracing::debug!("cannot set the remote parent of a span: {e}");
    }
}

/// Adds the context of a span to a request.
pub fn inject<T>(mut request: Request<T>, span: &Span) -> Request<T> {
    let traceparent = traceparent(span);
    // A trace context consists of hexadecimal digits and hyphens, which are valid in any header.
    if let Some(value) = traceparent.parse().ok().filter(|_| !traceparent.is_empty()) {
        request.metadata_mut().insert(TRACEPARENT, value);
    }
    request
}

/// Returns the trace context of a request, or an empty string if it has none.
pub fn extract<T>(request: &Request<T>) -> String {
    let value = request.metadata().get(TRACEPARENT);
    value.and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_propagated_without_a_collector() {
        let logs = tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).with_writer(std::io::sink).finish();
        tracing::subscriber::with_default(logs, || {
            let span = crate::span!("group", record = "a");
            assert!(span.is_disabled());
            set_remote_parent(&span, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
            assert_eq!(traceparent(&span), "");
            let request = inject(Request::new(()), &span);
            assert!(request.metadata().is_empty());
            assert_eq!(extract(&request), "");
        });
    }
}
