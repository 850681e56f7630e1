//! Export of spans to an OpenTelemetry collector by OTLP over gRPC (<https://opentelemetry.io/docs/specs/otlp/>), in batches and on a
//! separate thread, so that no caller waits for it.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tokio::runtime::Runtime;

use crate::{ServiceError, lazy_channel};

/// Time limit for sending a batch.
const BATCH_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for sending the last batch when the process ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Exporter to a collector. Dropping it sends the remaining spans, for at most two seconds.
#[derive(Debug)]
pub(crate) struct Exporter {
    provider: SdkTracerProvider,
    /// Drives the connection, because runtimes of roles are created and dropped.
    runtime: Option<Runtime>,
}

impl Exporter {
    /// Creates an exporter that connects when it sends the first batch. Spans belong to the service `unveil-ROLE` and have the run directory
    /// as attribute.
    ///
    /// # Errors
    /// Returns [`ServiceError::Address`] for an invalid address and [`ServiceError::Setup`] if the exporter cannot be created.
    pub(crate) fn open(endpoint: &str, role: &str, run: &str) -> Result<Self, ServiceError> {
        let setup = |e: String| ServiceError::Setup(format!("traces to {endpoint}: {e}"));
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).thread_name("spans").enable_all().build();
        let runtime = runtime.map_err(|e| setup(e.to_string()))?;
        let context = runtime.enter();
        let channel = lazy_channel(endpoint, None)?;
        let exporter = SpanExporter::builder().with_tonic().with_channel(channel).with_timeout(BATCH_TIMEOUT).build();
        let exporter = exporter.map_err(|e| setup(e.to_string()))?;
        drop(context);
        let resource = Resource::builder_empty()
            .with_service_name(format!("unveil-{role}"))
            .with_attribute(KeyValue::new("unveil.run", run.to_owned()))
            .build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        Ok(Self { provider, runtime: Some(runtime) })
    }

    pub(crate) fn tracer(&self) -> SdkTracer {
        self.provider.tracer("unveil")
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Err(e) = self.provider.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::warn!("exporting the last spans failed: {e}");
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Request;
    use unveil_testkit::SpanCollector;

    use crate::spans::{extract, inject, set_remote_parent};
    use crate::trace::{TraceOptions, dispatch};

    fn options<'a>(role: &'a str, collector: &'a str) -> TraceOptions<'a> {
        TraceOptions { role, level: "info", json: false, run: "runs/x", collector }
    }

    #[test]
    fn trace_spans_two_roles() {
        let collector = SpanCollector::start();
        let (learner, learner_tracing) = dispatch(&options("learner", collector.endpoint()), std::io::sink).unwrap();
        let (rollout, rollout_tracing) = dispatch(&options("rollout", collector.endpoint()), std::io::sink).unwrap();
        let request = tracing::dispatcher::with_default(&learner, || {
            let lease = crate::span!(parent: None, "lease", record = "r7");
            tracing::info_span!("not for the collector").in_scope(|| tracing::info!("nor this"));
            inject(Request::new(()), &lease)
        });
        assert_eq!(request.metadata().len(), 1);
        tracing::dispatcher::with_default(&rollout, || {
            let generate = crate::span!("generate");
            set_remote_parent(&generate, &extract(&request));
            let stranger = crate::span!(parent: None, "stranger");
            set_remote_parent(&stranger, "no context");
        });
        drop((learner_tracing, rollout_tracing));
        let spans = collector.spans();
        assert_eq!(spans.len(), 3, "{spans:?}");
        let find = |name: &str| spans.iter().find(|s| s.name == name).unwrap();
        let lease = find("lease");
        let generate = find("generate");
        assert_eq!((lease.service.as_str(), generate.service.as_str()), ("unveil-learner", "unveil-rollout"));
        assert_eq!((generate.trace.as_str(), generate.parent.as_str()), (lease.trace.as_str(), lease.id.as_str()));
        assert_eq!((lease.parent.as_str(), lease.attribute("record")), ("", Some("r7")));
        assert_ne!(find("stranger").trace, lease.trace, "an invalid context starts a new trace");
    }

    #[test]
    fn unreachable_collector_costs_only_the_last_flush() {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (learner, learner_tracing) =
            dispatch(&options("learner", &format!("http://{address}")), std::io::sink).unwrap();
        let start = std::time::Instant::now();
        tracing::dispatcher::with_default(&learner, || (0..10_000).for_each(|_| drop(crate::span!("x"))));
        drop(learner_tracing);
        assert!(start.elapsed() < super::FLUSH_TIMEOUT * 2, "{:?}", start.elapsed());
        assert!(dispatch(&options("learner", "http://nowhere"), std::io::sink).is_err());
    }
}
