//! Logs of a role, on stderr. The level comes from the caller: environment variables are the config room's.

use std::fmt;

use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::ServiceError;

/// Puts the role's name before each line, so that the merged logs of several processes stay readable; takes secrets out of it.
struct WithRole<F> {
    role: String,
    inner: F,
}

impl<S, N, F> FormatEvent<S, N> for WithRole<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = format!("{:<8} ", self.role);
        self.inner.format_event(ctx, Writer::new(&mut line), event)?;
        writer.write_str(&unveil_core::redact(&line))
    }
}

/// Sends this process's logs to stderr, each line led by `role`. `level` is a tracing filter (`info`, `warn,unveil_reward=debug`).
///
/// # Errors
/// The level cannot be read, or logging is already set up.
pub fn init_tracing(role: &str, level: &str) -> Result<(), ServiceError> {
    let filter = EnvFilter::builder().parse(level).map_err(|e| {
        ServiceError::Setup(format!("log level `{level}`: {e}; write error, warn, info, debug or trace"))
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .event_format(WithRole { role: role.to_owned(), inner: Format::default().with_target(false).with_ansi(false) })
        .try_init()
        .map_err(|e| ServiceError::Setup(format!("logging: {e}")))
}

#[cfg(test)]
mod tests {
    #[test]
    fn secrets_stay_out_of_log_lines() {
        use std::sync::{Arc, Mutex};
        use tracing_subscriber::fmt::MakeWriter;

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
        impl MakeWriter<'_> for Buffer {
            type Writer = Self;
            fn make_writer(&self) -> Self {
                self.clone()
            }
        }

        let (buffer, secret) = (Buffer::default(), "a-secret-in-a-log");
        let role = super::WithRole { role: "x".into(), inner: super::Format::default().with_ansi(false) };
        let log = tracing_subscriber::fmt().with_writer(buffer.clone()).event_format(role).finish();
        unveil_core::Secret::new(secret);
        tracing::subscriber::with_default(log, || tracing::info!(echoed = secret, "the peer said {secret}"));
        let said = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        assert!(said.starts_with("x ") && said.contains("the peer said ***") && !said.contains(secret), "{said}");
    }

    #[test]
    fn bad_level_is_named() {
        let e = super::init_tracing("x", "loud=very").unwrap_err().to_string();
        assert!(e.contains("loud=very"), "{e}");
    }
}
