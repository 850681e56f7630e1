//! Logs of a role on stderr, as text or JSON, and export of spans to a collector. The caller provides the log level, because only the
//! config crate reads environment variables.

use std::fmt;

use tracing::{Dispatch, Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{Format, JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::otlp::Exporter;
use crate::{SPAN_TARGET, ServiceError};

/// Options for logs and spans of a process.
#[derive(Debug, Clone, Copy)]
pub struct TraceOptions<'a> {
    /// Name of the role, in every line.
    pub role: &'a str,
    /// Tracing filter for log lines (`info`, `warn,unveil_reward=debug`).
    pub level: &'a str,
    /// Whether lines are JSON objects.
    pub json: bool,
    /// Run directory, in every JSON line and every span.
    pub run: &'a str,
    /// `http://host:port` of an OTLP collector; if empty, spans are disabled.
    pub collector: &'a str,
}

/// Guard of the span exporter. Drop it when the role ends to send the remaining spans.
#[must_use = "spans are lost if this is dropped early"]
#[derive(Debug)]
pub struct Tracing {
    _exporter: Option<Exporter>,
}

/// Adds the role (and, in JSON, the run) to each line, so that merged logs of several processes remain readable, and redacts secrets.
struct RoleFormat<F> {
    prefix: Prefix,
    inner: F,
}

enum Prefix {
    Role(String),
    /// First members of a JSON object.
    Members(String),
}

impl<S, N, F> FormatEvent<S, N> for RoleFormat<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = String::new();
        self.inner.format_event(ctx, Writer::new(&mut line), event)?;
        let line = unveil_core::redact(&line);
        match (&self.prefix, line.strip_prefix('{')) {
            (Prefix::Role(role), _) => write!(writer, "{role:<8} {line}"),
            (Prefix::Members(first), Some(rest)) => write!(writer, "{{{first},{rest}"),
            (Prefix::Members(_), None) => writer.write_str(&line),
        }
    }
}

/// Installs logging to stderr and, if configured, export of spans to the collector.
///
/// # Errors
/// Returns [`ServiceError::Setup`] if the level is invalid or logging is already installed, and [`ServiceError::Address`] for an invalid
/// collector address.
pub fn init_tracing(options: &TraceOptions<'_>) -> Result<Tracing, ServiceError> {
    let (dispatch, tracing) = dispatch(options, std::io::stderr)?;
    dispatch.try_init().map_err(|e| ServiceError::Setup(format!("logging: {e}")))?;
    Ok(tracing)
}

/// Creates the subscriber that [`init_tracing`] installs, with log lines written to `writer`.
pub(crate) fn dispatch<W>(options: &TraceOptions<'_>, writer: W) -> Result<(Dispatch, Tracing), ServiceError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let TraceOptions { role, level, json, run, collector } = *options;
    let filter = EnvFilter::builder().parse(level).map_err(|e| {
        ServiceError::Setup(format!("log level `{level}`: {e}; write error, warn, info, debug or trace"))
    })?;
    let format = Format::default().with_target(false).with_ansi(false);
    let lines = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(writer).log_internal_errors(false);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = if json {
        let members = format!("\"role\":{},\"run\":{}", serde_json::json!(role), serde_json::json!(run));
        let inner = format.json().flatten_event(true).with_current_span(false).with_span_list(false);
        let event = RoleFormat { prefix: Prefix::Members(members), inner };
        lines.fmt_fields(JsonFields::new()).event_format(event).with_filter(filter).boxed()
    } else {
        let event = RoleFormat { prefix: Prefix::Role(role.to_owned()), inner: format };
        lines.event_format(event).with_filter(filter).boxed()
    };
    let lines = tracing_subscriber::registry().with(lines);
    if collector.is_empty() {
        return Ok((lines.into(), Tracing { _exporter: None }));
    }
    let exporter = Exporter::open(collector, role, run)?;
    let spans = tracing_opentelemetry::layer()
        .with_tracer(exporter.tracer())
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(Targets::new().with_target(SPAN_TARGET, Level::TRACE));
    Ok((lines.with(spans).into(), Tracing { _exporter: Some(exporter) }))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn log_lines(json: bool, level: &str, log: impl FnOnce()) -> Vec<String> {
        let buffer = Buffer::default();
        let options = TraceOptions { role: "rollout", level, json, run: "runs/\"odd\"", collector: "" };
        let writer = buffer.clone();
        let (logs, _) = dispatch(&options, move || writer.clone()).unwrap();
        tracing::dispatcher::with_default(&logs, log);
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn text_lines_start_with_the_role() {
        let lines = log_lines(false, "info", || {
            tracing::info!(group = "a", "scored");
            tracing::debug!("below the level");
        });
        assert!(
            matches!(&lines[..], [l] if l.starts_with("rollout  ") && l.contains("INFO scored group=\"a\"")),
            "{lines:?}"
        );
        assert!(serde_json::from_str::<serde_json::Value>(&lines[0]).is_err());
    }

    #[test]
    fn json_lines_contain_role_and_run() {
        let lines = log_lines(true, "warn", || {
            let _inside = tracing::warn_span!("around", k = 1).entered();
            tracing::warn!(group = "a \"b\"", tokens = 3, "no reward,\nmasked");
            tracing::info!("below the level");
        });
        assert_eq!(lines.len(), 1, "a line break in a message is escaped: {lines:?}");
        let line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        let field = |key: &str| line[key].as_str().unwrap_or_default();
        assert_eq!((field("role"), field("run"), field("level")), ("rollout", "runs/\"odd\"", "WARN"));
        assert_eq!((field("message"), field("group"), &line["tokens"]), ("no reward,\nmasked", "a \"b\"", &3.into()));
        assert!(field("timestamp").ends_with('Z'), "{line}");
    }

    #[test]
    fn secrets_are_redacted_in_log_lines() {
        let secret = "a-secret-in-a-log";
        unveil_core::Secret::new(secret);
        for json in [false, true] {
            let lines = log_lines(json, "info", || tracing::info!(echoed = secret, "the peer said {secret}"));
            assert!(matches!(&lines[..], [l] if l.contains("the peer said ***") && !l.contains(secret)), "{lines:?}");
        }
    }

    #[test]
    fn invalid_level_is_named() {
        let options = TraceOptions { role: "x", level: "loud=very", json: false, run: "", collector: "" };
        let e = init_tracing(&options).unwrap_err().to_string();
        assert!(e.contains("loud=very"), "{e}");
    }
}
