//! Where spans go: an OpenTelemetry collector, by OTLP over gRPC (<https://opentelemetry.io/docs/specs/otlp/>), in batches and from
//! a thread of its own, so that no caller waits for it.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tokio::runtime::Runtime;

use crate::{ServiceError, lazy_channel};

/// How long a batch may take.
const SEND: Duration = Duration::from_secs(5);
/// How long the last batch may take, when the process ends.
const FLUSH: Duration = Duration::from_secs(2);

/// The way to a collector. Dropping it sends what is left, for two seconds at most.
#[derive(Debug)]
pub(crate) struct Exporter {
    provider: SdkTracerProvider,
    /// Drives the connection; the roles' own runtimes come and go.
    runtime: Option<Runtime>,
}

impl Exporter {
    /// Connects when the first batch goes out. Spans are those of service `unveil-ROLE`, with the run's directory.
    ///
    /// # Errors
    /// The address cannot be read.
    pub fn open(endpoint: &str, role: &str, run: &str) -> Result<Self, ServiceError> {
        let setup = |e: String| ServiceError::Setup(format!("traces to {endpoint}: {e}"));
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).thread_name("spans").enable_all().build();
        let runtime = runtime.map_err(|e| setup(e.to_string()))?;
        let inside = runtime.enter();
        let channel = lazy_channel(endpoint, None)?;
        let exporter = SpanExporter::builder().with_tonic().with_channel(channel).with_timeout(SEND).build();
        let exporter = exporter.map_err(|e| setup(e.to_string()))?;
        drop(inside);
        let resource = Resource::builder_empty()
            .with_service_name(format!("unveil-{role}"))
            .with_attribute(KeyValue::new("unveil.run", run.to_owned()))
            .build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        Ok(Self { provider, runtime: Some(runtime) })
    }

    pub fn tracer(&self) -> SdkTracer {
        self.provider.tracer("unveil")
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Err(e) = self.provider.shutdown_with_timeout(FLUSH) {
            tracing::warn!("the last spans did not reach the collector: {e}");
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

    use crate::spans::{carried, carry, continues};
    use crate::trace::{TraceOptions, dispatch};

    fn options<'a>(role: &'a str, collector: &'a str) -> TraceOptions<'a> {
        TraceOptions { role, level: "info", json: false, run: "runs/x", collector }
    }

    #[test]
    fn one_trace_goes_through_two_roles() {
        let collector = SpanCollector::start();
        let (learner, own) = dispatch(&options("learner", collector.endpoint()), std::io::sink).unwrap();
        let (rollout, other) = dispatch(&options("rollout", collector.endpoint()), std::io::sink).unwrap();
        let request = tracing::dispatcher::with_default(&learner, || {
            let lease = crate::span!(parent: None, "lease", record = "r7");
            tracing::info_span!("not for the collector").in_scope(|| tracing::info!("nor this"));
            carry(Request::new(()), &lease)
        });
        assert_eq!(request.metadata().len(), 1);
        tracing::dispatcher::with_default(&rollout, || {
            let generate = crate::span!("generate");
            continues(&generate, &carried(&request));
            let stranger = crate::span!(parent: None, "stranger");
            continues(&stranger, "no context");
        });
        drop((own, other));
        let spans = collector.spans();
        assert_eq!(spans.len(), 3, "{spans:?}");
        let find = |name: &str| spans.iter().find(|s| s.name == name).unwrap();
        let (lease, generate) = (find("lease"), find("generate"));
        assert_eq!((lease.service.as_str(), generate.service.as_str()), ("unveil-learner", "unveil-rollout"));
        assert_eq!((generate.trace.as_str(), generate.parent.as_str()), (lease.trace.as_str(), lease.id.as_str()));
        assert_eq!((lease.parent.as_str(), lease.attribute("record")), ("", Some("r7")));
        assert_ne!(find("stranger").trace, lease.trace, "what names no context is a trace of its own");
    }

    #[test]
    fn a_collector_that_is_away_costs_no_more_than_the_last_flush() {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (learner, own) = dispatch(&options("learner", &format!("http://{address}")), std::io::sink).unwrap();
        let start = std::time::Instant::now();
        tracing::dispatcher::with_default(&learner, || (0..10_000).for_each(|_| drop(crate::span!("x"))));
        drop(own);
        assert!(start.elapsed() < super::FLUSH * 2, "{:?}", start.elapsed());
        assert!(dispatch(&options("learner", "http://nowhere"), std::io::sink).is_err());
    }
}
