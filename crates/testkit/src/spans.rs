//! An OpenTelemetry collector (OTLP over gRPC) on its own thread that keeps the spans it receives.

use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use tokio::sync::oneshot;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// A received span; ids are hexadecimal.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// `service.name` of the resource.
    pub service: String,
    /// Name of the span.
    pub name: String,
    /// Trace id.
    pub trace: String,
    /// Span id.
    pub id: String,
    /// Id of the parent span; empty for a root span.
    pub parent: String,
    /// Start and end in nanoseconds since 1970.
    pub time: (u64, u64),
    attributes: Vec<(String, String)>,
}

impl Span {
    /// Returns the value of an attribute as text.
    pub fn attribute(&self, key: &str) -> Option<&str> {
        self.attributes.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
}

/// A collector on a loopback port, stopped on drop.
#[derive(Debug)]
pub struct SpanCollector {
    endpoint: String,
    spans: Arc<Mutex<Vec<Span>>>,
    _stop: oneshot::Sender<()>,
}

impl SpanCollector {
    /// Starts the collector.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port of loopback");
        listener.set_nonblocking(true).expect("a listener for tokio");
        let endpoint = format!("http://{}", listener.local_addr().expect("its address"));
        let spans = Arc::<Mutex<Vec<Span>>>::default();
        let (stop, stopped) = oneshot::channel::<()>();
        let service = TraceServiceServer::new(SpanStore(spans.clone()));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener of tokio");
                let incoming = TcpIncoming::from(listener);
                let ended = async { drop(stopped.await) };
                let served = Server::builder().add_service(service).serve_with_incoming_shutdown(incoming, ended);
                served.await.expect("the collector serves");
            });
        });
        Self { endpoint, spans, _stop: stop }
    }

    /// Returns the endpoint, `http://host:port`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Returns the spans received so far.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the received spans satisfy `enough`, and returns them.
    ///
    /// # Panics
    /// Panics if the time is up.
    pub fn until(&self, within: Duration, enough: impl Fn(&[Span]) -> bool) -> Vec<Span> {
        let start = Instant::now();
        loop {
            let spans = self.spans();
            if enough(&spans) {
                return spans;
            }
            assert!(start.elapsed() < within, "the collector has only {spans:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

struct SpanStore(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for SpanStore {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for resource_spans in request.into_inner().resource_spans {
            let resource = attributes_as_text(resource_spans.resource.map(|r| r.attributes).unwrap_or_default());
            let service = resource.into_iter().find(|(k, _)| k == "service.name").map(|(_, v)| v).unwrap_or_default();
            for s in resource_spans.scope_spans.into_iter().flat_map(|s| s.spans) {
                spans.push(Span {
                    service: service.clone(),
                    name: s.name,
                    trace: hex(&s.trace_id),
                    id: hex(&s.span_id),
                    parent: hex(&s.parent_span_id),
                    time: (s.start_time_unix_nano, s.end_time_unix_nano),
                    attributes: attributes_as_text(s.attributes),
                });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn attributes_as_text(attributes: Vec<KeyValue>) -> Vec<(String, String)> {
    let text = |value: Option<AnyValue>| match value.and_then(|v| v.value) {
        Some(Value::StringValue(s)) => s,
        Some(Value::IntValue(i)) => i.to_string(),
        Some(Value::DoubleValue(d)) => d.to_string(),
        Some(Value::BoolValue(b)) => b.to_string(),
        other => format!("{other:?}"),
    };
    attributes.into_iter().map(|a| (a.key, text(a.value))).collect()
}
